"""A sensitivity study as one HTML page: quality against cost, the rows, and the recommendation."""

from __future__ import annotations

import math
from typing import Any

from lemo.pages.charts import Point, scatter
from lemo.pages.html import Section, escape, missing, page, table, values

_METHOD = (
    "Every row trained an adapter with every seed, and each adapter was judged on the dense model, as it is served, on "
    "the same held-out pieces. Changes are in pairs: the same seed, the same pieces. The bootstrap draws seeds and "
    "pieces again; Student's interval adds the variances of seeds and pieces. A row counts as better or worse only if "
    "both intervals exclude 0. Costs are measured steps of this model on this machine. If several learning rates were "
    "tried, they were chosen on pieces that judge nothing."
)


def sweep_page(title: str, rows: list[dict[str, Any]], advice: dict[str, str], about: dict[str, Any]) -> str:
    """rows, advice: as `lemo.study.conclusions` makes them; about: settings and the like, by name."""
    verdict = (
        f'<p class="verdict"><strong id="advice">Use {escape(advice["use"])}</strong>: <span id="reason">'
        f"{escape(advice['reason'])}</span></p>"
    )
    known = [r for r in rows if r["loss"] is not None and math.isfinite(r["loss"])]
    if known:
        points = [_point(r, known) for r in known]
        chart = scatter(
            "Held-out loss against the cost of training; the dashed line joins the front", "cost", "loss", points
        )
        chart += '<p class="note">Bars: the bootstrap interval of the change against dense, at dense\'s own loss.</p>'
    else:
        chart = missing("No run is finished yet.", "Run the same lemo sweep command again: it continues.")
    costs = {
        name: "does not fit" if seconds is None else f"{1000 * seconds:.1f} ms"
        for name, seconds in about.pop("times").items()
    }
    sections = [
        Section("recommendation", "Recommendation", verdict),
        Section("front", "Quality against cost", chart),
        Section("rows", "Ways of training", _table(rows)),
        Section("method", "How this was measured", f"<p>{escape(_METHOD)}</p>"),
        Section("times", "Measured steps", values(costs)),
        Section("about", "Settings", values(about)),
    ]
    return page(title, "", sections, {"rows": rows, "advice": advice})


def _point(row: dict[str, Any], known: list[dict[str, Any]]) -> Point:
    against = row.get("against_dense") or {}
    low, high = against.get("low"), against.get("high")
    if low is not None and high is not None:
        middle = row["loss"] - against["difference"]
        low, high = middle + low, middle + high
    return Point(row["name"], row["cost"], row["loss"], low, high, bool(row.get("front")))


def _table(rows: list[dict[str, Any]]) -> str:
    columns = ["row", "schedule", "without lemo", "cost", "steps", "rate", "seeds", "loss"]
    columns += ("change %", "bootstrap low", "high", "Student low", "high", "verdict", "peak MiB", "note")
    found = []
    for r in rows:
        against = r.get("against_dense") or {}
        ends = [against.get(n) for n in ("difference", "low", "high", "t_low", "t_high")]
        changes = [None if v is None else 100 * math.expm1(v) for v in ends]
        same = [r[n] for n in ("cost", "steps", "rate")] + [len(r["seeds"]), r["loss"]]
        rival = "yes" if r["rival"] else "no"
        last = [against.get("verdict", ""), r["peak_mib"], r["note"]]
        found.append([r["name"], r["schedule"], rival, *same, *changes, *last])
    caption = "Changes of perplexity against dense, in percent, with 95 % intervals"
    return table(columns, found, caption, name="rows-table")
