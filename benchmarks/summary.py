"""Writes the measured figures of benchmarks/results/ into the pages, between their markers.

README.md has the headline table (<!-- headline: ... -->), docs/results.md every table (<!-- measured: ... -->). No
figure between markers is typed by hand, and a test fails if a page and the results files differ.

  python benchmarks/summary.py            # rewrite the pages
  python benchmarks/summary.py --check    # exit 1 if a page is out of date
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import attention_pages
import memory_pages
import quality_pages
import step_pages
from page_tables import ROOT, in_thousands, left_out, load, markdown, measured_table, peer_cells, source
from publish import publish

ATTENTION = ("attention-h200", "attention-h100")
# Drawn by curves.py.
CONTEXTS = [
    "![A LoRA step by context, from 8K to 1M tokens: time, peak memory and tokens per second](images/contexts.svg)",
    "",
]


def equivalence() -> list[str]:
    lines = []
    for name in ("equivalence-cpu", "equivalence-h200"):
        if (result := load(name)) is None:
            continue
        worst = max(row["error"] / row["limit"] for row in result["rows"])
        kinds = sorted({f"{row['family']} {row['dtype']}" for row in result["rows"]})
        passed = sum(row["ok"] for row in result["rows"])
        lines.append(
            f"- {', '.join(kinds)}: {passed} of {len(result['rows'])} within the limit, worst at {worst:.2f} of it "
            f"({source(name, result)})"
        )
    if not lines:
        return []
    title = "**Everything kept = the dense model** (logits and LoRA gradients; limits: 1e-5 in fp32, twice the dense "
    return [title + "model's own error in bf16)", "", *lines, ""]


def quality() -> list[str]:
    """Both settings in one table, a row per way of training."""
    results = {setting: load(f"quality-{setting}") for setting in "AB"}
    rows = {setting: {row["name"]: row for row in result["rows"]} for setting, result in results.items() if result}
    if not rows:
        return []

    def mean(setting: str, name: str) -> str:
        row = rows.get(setting, {}).get(name, {})
        return f"{row['gap_percent']:+.1f} %" if "gap_percent" in row else ""

    def code(name: str) -> str:
        of = {n: row["perplexity"]["code"] for n, row in rows.get("B", {}).items() if "perplexity" in row}
        return f"{100 * (of[name] / of['dense'] - 1):+.1f} %" if name in of and "dense" in of else ""

    names = dict.fromkeys(name for named in rows.values() for name in named)
    first = {name: next(named[name] for named in rows.values() if name in named) for name in names}
    table = [
        [name, str(row["steps"]), f"{row['cost']:g}", mean("A", name), mean("B", name), code(name)]
        for name, row in first.items()
    ]
    header = ["training", "steps", "cost in dense steps", "A", "B", "B, code alone"]
    lines = [
        "**Adapter quality, a 46M-parameter Llama, keep 0.5** (perplexity of the dense model with the adapter, against "
        "dense LoRA; mean over nine domains; one seed). A: context extension, 2048 to 8192. B: adaptation to unseen "
        "code, whose mean counts what is forgotten elsewhere. Cost is in the time of dense steps of Llama-3-8B at 64K "
        "tokens and leaves out choosing blocks, which for `exact` is about an attention.",
        "",
        *markdown(header, table),
        "",
    ]
    return [*lines, *(f"{source(f'quality-{s}', r)}\n" for s, r in results.items() if r)]


def recall() -> list[str]:
    name = "recall-lm46"
    if (result := load(name)) is None:
        return []
    rows = [
        [
            row.get("reading", "dense"),
            f"{row['keep']:g}",
            f"{100 * row['recall']:.1f} %",
            f"{100 * row['position_recall']:.1f} %",
        ]
        for row in result["mean"]
    ]
    header = ["activations", "keep", "recall", "recall of the earliest blocks, no predictor"]
    title = "**Predictors, recall of the blocks that exact scores keep** (dev text, mean over layers)"
    return [title, "", *markdown(header, rows), "", source(name, result), ""]


def sparse_loss() -> list[str]:
    name = "sparse-smollm2"
    if (result := load(name)) is None:
        return []

    def with_half(value: float, half: float | None) -> str:
        return f"{value:+.3f}" + (f" ± {half:.3f}" if half is not None else "")

    rows = [
        [
            row["limit"],
            row["policy"],
            f"{100 * row['computed']:.1f} %",
            f"{100 * row['covered']:.1f} %" if row["covered"] is not None else "",
            f"{row['loss']:.3f}",
            with_half(row["excess"], row["excess_half"]) if row["policy"] else "",
            with_half(row["over_default"], row["over_half"]) if row["over_default"] else "",
        ]
        for row in result["rows"]
    ]
    same = result["settings"]
    header = ["limit", "tile policy", "pairs of tiles", "attention covered, by the policy", "loss", "more than exact"]
    header.append("more than the default policy")
    several = same["documents"] > 1
    title = (
        f"**SmolLM2-135M in mode `sparse`, without training** (loss of {same['documents']} document{'s' * several} of "
        f"{in_thousands(same['context'])} tokens of source code"
        f"{'; 95 % intervals over documents, paired' * several})"
    )
    return [title, "", *markdown(header, rows), "", source(name, result), ""]


def tile_coverage(name: str) -> list[str]:
    """A row per score; columns by density, lists of the whole layer and of key/value heads, and the worst layer."""
    if (result := load(name)) is None:
        return []
    found = {(row["score"], row["heads"], row["density"]): row for row in result["mean"]}
    densities = list(dict.fromkeys(row["density"] for row in result["mean"]))

    def cells(score: str, density: float) -> list[str]:
        shared, grouped = (found[score, heads, density] for heads in ("shared", "grouped"))
        values = shared["covered"], grouped["covered"], shared["worst_layer"]
        return [f"{100 * value:.1f} %" for value in values]

    rows = [
        [score, *itertools.chain(*(cells(score, density) for density in densities))]
        for score in dict.fromkeys(row["score"] for row in result["rows"])
    ]
    kinds = ("shared", "grouped", "worst layer, shared")
    header = ["score", *(f"{density:g} of the tiles, {kind}" for density in densities for kind in kinds)]
    settings = result["settings"]
    title = (
        f"**Attention mass that chosen key tiles hold** ({result['model']}, {settings['documents']} documents of "
        f"{settings['context']:,} tokens, tiles of {settings['tile']} rows, mean over layers; one list for a layer's "
        "heads, or one per key/value head)"
    )
    notes = source(name, result)
    if (calibration := settings.get("calibration")) is not None:
        notes = (
            f"Predictors: {calibration['documents']} other documents of {calibration['context']:,} tokens, "
            f"{calibration['steps']} steps, {calibration['parameters'] / 1e6:.1f} million parameters; one list for a "
            f"layer's heads in both columns. {notes}"
        )
    return [title, "", *markdown(header, rows), "", notes, ""]


def operations(name: str, only: str | None = None) -> list[str]:
    """One operator alone, or all but attention, which has separate tables."""
    if (result := load(name)) is None:
        return []
    rows = [
        [
            row["op"],
            row["case"],
            f"{row['ms']:.3f}",
            *peer_cells(row),
            f"{row['tflops']:.0f} TFLOP/s"
            if row.get("tflops")
            else f"{row['gb_per_s']} GB/s"
            if row.get("gb_per_s")
            else "",
        ]
        for row in result["rows"]
        if (row["op"] == only if only else not row["op"].startswith("attention"))
    ]
    header = ["op", "case", "ms", "peer", "peer ms", "ratio", "rate"]
    floors = [
        f"Of the time of `{row['op']}`, {row['ratio']:.0%} is what {row['peer']} take."
        for row in result["rows"]
        if row.get("floor")
    ]
    text = " ".join(["Ratio above 1: ours is faster.", *floors, *left_out(result), source(name, result)])
    return [*markdown(header, rows), "", text, ""]


def pages() -> list[tuple[Path, str, list[str]]]:
    """Page, kind of marker, and the lines between."""
    found = step_pages.headline()
    head = [*step_pages.headline_table(), "", *step_pages.offloaded()]
    everything = [
        *([] if found is None else [f"![{found.title}: time and {found.memory}](images/step.svg)", ""]),
        *CONTEXTS,
        *step_pages.steps(),
        *measured_table("paper-h200", memory_pages.paper),
        *measured_table("memory-estimate-h200", memory_pages.estimates),
        *measured_table("memory-growth-h200", memory_pages.growth),
        *measured_table("quantized-h200", memory_pages.quantized),
        *measured_table("quantized-40-h200", memory_pages.quantized),
        *step_pages.several_gpus(),
        *measured_table("small-h200", step_pages.small),
        *itertools.chain(*map(attention_pages.in_short, ATTENTION)),
        *quality(),
        *quality_pages.tables(),
        *recall(),
        *sparse_loss(),
        *tile_coverage("coverage-smollm2"),
        *tile_coverage("coverage-lm46"),
        *equivalence(),
        *operations("ops-h200"),
        *operations("ops-loss-h200", "linear_cross_entropy"),
        *itertools.chain(*map(attention_pages.cases, ATTENTION)),
        *measured_table("attention-lists-h200", attention_pages.lists),
        *measured_table("attention-options-h200", attention_pages.options),
        *attention_pages.tiles(),
    ]
    return [
        (ROOT / "README.md", "headline", [*head, *step_pages.long_contexts()]),
        (ROOT / "docs" / "results.md", "measured", everything),
    ]


def rewritten(page: Path, kind: str, lines: list[str]) -> str:
    """The page with `lines` between its markers. Raises SystemExit unless it has one pair of them."""
    begin, end = f"<!-- {kind}: benchmarks/summary.py -->", f"<!-- end of {kind} -->"
    text = page.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{page.name}: expected one line {begin} and, after it, one line {end}")
    head, rest = text.split(begin)
    return head + begin + "\n" + "\n".join(lines) + end + rest.split(end)[1]


def main() -> int:
    return publish(__doc__, lambda: ((page, rewritten(page, kind, lines)) for page, kind, lines in pages()))


if __name__ == "__main__":
    sys.exit(main())
