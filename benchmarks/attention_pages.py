"""Tables of attention: in short, by case, by published models' options, by tile; `summary.py` puts them in pages."""

from __future__ import annotations

import json
from typing import Any

from page_tables import RESULTS, Table, in_thousands, left_out, load, markdown, peer_cells, source


def in_short(name: str) -> list[str]:
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


def cases(name: str) -> list[str]:
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
    for case, title in titles.items():
        if chosen := [case_cells(row) for row in rows if row["case"] == case]:
            lines += [f"**{title}**", "", *markdown(CASE_HEADER, chosen), ""]
    found = [row for row in rows if row["case"] == "blocks"]
    if found:
        lines += blocks_table(found, name)
    text = " ".join(["Ratio above 1: ours is faster.", *left_out(result), source(name, result)])
    return [*lines, text, ""]


CASE_HEADER = ["tokens", "head_dim", "keep", "pass", "ms", "TFLOP/s", "peer", "peer ms", "ratio"]


def case_cells(row: dict[str, Any]) -> list[str]:
    cells = [f"{row['n']:,}", str(row["head_dim"]), f"{row['keep']:g}", row["pass"]]
    return [*cells, f"{row['ms']:.3f}", f"{row['tflops']:.0f}", *peer_cells(row)]


def lists(result: dict[str, Any]) -> Table:
    """The case "lists" of benchmarks/attention.py, of a run of its own."""
    title = f"**Key lists per tile of queries, {result['gpu']}, bf16** (keep: share of the causal tiles)"
    return title, CASE_HEADER, [case_cells(row) for row in result["rows"]]


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


def options(result: dict[str, Any]) -> Table:
    """The case "options" of benchmarks/attention.py."""
    header = ["heads of", "tokens", "heads", "head_dim", "options", "pass", "ms", "TFLOP/s", "peer", "peer ms", "ratio"]
    rows = []
    for row in result["rows"]:
        named = [f"window {row['window']:,}"] if row["window"] else []
        named += ["sinks"] if row["sinks"] else []
        named += [f"soft-cap {row['softcap']:g}"] if row["softcap"] else []
        rows.append(
            [
                row["model"],
                in_thousands(row["n"]),
                f"{row['heads']}/{row['kv_heads']}",
                str(row["head_dim"]),
                ", ".join(named) or "none",
                row["pass"],
                f"{row['ms']:.3f}",
                f"{row['tflops']:.0f}",
                row["peer"],
                f"{row['peer_ms']:.3f}",
                f"{row['ratio']:.2f}",
            ]
        )
    title = (
        f"**Attention with windows, sinks, soft-caps and head_dim 256, {result['gpu']}, bf16, one causal document.** "
        "Ratio above 1: ours is faster; lemo sm_80 is our kernels for sm_80, on this GPU"
    )
    return title, header, rows


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
