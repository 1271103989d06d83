"""The picture of a quality study: each way of training against the best rival at equal cost, and quality against cost.

Above, a line per way, the best first: the change of perplexity against the best rival of the same cost, paired, and
its interval. What lies far off is an arrow at the edge; its figures are written out. Below, quality against cost
where costs differ: at the other length whose steps were measured, and between budgets if there are several. The
dashed line joins the ways that no other beats at their cost (the Pareto front); their numbers are those of the lines
above. The picture brings its own background and both sets of colours, and is a function of the results alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import quality_stats as stats
from page_tables import in_thousands

WIDTH, MARGIN = 940, 20
NAMES, PLOT, FIGURES = 52, (330, 720), 736  # x of the names, of the plot's ends, of the figures after it
TOP, PITCH = 104, 18  # y of the first line, and what the next is below it
HEIGHT, GAP = 230, 76  # of a panel of costs; between two of them
EQUAL = 1.1  # costs that differ by no more are one cost

STYLE = """
  svg { --ground: #ffffff; --edge: #d0d7de; --ink: #1f2328; --soft: #59636e; --rival: #8c959f; --ours: #3b7dd8; }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #0f141b; --edge: #3d444d; --ink: #e9eef3; --soft: #a3adb8; --rival: #768390; --ours: #5a9bef; }
  }
  text { font-family: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
         font-size: 12px; fill: var(--ink); }
  .title { font-weight: 600; font-size: 15px; } .head { font-weight: 600; } .note { fill: var(--soft); }
  .end { text-anchor: end; } .middle { text-anchor: middle; } .ground { fill: var(--ground); stroke: var(--edge); }
  .rival { fill: var(--rival); stroke: var(--rival); } .ours { fill: var(--ours); stroke: var(--ours); }
  .interval { stroke-width: 2; } .axis { stroke: var(--soft); fill: none; } .grid { stroke: var(--edge); fill: none; }
  .front { stroke: var(--ink); fill: none; stroke-dasharray: 4 3; }
"""


def text(x: float, y: float, value: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"' + (f' class="{kind}"' if kind else "") + f">{escape(value)}</text>"


@dataclass(frozen=True)
class Axis:
    """Values from low to high at places from start to end."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers, three to eight of them."""
        rough = (self.high - self.low) / 7
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 5, 10) if power * n >= rough)
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def around(values: Sequence[float], start: float, end: float, margin: float = 0.06) -> Axis:
    low, high = min(values), max(values)
    more = margin * ((high - low) or max(abs(high), 1.0))
    return Axis(low - more, high + more, start, end)


def kind_of(row: Mapping[str, Any]) -> str:
    return "rival" if row["rival"] else "ours"


def ends_of(change: Mapping[str, Any]) -> list[float]:
    """Of an interval; one seed has none."""
    return [change["gap"]] if change["low"] is None else [change["low"], change["high"]]


def signed(change: Mapping[str, Any]) -> str:
    """-1.3 (-1.9 to -0.6); no minus before a zero."""

    def one(value: float) -> str:
        return f"{round(value, 1) + 0.0:+.1f}"

    ends = "" if change["low"] is None else f" ({one(change['low'])} to {one(change['high'])})"
    return one(change["gap"]) + ends


def usual(values: Sequence[float]) -> float:
    """What three quarters of them do not exceed: a few ways that are far worse must not hide how others differ."""
    return sorted(values)[(3 * len(values) - 1) // 4]


# ---- against the best rival ------------------------------------------------------------------------------------------


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: row["against_best_rival"]["loss"]["gap"])


def visible(changes: Sequence[Mapping[str, Any]]) -> Axis:
    lows, highs = ([pick(ends_of(c)) for c in changes] for pick in (min, max))
    return around([min(lows), usual(highs), 0.0], *PLOT)


def line(number: int, row: Mapping[str, Any], axis: Axis, y: float) -> list[str]:
    against = row["against_best_rival"]
    change, kind = against["loss"], kind_of(row)
    is_best = against["to"] == row["name"]
    lines = [
        text(NAMES - 8, y + 4, str(number), "note end"),
        text(NAMES, y + 4, row["name"], "head" if is_best else ""),
        text(FIGURES, y + 4, "the best rival" if is_best else signed(change), "head" if is_best else ""),
    ]
    if change["low"] is not None and not is_best and change["low"] < axis.high:
        low, high = axis.at(change["low"]), axis.at(min(change["high"], axis.high))
        lines.append(f'<path class="interval {kind}" d="M{low:.1f} {y:g} H{high:.1f}"/>')
    if change["gap"] > axis.high:
        return [*lines, f'<path class="mark {kind}" d="M{PLOT[1]:g} {y:g} l-8 -4 v8 z"/>']
    return [*lines, f'<circle class="mark {kind}" cx="{axis.at(change["gap"]):.1f}" cy="{y:g}" r="4"/>']


def comparison(rows: Sequence[Mapping[str, Any]], top: float, head: str) -> list[str]:
    """A line per row below a heading; the caller knows how high it is: a line and the axis."""
    axis = visible([row["against_best_rival"]["loss"] for row in rows])
    bottom = top + PITCH * (len(rows) - 0.5)
    lines = [text(MARGIN, top - PITCH - 6, head, "note")]
    for value in axis.ticks():
        x, kind = axis.at(value), "axis" if value == 0 else "grid"
        lines.append(f'<path class="{kind}" d="M{x:.1f} {top - PITCH / 2:g} V{bottom:g}"/>')
        lines.append(text(x, bottom + 16, f"{value:+g} %" if value else "0", "note middle"))
    for i, row in enumerate(rows):
        lines += line(i + 1, row, axis, top + PITCH * i)
    return lines


# ---- quality against cost --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Costs at `length`, of rows whose costs at `cost_at` were made equal."""

    cost_at: int
    length: int
    rows: tuple[Mapping[str, Any], ...]
    left_out: int

    def head(self) -> str:
        lacks = f", without {self.left_out} whose steps were not measured there" * bool(self.left_out)
        same = f" (runs of equal cost at {in_thousands(self.cost_at)})" * (self.length != self.cost_at)
        return f"at the measured costs of {in_thousands(self.length)} tokens{same}{lacks}"


def panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Those in which costs differ."""
    found = []
    for cost_at in sorted({row["cost_at"] for row in rows}):
        mine = [row for row in rows if row["cost_at"] == cost_at and row.get("against_largest_dense")]
        for length in sorted({int(n) for row in mine for n in row["cost"]}):
            known = [row for row in mine if row["cost"].get(str(length)) is not None]
            costs = [row["cost"][str(length)] for row in known]
            if len(known) > 1 and max(costs) > EQUAL * min(costs):
                found.append(Panel(cost_at, length, tuple(known), len(mine) - len(known)))
    return found


def scatter(panel: Panel, numbers: Mapping[tuple[str, int], int], left: float, width: float, top: float) -> list[str]:
    costs = [row["cost"][str(panel.length)] for row in panel.rows]
    changes = [row["against_largest_dense"]["loss"]["gap"] for row in panel.rows]
    bottom = top + HEIGHT
    across = around(costs, left, left + width)
    up = around([min(changes), usual(changes), 0.0], bottom, top + 12)
    lines = [f'<path class="axis" d="M{left:g} {top:g} V{bottom:g} H{left + width:g}"/>']
    for value in up.ticks():
        lines.append(f'<path class="grid" d="M{left:g} {up.at(value):.1f} h{width:g}"/>')
        lines.append(text(left - 6, up.at(value) + 4, f"{value:+g} %" if value else "0", "note end"))
    lines += [text(across.at(value), bottom + 16, f"{value:g}", "note middle") for value in across.ticks()]
    front = stats.pareto(list(zip(costs, changes, strict=True)))
    places = [(across.at(x), max(up.at(y), top)) for x, y in zip(costs, changes, strict=True)]
    lines.append('<path class="front" d="M' + " L".join("{:.1f} {:.1f}".format(*places[i]) for i in front) + '"/>')
    labelled = (-math.inf, -math.inf)
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        (x, y), kind = places[i], kind_of(panel.rows[i])
        if y == top:
            lines.append(f'<path class="mark {kind}" d="M{x:.1f} {top:g} l-4 8 h8 z"/>')
        else:
            lines.append(f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        if i in front:
            close = x - labelled[0] < 18 and abs(y - labelled[1]) < 16
            number = numbers[panel.rows[i]["name"], panel.cost_at]
            lines.append(text(x - 2, y + 18 if close else y - 8, str(number)))
            labelled = (-math.inf, 0.0) if close else (x, y)
    return lines


# ---- the whole -------------------------------------------------------------------------------------------------------


def picture(result: Mapping[str, Any], heading: str, what: str) -> str | None:
    """None if no row can be drawn yet. what: is measured, and at which cost."""
    every = [row for row in result["rows"] if "cost_at" in row and math.isfinite(row["mean_loss"])]
    largest = max(result["sequences"])
    y: float = TOP
    parts: list[str] = []
    numbers: dict[tuple[str, int], int] = {}
    for cost_at in sorted({row["cost_at"] for row in every}):
        mine = [row for row in every if (row["cost_at"], row["sequences"]) == (cost_at, largest)]
        rows = ranked([row for row in mine if row.get("against_best_rival")])
        if rows:
            numbers |= {(row["name"], cost_at): i + 1 for i, row in enumerate(rows)}
            head = "change of perplexity against the best rival, in percent, with intervals of 95 %; every way has the "
            head += f"same cost, by steps of {in_thousands(cost_at)} tokens"
            parts += comparison(rows, y, head)
            y += PITCH * len(rows) + 44
    if not parts:
        return None
    drawn = panels([row for row in every if (row["name"], row["cost_at"]) in numbers])
    if drawn:
        y += 8
        parts.append(
            text(MARGIN, y, "change of perplexity against the dearest dense run, by cost in dense sequences", "head")
        )
        y += 26
    left, width = MARGIN + 56, WIDTH - 2 * MARGIN - 76
    for panel in drawn:
        parts.append(text(left, y, panel.head(), "note"))
        parts += scatter(panel, numbers, left, width, y + 16)
        y += HEIGHT + GAP
    height = y + 4
    left = PLOT[1] - 66
    key = f'<circle class="ours" cx="{left}" cy="26" r="4"/>' + text(left + 10, 30, "lemo's policies")
    key += f'<circle class="rival" cx="{left + 120}" cy="26" r="4"/>' + text(left + 130, 30, "possible without them")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}" '
        f'role="img" aria-labelledby="title">\n<title id="title">{escape(heading)}: {escape(what)}</title>\n'
        f"<style>{STYLE}</style>\n"
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="8"/>\n'
        + "\n".join([text(MARGIN, 30, heading, "title"), text(MARGIN, 50, what, "note"), key, *parts, "</svg>"])
        + "\n"
    )
