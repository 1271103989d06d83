"""Tables and pictures of the quality study, from results/quality-MODEL-SETTING.json.

  python benchmarks/quality_pages.py            # redraw docs/images/quality-MODEL-SETTING.svg
  python benchmarks/quality_pages.py --check    # exit 1 if one is out of date

The tables go into docs/results.md by benchmarks/summary.py. A picture shows quality against cost, a panel per length
whose measured costs were made equal, and the front of the ways of training that no other beats at their cost.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import quality_stats as stats
from publish import publish

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

SETTINGS = {
    "A": "context extension to {context} tokens: perplexity of held-out text, mean over domains",
    "B": "adaptation to {adapt} at {context} tokens: perplexity of held-out {adapt}",
    "C": "answers whose evidence is far away, {context} tokens: loss of the answers",
}

WIDTH, TOP, HEIGHT, LEFT, GAP = 940, 74, 260, 84, 76

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
  .axis { stroke: var(--soft); fill: none; } .front { stroke: var(--ink); fill: none; stroke-dasharray: 4 3; }
"""


def studies() -> dict[str, dict[str, Any]]:
    """By file, those of this study; the files of its first version have no length of reference."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("quality-*-[ABC].json"))}
    return {name: result for name, result in found.items() if "sequences" in result}


def in_thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def title(result: dict[str, Any]) -> str:
    what = SETTINGS[result["setting"]].format(context=in_thousands(result["context"]), adapt=result["adapt"])
    return f"{result['model']}, {what}, at the cost of {max(result['sequences']):g} dense sequences"


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
        table = [header, ["---"] * len(header), *(cells(row, result["setting"], len(result["seeds"])) for row in rows)]
        lines += [f"**{title(result)}** (dense model with the adapter; {len(result['seeds'])} seeds)", ""]
        lines += ["| " + " | ".join(line) + " |" for line in table]
        left_out = [f"Left out: {row}: {reason}." for row, reason in result["left_out"].items()]
        still = [f"Not finished: {text}." for text in result["missing"]]
        still += [f"Failed: {text}." for text in result["failed"]]
        chains = dict.fromkeys(chain for row in rows for chain in row.get("chained", []))
        left_out += [f"Priced through a step of two files: {chain}." for chain in chains]
        lines += ["", f"![Quality against cost](images/{name}.svg)", ""]
        made = (
            f"`benchmarks/results/{name}.json`: {', '.join(result['runs']['gpus'])}, {result['runs']['count']} runs, "
        )
        made += f"commit {result['commit']}, {result['date'][:10]}; `{result['command']}`"
        lines += [" ".join([f"Intervals: {result['interval']}.", *left_out, *still, made]), ""]
    return lines


# ---- pictures --------------------------------------------------------------------------------------------------------


def text(x: float, y: float, value: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"' + (f' class="{kind}"' if kind else "") + f">{escape(value)}</text>"


def points(result: dict[str, Any], cost_at: int) -> list[dict[str, Any]]:
    """What is drawn in a panel: number, cost, change of perplexity with its ends, kind."""
    names = list(dict.fromkeys(row["name"] for row in result["rows"] if "cost_at" in row))
    found = []
    for row in result["rows"]:
        against = row.get("against_largest_dense")
        if row.get("cost_at") == cost_at and against is not None:
            value = {
                "number": names.index(row["name"]) + 1,
                "x": row["cost"][str(cost_at)],
                "y": against["loss"]["gap"],
            }
            value |= {n: against["loss"][n] for n in ("low", "high")}
            found.append(value | {"kind": "rival" if row["rival"] else "ours"})
    return found


def span(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    more = margin * ((high - low) or max(abs(high), 1.0))
    return low - more, high + more


def panel(found: list[dict[str, Any]], left: float, width: float, head: str) -> list[str]:
    xs = span([p["x"] for p in found], 0.12)
    ys = span([v for p in found for v in (p["y"], p["low"], p["high"]) if v is not None] + [0.0], 0.08)
    bottom = TOP + HEIGHT

    def at(x: float, y: float) -> tuple[float, float]:
        return left + width * (x - xs[0]) / (xs[1] - xs[0]), bottom - HEIGHT * (y - ys[0]) / (ys[1] - ys[0])

    lines = [
        text(left, TOP - 12, head, "head"),
        f'<path class="axis" d="M{left:g} {TOP:g} V{bottom:g} H{left + width:g}"/>',
    ]
    for value in (ys[0], (ys[0] + ys[1]) / 2, ys[1]):
        lines.append(text(left - 6, at(xs[0], value)[1] + 4, f"{value:+.2f} %", "note end"))
    for value in sorted({min(p["x"] for p in found), max(p["x"] for p in found)}):
        lines.append(text(at(value, 0)[0], bottom + 16, f"{value:.0f}", "note middle"))
    front = [at(found[i]["x"], found[i]["y"]) for i in stats.pareto([(p["x"], p["y"]) for p in found])]
    lines.append('<path class="front" d="M' + " L".join(f"{x:.1f} {y:.1f}" for x, y in front) + '"/>')
    for p in found:
        x, y = at(p["x"], p["y"])
        if p["low"] is not None:
            ends = (at(p["x"], p[n])[1] for n in ("low", "high"))
            lines.append(f'<path class="{p["kind"]}" d="M{x:.1f} ' + " V".join(f"{e:.1f}" for e in ends) + '"/>')
        lines.append(f'<circle class="mark {p["kind"]}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
        lines.append(text(x + 7, y + 4, str(p["number"])))
    return lines


def picture(result: dict[str, Any]) -> str | None:
    """None if no row can be drawn yet."""
    panels = {n: points(result, n) for n in sorted({row["cost_at"] for row in result["rows"] if "cost_at" in row})}
    panels = {n: found for n, found in panels.items() if found}
    if not panels:
        return None
    names = list(dict.fromkeys(row["name"] for row in result["rows"] if "cost_at" in row))
    rivals = {row["name"] for row in result["rows"] if row.get("rival")}
    legend = TOP + HEIGHT + 58
    height = legend + 18 * ((len(names) + 1) // 2) + 12
    width = (WIDTH - LEFT - 20 - GAP * (len(panels) - 1)) / len(panels)
    heading = title(result)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" aria-labelledby="title">',
        f'<title id="title">{escape(heading)}</title>',
        f"<style>{STYLE}</style>",
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        text(20, 30, heading, "title"),
        text(
            20, legend - 24, "x: cost in dense sequences; y: change of perplexity against the dearest dense run", "note"
        ),
    ]
    for i, (cost_at, found) in enumerate(panels.items()):
        head = f"measured costs at {in_thousands(cost_at)} tokens"
        parts += panel(found, LEFT + i * (width + GAP), width, head)
    for i, name in enumerate(names):
        x, y = 20 + (i % 2) * WIDTH / 2, legend + 18 * (i // 2)
        kind = "rival" if name in rivals else "ours"
        parts.append(f'<circle class="{kind}" cx="{x + 4:g}" cy="{y - 4:g}" r="4"/>')
        parts.append(text(x + 14, y, f"{i + 1}  {name}"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def made() -> Iterator[tuple[Path, str]]:
    for name, result in studies().items():
        if (drawn := picture(result)) is not None:
            yield IMAGES / f"{name}.svg", drawn


def main(arguments: Sequence[str] | None = None) -> int:
    return publish(__doc__, made, arguments)


if __name__ == "__main__":
    sys.exit(main())
