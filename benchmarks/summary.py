"""Writes the measured figures of benchmarks/results/ into the pages, between their markers.

README.md has the headline table (<!-- headline: ... -->), docs/results.md every table (<!-- measured: ... -->). No
figure between markers is typed by hand, and a test fails if a page and the results files differ.

  python benchmarks/summary.py            # rewrite the pages
  python benchmarks/summary.py --check    # exit 1 if a page is out of date
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory_pages
import quality_pages
from memory_pages import in_thousands, saved
from publish import publish

ROOT = Path(__file__).resolve().parents[1]
ATTENTION = ("attention-h200", "attention-h100")
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]


def source(name: str, result: dict[str, Any]) -> str:
    gpu, versions = result["gpu"], result["versions"]
    return (
        f"`benchmarks/results/{name}.json`: {gpu}, torch {versions['torch']}, commit {result['commit']}, "
        f"{result['date'][:10]}; `{result['command']}`" + (f". {result['note']}" if "note" in result else "")
    )


# --- one LoRA step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Headline:
    """The rows that README and the figure show. Ratios are better for lemo above 1 (faster) and below 1 (memory).

    bars: label, milliseconds, MiB, times faster than the first bar, share of its memory.
    """

    title: str
    memory: str
    bars: list[tuple[str, float, int, float, float]]
    source: str


# Drawn by curves.py.
CONTEXTS = [
    "![A LoRA step by context, from 8K to 1M tokens: time, peak memory and tokens per second](images/contexts.svg)",
    "",
]
SHOWN = ("peer", "dense", "sparse-8k-keys", "skip-0.5", "skip-0.3", "backward-0.5")


def label(row: dict[str, Any]) -> str:
    """What a row of a step is called in tables and the figure."""
    if row["method"] != "lemo":
        return row["method"]
    if row["mode"] == "dense":
        return "lemo, nothing eliminated"
    if row["mode"] == "sparse":
        limit = f"{in_thousands(row['keys'])} keys" if row["keys"] else f"{row['density']:g}"
        return f"lemo, `sparse` {limit}" + (f", keep {row['keep']:g}" if row["keep"] < 1 else "")
    return f"lemo, `{row['mode']}` {row['keep']:g}" + " weighted" * row.get("weighted", False)


def step_results() -> dict[str, dict[str, Any]]:
    """By name, the newest first."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("step-*.json"))}
    return dict(sorted(found.items(), key=lambda item: item[1]["date"], reverse=True))


def headline() -> Headline | None:
    """Steps of an 8B model at 64K tokens, everything recomputed: of the file with the most rows, the newest of them."""
    found: list[tuple[int, Headline]] = []
    for name, result in step_results().items():
        rows = {
            row["row"]: row
            for row in result["rows"]
            if (row["context"], row["recompute"], row["model"]) == (65536, "full", "llama3-8b")
            and not row.get("offload")
            and "Liger" in row.get("peer", "")
            and {"time_ratio", "memory_ratio"} <= row.keys()
        }
        if {"peer", "dense"} <= rows.keys():
            bars = [
                (label(row), row["step_ms"], row["peak_mib"], row["time_ratio"], row["memory_ratio"])
                for row in (rows[name] for name in SHOWN if name in rows)
            ]
            title = "One LoRA step of a Llama-3-8B shape at 64K tokens, everything recomputed"
            found.append((len(bars), Headline(title, "peak memory", bars, source(name, result))))
    return max(found, key=lambda item: item[0])[1] if found else None  # the first of equals is the newest


def offloaded() -> list[str]:
    """The headline's rows with attention's output, or everything, saved in host memory, in a separate run."""
    for name, result in step_results().items():
        rows = [
            row
            for row in result["rows"]
            if (row["context"], row["model"]) == (65536, "llama3-8b")
            and ("Liger" in row["method"] or (row["recompute"] in ("attention", "none") and row.get("offload")))
            and {"time_ratio", "memory_ratio"} <= row.keys()
        ]
        if {"peer", "dense"} <= {row["row"] for row in rows}:
            cells = [
                [
                    label(row) + ', `recompute="none"`' * (row["method"] == "lemo" and row["recompute"] == "none"),
                    f"{row['step_ms'] / 1000:.2f} s",
                    f"{row['time_ratio']:.2f} x",
                    f"{row['peak_mib'] / 1024:.1f} GiB",
                    f"{row['memory_ratio']:.2f} x",
                    f"{row['host_mib'] / 1024:.1f} GiB" if row.get("host_mib") else "",
                ]
                for row in (row for name in SHOWN for row in rows if row["row"] == name)
            ]
            title = "**The same with attention's output saved, and saved rows in pinned host memory** (`offload=True`, "
            title += '`recompute="attention"`; the peer as above)'
            header = ["", "step", "faster", "peak memory", "of the peer's", "host memory"]
            return [title, "", *markdown(header, cells), "", source(name, result), ""]
    return []


def alike(row: dict[str, Any]) -> tuple[Any, ...]:
    """What steps have in common whose times are compared."""
    return row["context"], row["recompute"], bool(row.get("offload")) and row["method"] == "lemo"


def long_contexts() -> list[str]:
    """Mode "sparse" with a fixed number of keys, from 64K tokens on, against the steps of the same run.

    Of files that measured the same step the first counts: those with a peer come before those of costs."""
    results = step_results() | {
        path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("costs-*.json"))
    }
    rows, sources, shown = [], [], set()
    for name, result in results.items():
        of = [r for r in result["rows"] if "step_ms" in r and r["model"] == "llama3-8b"]
        for row in of:
            where = bool(row.get("offload"))
            setting = (row["context"], row["keep"], row["keys"], where) if row.get("keys") else None
            if row["mode"] != "sparse" or setting is None or row["context"] < 65536 or setting in shown:
                continue
            shown.add(setting)
            same = [r for r in of if alike(r) == alike(row)]
            peer = next((r for r in same if "Liger" in r["method"] and "step_ms" in r), None)
            dense = next((r for r in same if r["method"] == "lemo" and r["mode"] == "dense"), None)
            ratios = [f"{r['step_ms'] / row['step_ms']:.2f} x" if r else "" for r in (peer, dense)]
            tokens = in_thousands(row["context"]) if row["context"] < 1 << 20 else f"{row['context'] >> 20}M"
            what = label(row) + ", saved rows in host memory" * where
            cells = [tokens, what, f"{row['step_ms'] / 1000:.1f} s", *ratios, f"{row['peak_mib'] / 1024:.0f} GiB"]
            rows.append((row["context"], row["keep"] < 1, where, cells))
            sources.append(source(name, result))
    if not rows:
        return []
    header = ["tokens", "", "step", "faster than Liger", "than dense lemo", "peak memory"]
    cells = [cells for *_, cells in sorted(rows, key=lambda row: row[:3])]
    lines = ["**The longer the context, the more `sparse` saves** (8K keys a query, one step of the same shape)", ""]
    return [*lines, *markdown(header, cells), "", *(line for s in dict.fromkeys(sources) for line in (s, ""))]


def headline_table() -> list[str]:
    if (found := headline()) is None:
        return []
    rows = [
        [name, f"{ms / 1000:.2f} s", f"{faster:.2f} x", f"{mib / 1024:.1f} GiB", f"{share:.2f} x"]
        for name, ms, mib, faster, share in found.bars
    ]
    header = ["", "step", "faster", found.memory, "of the peer's"]
    return [f"**{found.title}**", "", *markdown(header, rows), "", found.source]


def steps() -> list[str]:
    """Every row of benchmarks/step.py, a table per file."""
    lines = []
    for name, result in step_results().items():
        rows = [
            [
                in_thousands(row["context"]),
                saved(row),
                label(row),
                row["policy"] or "",
                "out of memory" if "error" in row else f"{row['step_ms']:,.0f} ms",
                f"{row['time_ratio']:.2f} x" if "time_ratio" in row else "",
                f"{row['dense_ratio']:.2f} x" if "dense_ratio" in row else "",
                f"{row['peak_mib']:,} MiB" if "peak_mib" in row else "",
                f"{row['memory_ratio']:.2f} x" if "memory_ratio" in row else "",
                f"{row['peak_mib'] - row['before_mib']:,} MiB" if {"peak_mib", "before_mib"} <= row.keys() else "",
            ]
            for row in result["rows"]
        ]
        models = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
        header = [
            "tokens",
            "recomputed",
            "",
            "policy",
            "step",
            "peer's time / ours",
            "dense lemo's / ours",
            "peak",
            "ours / peer's",
            "peak - weights",
        ]
        lines += [f"**One LoRA step, {models}, {result['gpu']}** (forward, backward, AdamW; in one process)", ""]
        checked = result["check"]
        what = ""
        if checked is not None:
            what = (
                f"With nothing eliminated, loss and gradients differed from the peer's by {checked['loss_error']:.1e} "
                f"and {checked['gradient_error']:.1e} at {in_thousands(checked['context'])} tokens."
            )
        lines += [
            *markdown(header, rows),
            "",
            " ".join(filter(None, [what, *left_out(result), source(name, result)])),
            "",
        ]
    return lines


def left_out(result: dict[str, Any]) -> list[str]:
    """Rows and peers that the file lacks, with the reasons; those with the same reason are named together."""
    reasons: dict[str, list[str]] = {}
    for row in result.get("left_out", []):
        reasons.setdefault(row["reason"].rstrip("."), []).append(row["row"])
    return [f"Left out: {', '.join(rows)}: {reason}." for reason, rows in reasons.items()]


def measured_table(name: str, make: Callable[[dict[str, Any]], memory_pages.Table]) -> list[str]:
    """A table of a results file, if it exists."""
    if (result := load(name)) is None:
        return []
    title, header, rows = make(result)
    return [title, "", *markdown(header, rows), "", source(name, result), ""]


def several_gpus() -> list[str]:
    """All files of benchmarks/scaling.py as one table."""
    parts = {"ddp": "DDP, a document each", "fsdp": "FSDP2, a document each", "sequence": "one document, divided"}
    rows, sources = [], []
    for path in sorted(RESULTS.glob("scaling-*.json")):
        result = json.loads(path.read_text())
        sources.append(source(path.stem, result))
        for row in result["rows"]:
            cells = [parts[row["part"]], f"`{row['row']}`", in_thousands(row["context"]), str(row["processes"])]
            cells += [f"{row['step_ms']:,.0f} ms", f"{row['tokens_per_second']:,.0f}"]
            cells += [f"{row['speedup']:.2f} x", f"{row['efficiency']:.1%}", f"{row['peak_mib']:,} MiB"]
            rows.append(cells)
    if not rows:
        return []
    title = (
        "**Several GPUs of one host**, a Llama-3-8B shape, everything recomputed (tokens of a document; the "
        "rate of all GPUs against that of one in the same run)"
    )
    header = ["", "step", "tokens", "GPUs", "time", "tokens per second", "rate", "of a GPU's share", "largest peak"]
    return [title, "", *markdown(header, rows), "", *itertools.chain(*zip(sources, [""] * len(sources), strict=True))]


# --- everything else --------------------------------------------------------------------------------------------------


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


def peer_cells(row: dict[str, Any]) -> list[str]:
    return [row["peer"], f"{row['peer_ms']:.3f}", f"{row['ratio']:.2f}"]


def attention(name: str) -> list[str]:
    """The cases of benchmarks/attention.py, each as a table; kept shares of 10 % to 100 % as one row per block size."""
    if (result := load(name)) is None:
        return []
    rows = result["rows"]
    lines = [f"### Attention, {result['gpu']}, bf16, 32/8 heads", ""]
    titles = {
        "packed": "One causal document, everything kept",
        "fallback": "The same by the kernels for sm_80, on this GPU",
        "padded": "One causal document (peers also: lemo at a wider head_dim, inputs filled up with zeros before)",
        "deterministic": "One causal document, deterministic backward pass",
        "given": "Backward over kept queries and keys, output and LSE given, key weights (peers: dense backward)",
        "lists": "Key lists per tile of queries (keep: share of the causal tiles)",
        "scores": "Block scores (peer: half the time of our forward pass, which does twice the operations)",
    }
    header = ["tokens", "head_dim", "keep", "pass", "ms", "TFLOP/s", "peer", "peer ms", "ratio"]
    for case, title in titles.items():
        chosen = [
            [
                f"{row['n']:,}",
                str(row["head_dim"]),
                f"{row['keep']:g}",
                row["pass"],
                f"{row['ms']:.3f}",
                f"{row['tflops']:.0f}",
                *peer_cells(row),
            ]
            for row in rows
            if row["case"] == case
        ]
        if chosen:
            lines += [f"**{title}**", "", *markdown(header, chosen), ""]
    found = [row for row in rows if row["case"] == "blocks"]
    if found:
        lines += blocks_table(found, name)
    text = " ".join(["Ratio above 1: ours is faster.", *left_out(result), source(name, result)])
    return [*lines, text, ""]


def blocks_table(rows: list[dict[str, Any]], name: str) -> list[str]:
    """Speed-up over dense cuDNN by kept share, with the ideal; then the other peers."""
    keeps = sorted({row["keep"] for row in rows})
    lines = ["**Blocks kept at random, at original offsets, 16K tokens, head_dim 128: speed-up over dense cuDNN**", ""]
    table = [["ideal, 1 / keep²", "", *(f"{keep**-2:.1f}" for keep in keeps)]]
    for kind in ("forward", "backward"):
        for block in sorted({row["block"] for row in rows}):
            ratio = {
                row["keep"]: row["ratio"]
                for row in rows
                if (row["pass"], row["block"], row["peer"]) == (kind, block, "cudnn")
            }
            table.append([kind, str(block), *(f"{ratio[keep]:.2f}" if keep in ratio else "" for keep in keeps)])
    lines += [*markdown(["pass", "block", *(f"keep {keep:g}" for keep in keeps)], table), ""]
    if (RESULTS / f"{name}.png").exists():
        lines += [f"![Speed-up over dense cuDNN by kept share](../benchmarks/results/{name}.png)", ""]
    others = [
        [row["pass"], str(row["block"]), f"{row['keep']:g}", f"{row['ms']:.3f}", *peer_cells(row)]
        for row in rows
        if row["peer"] != "cudnn" and row["keep"] in (0.5, 1.0)
    ]
    return [*lines, *markdown(["pass", "block", "keep", "ms", "peer", "peer ms", "ratio"], others), ""]


def tiles() -> list[str]:
    """What benchmarks/tune.py measured, a table per kernel and head_dim."""
    lines: list[str] = []
    for path in sorted(RESULTS.glob("tune-*.json")):
        result = json.loads(path.read_text())
        sizes = [key for key in result["rows"][0] if key not in ("row", "library", "share")]
        rows = [
            [
                f"{row['row']} (the library's)" if row["library"] else row["row"],
                *(f"{row[size]:.0f}" for size in sizes),
                f"{row['share']:.3f}",
            ]
            for row in result["rows"]
        ]
        lines += [f"**Tiles, attention {result['kind']}, head_dim {result['head_dim']}: {result['rates']}**", ""]
        lines += [*markdown(["row", *sizes, "least share of the best"], rows), "", source(path.stem, result), ""]
    return lines


def attention_in_short(name: str) -> list[str]:
    """Both passes against the faster dense peer of PyTorch and FlashAttention-4, one line per size."""
    if (result := load(name)) is None:
        return []
    titles = {
        ("packed", None, 1.0): "everything kept",
        ("padded", None, 1.0): "everything kept",
        ("blocks", 64, 1.0): "blocks of 64 at original offsets, all kept",
        ("blocks", 64, 0.5): "blocks of 64 at original offsets, half kept at random",
        ("given", 64, 0.5): "mode `backward`, half kept, weighted",
    }
    lines = []
    for (case, block, keep), title in titles.items():
        chosen = [row for row in result["rows"] if (row["case"], row.get("block"), row["keep"]) == (case, block, keep)]
        for head_dim, n in dict.fromkeys((row["head_dim"], row["n"]) for row in chosen):
            cells = [title, f"{n:,}", str(head_dim)]
            for kind in ("forward", "backward"):
                found = [r for r in chosen if (r["head_dim"], r["n"], r["pass"]) == (head_dim, n, kind)]
                torch = [row for row in found if row["peer"] in ("cudnn", "flash")]
                best = min(torch, key=lambda row: row["peer_ms"], default=None)
                cells += [f"{best['ms']:.2f} ms", f"{best['ratio']:.2f} x"] if best else ["", ""]
                cells.append(next((f"{row['ratio']:.2f} x" for row in found if row["peer"] == "flash 4"), ""))
            lines.append(cells)
    header = ["attention", "tokens", "head_dim", *(c for p in ("forward", "backward") for c in (p, "torch", "FA4"))]
    title = (
        "**Attention, bf16, 32/8 heads, causal.** Ratios above 1: lemo is faster than dense attention, torch being the "
        "faster of its cuDNN and FlashAttention-2 backends and FA4 the Hopper kernels of FlashAttention-4, in one run"
    )
    return [title, "", *markdown(header, lines), "", source(name, result), ""]


def pages() -> list[tuple[Path, str, list[str]]]:
    """Page, kind of marker, and the lines between."""
    found = headline()
    everything = [
        *([] if found is None else [f"![{found.title}: time and {found.memory}](images/step.svg)", ""]),
        *CONTEXTS,
        *steps(),
        *measured_table("paper-h200", memory_pages.paper),
        *measured_table("memory-estimate-h200", memory_pages.estimates),
        *measured_table("memory-growth-h200", memory_pages.growth),
        *several_gpus(),
        *itertools.chain(*map(attention_in_short, ATTENTION)),
        *quality(),
        *quality_pages.tables(),
        *recall(),
        *sparse_loss(),
        *tile_coverage("coverage-smollm2"),
        *tile_coverage("coverage-lm46"),
        *equivalence(),
        *operations("ops-h200"),
        *operations("ops-loss-h200", "linear_cross_entropy"),
        *itertools.chain(*map(attention, ATTENTION)),
        *tiles(),
    ]
    return [
        (ROOT / "README.md", "headline", [*headline_table(), "", *offloaded(), *long_contexts()]),
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
