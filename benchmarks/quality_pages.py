"""Tables and pictures of the quality study, from results/quality-MODEL-SETTING.json.

  python benchmarks/quality_pages.py            # redraw docs/images/quality-MODEL-SETTING.svg
  python benchmarks/quality_pages.py --check    # exit 1 if one is out of date

The tables go into docs/results.md by benchmarks/summary.py; what a picture shows is said in quality_figure.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import quality_stats as stats
from page_tables import RESULTS, ROOT, in_thousands, left_out, markdown
from publish import publish
from quality_figure import picture

IMAGES = ROOT / "docs" / "images"

SETTINGS = {
    "A": "context extension to {context} tokens: perplexity of held-out text, mean over domains",
    "B": "adaptation to {adapt} at {context} tokens: perplexity of held-out {adapt}",
    "C": "answers whose evidence is far away, {context} tokens: loss of the answers",
}


def studies() -> dict[str, dict[str, Any]]:
    """By file, those of this study; the files of its first version have no length of reference."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("quality-*-[ABC].json"))}
    return {name: result for name, result in found.items() if "sequences" in result}


def heading(result: dict[str, Any]) -> tuple[str, str]:
    """What the model learned; what is measured, and at which cost."""
    what = SETTINGS[result["setting"]].format(context=in_thousands(result["context"]), adapt=result["adapt"])
    learned, _, measured = what.partition(": ")
    return f"{result['model']}, {learned}", f"{measured}, at the cost of {max(result['sequences']):g} dense sequences"


def title(result: dict[str, Any]) -> str:
    return ": ".join(heading(result))


# ---- tables ----------------------------------------------------------------------------------------------------------


def change(values: dict[str, Any] | None, digits: int = 2, scale: float = 1.0) -> str:
    """-1.20 (-1.90 to -0.50)"""
    if values is None:
        return ""
    if values["low"] is None:
        return f"{scale * values['gap']:+.{digits}f} (one seed)"
    ends = (f"{scale * values[n]:+.{digits}f}" for n in ("low", "high"))
    return f"{scale * values['gap']:+.{digits}f} ({' to '.join(ends)})"


def cells(row: dict[str, Any], setting: str, seeds: int) -> list[str]:
    dense, rival = row.get("against_dense"), row.get("against_best_rival")
    ran = len(row.get("seeds", ())) or seeds  # the model without an adapter has none
    line = [
        row["name"] if ran == seeds else f"{row['name']} ({ran} seeds)",
        in_thousands(row["cost_at"]) if "cost_at" in row else "",
        ", ".join(f"{in_thousands(int(n))}: {c:.0f}" for n, c in row.get("cost", {}).items() if c is not None),
        f"{row['steps']:,} x {row['batch']}" if "steps" in row else "",
        f"{row['rate']:g}" if "rate" in row else "",
        f"{row['mean_loss']:.4f}",
        change(dense["loss"]) if dense else "",
    ]
    if rival is None or rival["to"] == row["name"]:
        line.append("the best rival" if rival else "")
    else:
        line.append(f"{change(rival['loss'])}: {stats.verdict(rival['loss'])}")
    if setting == "C":
        line.append(f"{100 * row['mean_accuracy']:.1f} %")
        line.append(change(dense["accuracy"], 1, 100.0) if dense else "")
    elif setting == "B":
        line.append(change(dense.get("elsewhere")) if dense else "")
    return line


def tables() -> list[str]:
    """A table per study: its largest budget, a row per way of training."""
    lines: list[str] = []
    for name, result in studies().items():
        largest = max(result["sequences"])
        rows = [row for row in result["rows"] if row.get("sequences", largest) == largest]
        header = ["training", "equal cost at", "cost in dense sequences", "steps x batch", "rate", "loss"]
        header += ["perplexity against dense, %", "against the best rival, %"]
        header += {"A": [], "B": ["elsewhere, %"], "C": ["right answers", "against dense, points"]}[result["setting"]]
        lines += [f"**{title(result)}** (dense model with the adapter; {len(result['seeds'])} seeds)", ""]
        lines += markdown(header, [cells(row, result["setting"], len(result["seeds"])) for row in rows])
        still = [f"Not finished: {text}." for text in result["missing"]]
        still += [f"Failed: {text}." for text in result["failed"]]
        chains = dict.fromkeys(chain for row in rows for chain in row.get("chained", []))
        priced = [f"Priced through a step of two files: {chain}." for chain in chains]
        lines += ["", f"![Quality against cost](images/{name}.svg)", ""]
        made = (
            f"`benchmarks/results/{name}.json`: {', '.join(result['runs']['gpus'])}, {result['runs']['count']} runs, "
        )
        made += f"commit {result['commit']}, {result['date'][:10]}; `{result['command']}`"
        lines += [" ".join([f"Intervals: {result['interval']}.", *left_out(result), *priced, *still, made]), ""]
    return lines


# ---- pictures --------------------------------------------------------------------------------------------------------


def made() -> Iterator[tuple[Path, str]]:
    for name, result in studies().items():
        if (drawn := picture(result, *heading(result))) is not None:
            yield IMAGES / f"{name}.svg", drawn


def main(arguments: Sequence[str] | None = None) -> int:
    return publish(__doc__, made, arguments)


if __name__ == "__main__":
    sys.exit(main())
