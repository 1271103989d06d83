"""Draws docs/images/contexts.svg from results files: time, peak memory and tokens per second of a step by its context.

  python benchmarks/curves.py            # rewrite the picture
  python benchmarks/curves.py --check    # exit 1 if it is out of date

One LoRA step of a Llama-3-8B shape, everything recomputed, in every mode that was measured at two contexts or more
(benchmarks/step.py and quality_costs.py; of equal ones the newest). A point is hollow if saved rows waited in host
memory. Dotted lines are floors: of the time, the products of the step that no implementation can do without, nothing
recomputed, at the rate that cuBLAS reaches (in modes with all tokens and all pairs: that of the dense step); of memory,
the weights. Like step.svg, the picture is a pure function of the results.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from figure import ROOT, STYLE, text
from page_tables import RESULTS, in_thousands
from publish import publish

OUT = ROOT / "docs" / "images" / "contexts.svg"
GPU, MODEL = "NVIDIA H200", "llama3-8b"
CONTEXTS = (8192, 1 << 20)
# A product of 16384 x 4096 and 4096 x 128256 in bf16 takes cuBLAS 22.7 ms on an H200.
RATE = 757e12
# Of Llama-3-8B: layers, heads x head_dim, vocabulary, and multiply-adds of a token in a layer's projections.
LAYERS, WIDTH, VOCABULARY = 32, 4096, 128256
ROW = 2 * WIDTH * (WIDTH + 1024) + 3 * WIDTH * 14336
WEIGHTS_GIB = 15.0

PANEL_WIDTH, HEIGHT, TOP, LEFT, GAP = 270, 250, 62, 62, 62
LEGEND = 22
COLOURS = ("#8b949e", "#3b7dd8", "#c4762b", "#2f9e78", "#8f5fd0", "#cf4f6b", "#4aa8c0")


@dataclass(frozen=True)
class Series:
    """A way of training; keep: if its products are those of the dense step among so many of the tokens, whose floor is
    then drawn."""

    name: str
    matches: Callable[[dict[str, Any]], bool]
    keep: float | None = None


def _lemo(mode: str, keep: float = 1.0, keys: int | None = None) -> Callable[[dict[str, Any]], bool]:
    wanted = ("lemo", mode, keep, keys)
    return lambda r: (r["method"], r["mode"], r["keep"], r.get("keys")) == wanted and r.get("density") is None


SERIES = (
    Series("transformers + PEFT + Liger", lambda r: r["method"] == "transformers + PEFT + Liger"),
    Series("lemo, nothing eliminated", _lemo("dense"), 1.0),
    Series("backward 0.5 weighted", lambda r: _lemo("backward", 0.5)(r) and r["weighted"]),
    Series("sparse, 8K keys", _lemo("sparse", keys=8192)),
    Series("skip 0.5", _lemo("skip", 0.5), 0.5),
    Series("skip 0.3", _lemo("skip", 0.3), 0.3),
    Series("skip 0.3, 8K keys", _lemo("sparse", 0.3, 8192)),
)


def floor_seconds(tokens: float, keep: float) -> float:
    """Of the products of a step in which each layer has a share of the tokens, with frozen weights: forward once,
    backward once (attention: two and five products of pairs)."""
    rows = keep * tokens
    adds = LAYERS * (2 * rows * ROW + 3.5 * rows * rows / 2 * 2 * WIDTH) + 2 * rows * WIDTH * VOCABULARY
    return 2 * adds / RATE


@dataclass(frozen=True)
class Point:
    context: int
    seconds: float
    gib: float
    offloaded: bool

    @property
    def rate(self) -> float:
        return self.context / self.seconds


def measured() -> list[dict[str, Any]]:
    """Rows of whole steps, the newest file first; saved rows that stayed on the GPU before those that did not."""
    found = [
        json.loads(path.read_text()) for kind in ("step", "costs") for path in sorted(RESULTS.glob(f"{kind}-*.json"))
    ]
    found.sort(key=lambda result: result["date"], reverse=True)
    rows = [
        row
        for result in found
        if result["gpu"] == GPU
        for row in result["rows"]
        if row["model"] == MODEL
        and row["recompute"] != "none"
        and {"step_ms", "peak_mib"} <= row.keys()
        and CONTEXTS[0] <= row["context"] <= CONTEXTS[1]
    ]
    return sorted(rows, key=lambda row: (bool(row.get("offload")), row["recompute"] != "full"))


def curves() -> list[tuple[Series, str, list[Point]]]:
    """What was measured at two contexts or more, with its colour."""
    rows, found = measured(), []
    for series, colour in zip(SERIES, COLOURS, strict=True):
        points: dict[int, Point] = {}
        for row in filter(series.matches, rows):
            point = Point(row["context"], row["step_ms"] / 1e3, row["peak_mib"] / 1024, bool(row.get("offload")))
            points.setdefault(row["context"], point)
        if len(points) > 1:
            found.append((series, colour, [points[context] for context in sorted(points)]))
    return found


@dataclass(frozen=True)
class Panel:
    """A graph with a logarithmic axis for contexts, and one for values from `low` to `high`."""

    title: str
    left: float
    low: float
    high: float
    label: Callable[[float], str]

    def x(self, context: float) -> float:
        first, last = CONTEXTS
        return self.left + PANEL_WIDTH * math.log(context / first) / math.log(last / first)

    def y(self, value: float) -> float:
        return TOP + HEIGHT * (1 - math.log(value / self.low) / math.log(self.high / self.low))

    def axes(self) -> Iterator[str]:
        bottom = TOP + HEIGHT
        yield text(self.left, TOP - 14, self.title, "head")
        powers = math.ceil(math.log2(self.low)), math.floor(math.log2(self.high)) + 1
        for power in range(*powers, 2 if powers[1] - powers[0] > 4 else 1):
            at = self.y(2.0**power)
            yield f'<path class="grid" d="M{self.left:g} {at:.1f} h{PANEL_WIDTH}"/>'
            yield text(self.left - 6, round(at + 4, 1), self.label(2.0**power), "note end")
        for doublings in range(0, 8, 1):
            context = CONTEXTS[0] << doublings
            yield f'<path class="axis" d="M{self.x(context):.1f} {bottom} v4"/>'
            name = "1M" if context == 1 << 20 else in_thousands(context)
            yield text(round(self.x(context), 1), bottom + 18, name, "note middle")
        yield f'<path class="axis" d="M{self.left:g} {TOP} V{bottom} h{PANEL_WIDTH}"/>'

    def line(self, values: list[tuple[float, float]], kind: str, colour: str) -> str:
        inside = [(context, min(max(value, self.low), self.high)) for context, value in values]
        path = " L".join(f"{self.x(context):.1f} {self.y(value):.1f}" for context, value in inside)
        return f'<path class="{kind}" stroke="{colour}" d="M{path}"/>'


def drawn(
    panel: Panel, value: Callable[[Point], float], floor: Callable[[float, float], float] | None
) -> Iterator[str]:
    yield from panel.axes()
    for series, colour, points in curves():
        if floor is not None and series.keep is not None:
            contexts = [CONTEXTS[0] * 2.0 ** (i / 4) for i in range(29)]
            inside = [(c, f) for c in contexts if panel.low <= (f := floor(c, series.keep)) <= panel.high]
            if len(inside) > 1:
                yield panel.line(inside, "floor", colour)
        yield panel.line([(p.context, value(p)) for p in points], "curve", colour)
        for p in points:
            fill = "var(--ground)" if p.offloaded else colour
            at = f'cx="{panel.x(p.context):.1f}" cy="{panel.y(value(p)):.1f}"'
            yield f'<circle {at} r="3" stroke="{colour}" fill="{fill}"/>'


def picture() -> str:
    found = curves()
    lefts = [LEFT + i * (PANEL_WIDTH + GAP) for i in range(3)]
    width = lefts[-1] + PANEL_WIDTH + 24
    height = TOP + HEIGHT + 44 + LEGEND * math.ceil((len(found) + 1) / 3)
    time = Panel("seconds per step", lefts[0], 0.25, 512, lambda v: f"{v:g}")
    memory = Panel("peak memory, GiB", lefts[1], 14, 140, lambda v: f"{v:g}")
    rate = Panel("tokens per second", lefts[2], 1024, 131072, lambda v: in_thousands(int(v)))
    style = STYLE + (
        "  .middle { text-anchor: middle; } .grid { stroke: var(--edge); fill: none; } .axis { fill: none; }\n"
        "  .curve { fill: none; stroke-width: 2; } .floor { fill: none; stroke-dasharray: 2 3; }\n"
    )
    title = "One LoRA step of a Llama-3-8B shape by context, everything recomputed"
    spoken = "; ".join(
        f"{series.name}: " + ", ".join(f"{in_thousands(p.context)} {p.seconds:.2f} s {p.gib:.0f} GiB" for p in points)
        for series, _, points in found
    )
    weights = memory.line([(CONTEXTS[0], WEIGHTS_GIB), (CONTEXTS[1], WEIGHTS_GIB)], "floor", "var(--soft)")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="desc">{escape(spoken)}</desc>',
        f"<style>{style}</style>",
        f'<rect class="ground" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8"/>',
        text(20, 28, f"{title} ({GPU})", "title"),
        *drawn(time, lambda p: p.seconds, floor_seconds),
        *drawn(memory, lambda p: p.gib, None),
        weights,
        *drawn(rate, lambda p: p.rate, lambda tokens, keep: tokens / floor_seconds(tokens, keep)),
    ]
    entries = [(series.name, colour, "curve") for series, colour, _ in found]
    for i, (name, colour, kind) in enumerate([*entries, ("floor: products, weights", "var(--soft)", "floor")]):
        x, y = lefts[i % 3], TOP + HEIGHT + 46 + LEGEND * (i // 3)
        parts += [f'<path class="{kind}" stroke="{colour}" d="M{x:g} {y - 4} h22"/>', text(x + 30, y, name)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def made() -> Iterator[tuple[Path, str]]:
    if not curves():
        raise SystemExit(f"no results to draw: benchmarks/results has no step measured at two contexts on {GPU}")
    yield OUT, picture()


def main() -> int:
    return publish(__doc__, made)


if __name__ == "__main__":
    sys.exit(main())
