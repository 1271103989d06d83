"""The table of attention at the heads and options of published models; `summary.py` puts it into the pages."""

from __future__ import annotations

from typing import Any

from memory_pages import Table, in_thousands


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
        "Ratio above 1: ours is faster; `lemo sm_80` is our kernels for sm_80, on this GPU"
    )
    return title, header, rows
