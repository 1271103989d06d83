"""Draws docs/images/flow.svg: one layer of a training step in mode `skip`, and the segmented loss after the last one.

  python docs/images/flow.py            # rewrite the picture
  python docs/images/flow.py --check    # exit 1 if the picture in the repository differs from this script

The picture brings its own background and both sets of colors, so that it is readable in a light and in a dark page,
whichever of the two the viewer asked for. It is a pure function of this file: no dates, no random numbers, no fonts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

OUT = Path(__file__).with_name("flow.svg")

# Predicted scores of twelve blocks; the six highest are kept, among them the first block of the document.
SCORES = (1.0, 0.3, 0.62, 0.74, 0.2, 0.36, 0.86, 0.26, 0.42, 0.68, 0.16, 0.95)
KEPT = tuple(sorted(sorted(range(len(SCORES)), key=lambda i: -SCORES[i])[:6]))

WIDTH, HEIGHT = 940, 640
LEFT, BLOCK, GAP = 168, 50, 8  # of the strip of blocks
PITCH = BLOCK + GAP
PANEL = (LEFT + 2 * PITCH + 4, 9 * PITCH - 16)  # x and width of the boxes through which kept rows go

STYLE = """
  svg { --ground: #ffffff; --edge: #d0d7de; --ink: #1f2328; --soft: #59636e; --out: #e6e9ed; --out-edge: #b4bcc5;
        --kept: #bfd8fb; --kept-edge: #2f6fc4; --after: #3b7dd8; --box: #f3f6fa; --warm: #e08a2b; }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #0f141b; --edge: #3d444d; --ink: #e9eef3; --soft: #a3adb8; --out: #272e37; --out-edge: #596370;
          --kept: #24466f; --kept-edge: #7db2f5; --after: #5a9bef; --box: #18202a; --warm: #f0a95b; }
  }
  text { font-family: -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif;
         font-size: 13px; fill: var(--ink); }
  .name { font-weight: 600; font-size: 14px; } .note { fill: var(--soft); font-size: 12px; }
  .middle { text-anchor: middle; } .end { text-anchor: end; }
  .ground { fill: var(--ground); stroke: var(--edge); } .box { fill: var(--box); stroke: var(--edge); }
  .out { fill: var(--out); stroke: var(--out-edge); } .kept { fill: var(--kept); stroke: var(--kept-edge); }
  .after { fill: var(--after); stroke: var(--kept-edge); } .score { fill: var(--warm); } .low { fill: var(--out-edge); }
  .flow { stroke: var(--kept-edge); stroke-width: 1.6; fill: none; } .tip { fill: var(--kept-edge); }
  .pass { stroke: var(--out-edge); stroke-width: 1.6; stroke-dasharray: 4 4; fill: none; }
  .brace { stroke: var(--soft); stroke-width: 1.2; fill: none; }
"""


def rect(x: float, y: float, w: float, h: float, kind: str, radius: float = 4) -> str:
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}"/>'


def text(x: float, y: float, value: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"' + (f' class="{kind}"' if kind else "") + f">{value}</text>"


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A curve that leaves and arrives vertically."""
    bend = (y1 + y2) / 2
    curve = f"M{x1:g} {y1:g} C{x1:g} {bend:g} {x2:g} {bend:g} {x2:g} {y2 - 5:g}"
    tip = f"M{x2 - 4:g} {y2 - 6:g} L{x2 + 4:g} {y2 - 6:g} L{x2:g} {y2:g} Z"
    return f'<path class="flow" d="{curve}"/><path class="tip" d="{tip}"/>'


def step(y: float, name: str, *notes: str) -> list[str]:
    """The name of a step in the left margin, with what it does below."""
    return [text(20, y, name, "name"), *(text(20, y + 17 + 15 * i, note, "note") for i, note in enumerate(notes))]


def column(i: int) -> float:
    return LEFT + i * PITCH


def packed(i: int) -> float:
    """x of the i-th packed block: kept blocks lie next to one another, in the middle of the panel."""
    x, width = PANEL
    return x + (width - 6 * BLOCK) / 2 + i * BLOCK


def strip(y: float, kept: str, mark: str = "") -> list[str]:
    lines = []
    for i in range(len(SCORES)):
        lines.append(rect(column(i), y, BLOCK, 30, kept if i in KEPT else "out"))
        label, kind = (mark or str(i), "middle name" if mark else "middle") if i in KEPT else (str(i), "middle note")
        lines.append(text(column(i) + BLOCK / 2, y + 20, label, kind))
    return lines


def packed_strip(y: float) -> list[str]:
    lines = []
    for i, block in enumerate(KEPT):
        lines += [rect(packed(i), y, BLOCK, 26, "kept", 2), text(packed(i) + BLOCK / 2, y + 18, str(block), "middle")]
    return lines


def box(y: float, height: float, first: str, second: str) -> list[str]:
    x, width = PANEL
    return [
        rect(x, y, width, height, "box", 6),
        text(x + width / 2, y + height / 2 - 4, first, "middle"),
        text(x + width / 2, y + height / 2 + 14, second, "middle note"),
    ]


def layer() -> list[str]:
    lines = []
    for i, score in enumerate(SCORES):
        lines.append(rect(column(i) + 10, 76 - 48 * score, BLOCK - 20, 48 * score, "score" if i in KEPT else "low", 2))
    for i in range(len(SCORES)):
        if i not in KEPT:  # drawn first: the boxes of the layer stand in front
            lines.append(f'<path class="pass" d="M{column(i) + BLOCK / 2:g} 116 V446"/>')
    lines += strip(84, "kept")
    lines += [arrow(column(b) + BLOCK / 2, 116, packed(i) + BLOCK / 2, 168) for i, b in enumerate(KEPT)]
    middle = PANEL[0] + PANEL[1] / 2
    lines += packed_strip(170)
    lines += [arrow(middle, 196, middle, 216)]
    lines += box(
        216,
        52,
        "QKV, rotary positions of the original places",
        "causal attention among the kept rows; output projection",
    )
    lines += [arrow(middle, 268, middle, 290)]
    lines += box(290, 52, "norm and MLP of the same rows", "by default; they may have a separate list")
    lines += [arrow(middle, 342, middle, 362), *packed_strip(362)]
    lines += [arrow(packed(i) + BLOCK / 2, 388, column(b) + BLOCK / 2, 448) for i, b in enumerate(KEPT)]
    lines += strip(450, "after", "+")
    right = column(len(SCORES)) + 6
    lines.append(f'<path class="brace" d="M{right:g} 30 H{right + 8:g} V480 H{right:g}"/>')
    lines.append(
        f'<text class="note middle" transform="translate({right + 24:g} 255) rotate(90)">in every layer</text>'
    )
    lines += step(46, "predict", "a score per block from", "the layer's input")
    lines += step(104, "select", "kept and left out")
    lines += step(160, "gather, norm", "kept rows, read at", "their original offsets")
    lines += step(246, "attend")
    lines += step(320, "mlp")
    lines += step(410, "scatter", "results added in place")
    lines += step(470, "left out", "bypass: nothing", "computed or saved")
    return lines


def loss() -> list[str]:
    """The output head: one segment of tokens at a time."""
    lines = [*step(562, "loss", "in segments: logits", "never exist whole")]
    y, width = 534, 12 * PITCH - GAP
    parts = 4
    for i in range(parts):
        x = LEFT + i * width / parts
        lines.append(rect(x, y, width / parts - 6, 26, "kept" if i == 1 else "out"))
        lines.append(text(x + width / parts / 2 - 3, y + 18, f"segment {i + 1}", "middle" if i == 1 else "middle note"))
    x = LEFT + width / parts
    centre = x + width / parts / 2 - 3
    lines += [
        arrow(LEFT + width / 2, 482, LEFT + width / 2, 532),
        text(LEFT + width / 2 + 12, 512, "final norm", "note"),
    ]
    lines += [arrow(centre, 560, centre, 584)]
    lines.append(rect(LEFT, 584, width - 6, 36, "box", 6))
    lines.append(
        text(
            LEFT + width / 2,
            607,
            "output head, cross-entropy and their gradients for this segment; then the next",
            "middle",
        )
    )
    return lines


def picture() -> str:
    label = (
        "One layer: blocks of tokens are scored, the kept ones gathered from their original offsets, sent through "
        "attention and MLP and added back in place; the others bypass the layer on the residual stream. After the last "
        "layer the loss is computed in segments."
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{label}">',
        f"<style>{STYLE}</style>",
        rect(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "ground", 10),
        *layer(),
        *loss(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit 1 if the picture is out of date")
    if parser.parse_args().check:
        if not OUT.exists() or OUT.read_text() != picture():
            print(f"{OUT.name} is out of date; run `python docs/images/flow.py`")
            return 1
        return 0
    OUT.write_text(picture())
    return 0


if __name__ == "__main__":
    sys.exit(main())
