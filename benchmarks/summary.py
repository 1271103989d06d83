"""Writes the measured figures of benchmarks/results/ into README.md and docs/performance.md, between their markers.

No figure in those pages is typed by hand, and a test fails where a page and the result files differ.

  python benchmarks/summary.py            # rewrite the pages
  python benchmarks/summary.py --check    # exit 1 where a page is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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


def activation() -> list[str]:
    name = "activation-h200"
    if (result := load(name)) is None:
        return []
    lines = ["**One LoRA step, Llama-3-8B shape, no recomputation** (both in one call)", ""]
    rows = [
        [
            row["method"] + (f", {row['mode']} {row['keep']:g}, policy {row['policy']}" if "keep" in row else ""),
            f"{row['context']:,}",
            f"{row['step_ms']:.0f} ms",
            f"{row['time_ratio']:.2f} x",
            f"{row['activation_mib']:,} MiB",
            f"{row['activation_ratio']:.2f} x",
        ]
        for row in result["rows"]
    ]
    header = ["", "tokens", "step", "time", "activations (peak - weights)", "ratio"]
    return [*lines, *markdown(header, rows), "", source(name, result), ""]


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


def operations() -> list[str]:
    """Attention is left out: it has tables of its own."""
    if (result := load("ops-h200")) is None:
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
        if not row["op"].startswith("attention")
    ]
    header = ["op", "case", "ms", "peer", "peer ms", "ratio", "rate"]
    return [*markdown(header, rows), "", "Ratio above 1: ours is faster. " + source("ops-h200", result), ""]


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
    return [*lines, "Ratio above 1: ours is faster. " + source(name, result), ""]


def blocks_table(rows: list[dict[str, Any]], name: str) -> list[str]:
    """Speed-up over dense cuDNN by kept share, the ideal beside it; then the other peers."""
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
    """Both passes beside the faster dense peer of PyTorch and FlashAttention-4, one line per size."""
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


def blocks() -> dict[Path, list[str]]:
    return {
        ROOT / "README.md": [
            *activation(),
            *attention_in_short("attention-h100"),
            *quality(),
            *recall(),
            *equivalence(),
        ],
        ROOT / "docs" / "performance.md": [
            *operations(),
            *attention("attention-h100"),
            *tiles(),
        ],
    }


def rewritten(page: Path, lines: list[str]) -> str:
    begin, end = "<!-- measured: benchmarks/summary.py -->", "<!-- end of measured -->"
    head, rest = page.read_text().split(begin)
    tail = rest.split(end)[1]
    return head + begin + "\n" + "\n".join(lines) + end + tail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for page, lines in blocks().items():
        text = rewritten(page, lines)
        if text != page.read_text():
            stale.append(page.name)
            if not args.check:
                page.write_text(text)
    if stale:
        print(("out of date: " if args.check else "rewritten: ") + ", ".join(stale))
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
