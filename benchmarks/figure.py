"""Draws docs/images/step.svg from results files: time and memory of one LoRA step, lemo against its peer.

  python benchmarks/figure.py            # rewrite the picture
  python benchmarks/figure.py --check    # exit 1 if it is out of date

The rows are those of README's headline table (benchmarks/summary.py). The picture brings its own background and both
sets of colours, so that it is readable in a light and in a dark page. It is a pure function of the results: it has no
date and brings no font.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

from page_tables import ROOT
from publish import publish
from step_pages import Headline, headline

OUT = ROOT / "docs" / "images" / "step.svg"

WIDTH, TOP, PITCH, BAR = 940, 92, 38, 24
PANELS = ((236, 250), (628, 200))  # x and greatest bar length: time, memory; ratios are written after the bars

STYLE = """
  svg { --ground: #ffffff; --edge: #d0d7de; --ink: #1f2328; --soft: #59636e; --peer: #b4bcc5; --ours: #3b7dd8; }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #0f141b; --edge: #3d444d; --ink: #e9eef3; --soft: #a3adb8; --peer: #596370; --ours: #5a9bef; }
  }
  text { font-family: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
         font-size: 13px; fill: var(--ink); }
  .title { font-weight: 600; font-size: 15px; } .head { font-weight: 600; } .note { fill: var(--soft); }
  .end { text-anchor: end; } .ground { fill: var(--ground); stroke: var(--edge); }
  .peer { fill: var(--peer); } .ours { fill: var(--ours); } .axis { stroke: var(--soft); }
"""


def text(x: float, y: float, value: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"' + (f' class="{kind}"' if kind else "") + f">{escape(value)}</text>"


def bars(panel: int, values: list[float], captions: list[tuple[str, str]]) -> list[str]:
    """A bar for each value, the figure behind it, and after that the ratio."""
    x, longest = PANELS[panel]
    lines = []
    for i, (value, (figure, ratio)) in enumerate(zip(values, captions, strict=True)):
        y, length = TOP + i * PITCH, longest * value / max(values)
        kind = "peer" if i == 0 else "ours"
        lines.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{length:.1f}" height="{BAR}" rx="2"/>')
        spaced = f'{escape(figure)}<tspan class="note" dx="8">{escape(ratio)}</tspan>' if ratio else escape(figure)
        lines.append(f'<text x="{x + length + 8:.1f}" y="{y + 17:g}">{spaced}</text>')
    bottom = TOP + (len(values) - 1) * PITCH + BAR + 6
    return [*lines, f'<path class="axis" d="M{x - 0.5:g} {TOP - 6:g} V{bottom:g}"/>']


def picture(found: Headline) -> str:
    names = [name.replace("`", "") for name, *_ in found.bars]
    times = [ms for _, ms, *_ in found.bars]
    memory = [float(mib) for _, _, mib, *_ in found.bars]
    faster = ["", *(f"{ratio:.2f} x faster" for *_, ratio, _ in found.bars[1:])]
    share = ["", *(f"{ratio:.2f} x" for *_, ratio in found.bars[1:])]
    height = TOP + len(names) * PITCH + 12
    spoken = "; ".join(
        f"{name}: {ms / 1000:.2f} s, {mib / 1024:.1f} GiB" for name, ms, mib in zip(names, times, memory, strict=True)
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(found.title)}</title>',
        f'<desc id="desc">{escape(spoken)}</desc>',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        text(20, 32, found.title, "title"),
        text(PANELS[0][0], TOP - 20, "time of a step", "head"),
        text(PANELS[1][0], TOP - 20, found.memory, "head"),
        *(text(PANELS[0][0] - 14, TOP + i * PITCH + 17, name, "end") for i, name in enumerate(names)),
        *bars(0, times, [(f"{ms / 1000:.2f} s", r) for ms, r in zip(times, faster, strict=True)]),
        *bars(1, memory, [(f"{mib / 1024:.1f} GiB", r) for mib, r in zip(memory, share, strict=True)]),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def made() -> Iterator[tuple[Path, str]]:
    found = headline()
    if found is None:
        raise SystemExit("no results to draw: benchmarks/results has no step-*.json with steps of 64K tokens")
    yield OUT, picture(found)


def main() -> int:
    return publish(__doc__, made)


if __name__ == "__main__":
    sys.exit(main())
