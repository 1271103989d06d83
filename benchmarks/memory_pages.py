"""Tables of what steps take of memory, and of the paper's models; `summary.py` puts them into the pages."""

from __future__ import annotations

from typing import Any

from page_tables import Table, in_thousands


def saved(row: dict[str, Any]) -> str:
    """What a step recomputed, and the layers whose rows waited in host memory."""
    layers = row.get("offload", 0)
    if isinstance(layers, str) and layers != "all":  # within a budget
        return f"{row['recompute']}, offload {layers}"
    return row["recompute"] + (f", {layers} layers offloaded" if layers else "")


def paper(result: dict[str, Any]) -> Table:
    """benchmarks/paper.py: the paper's models at its lengths, ours against LoRA and the paper's own ratio."""
    header = ["model", "tokens", "", "kept", "step", "LoRA's time / ours", "peak", "LoRA's / ours", "the paper's"]
    rows = [
        [
            row["model"],
            in_thousands(row["context"]),
            row["method"] if row["row"] in ("peer", "lemo") else f"lemo, {row['row']}",
            f"{row['kept']:.2f}" if "kept" in row else "",
            f"{row['step_ms']:,.0f} ms" if "step_ms" in row else "refused" if row.get("refused") else row["error"],
            f"{row['time_times']:.2f} x" if "time_times" in row else "",
            f"{row['peak_mib']:,} MiB" if "peak_mib" in row else "",
            f"{row['memory_times']:.2f} x" if "memory_times" in row else "",
            f"{row['paper_memory_times']:.2f} x" if "paper_memory_times" in row and row["row"] != "peer" else "",
        ]
        for row in result["rows"]
    ]
    title = (
        "**The paper's models, nothing recomputed** (against transformers + PEFT; the paper's ratios: from its logs)"
    )
    return title, header, rows


def estimates(result: dict[str, Any]) -> Table:
    """benchmarks/memory.py estimate."""
    header = ["setting", "tokens", "recomputed", "estimate", "measured", "error"]
    rows = [
        [
            row["setting"],
            in_thousands(row["context"]),
            row["budget"] or saved(row),
            f"{row['estimate_mib']:,} MiB",
            f"{row['measured_mib']:,} MiB" if "measured_mib" in row else "",
            f"{row['error']:+.1%}" if "error" in row else "",
        ]
        for row in result["rows"]
    ]
    title = "**`lemo estimate` against the measured peak** (a budget: what every layer saves is chosen within it)"
    return title, header, rows


def growth(result: dict[str, Any]) -> Table:
    """benchmarks/memory.py growth."""
    header = ["", "recomputed", "steps", "allocated", "growth", "reserved", "growth"]
    rows = [
        [
            row["row"],
            saved(row),
            str(row["steps"]),
            f"{row['live_mib']:,.0f} MiB",
            f"{row['live_growth_bytes'] / 2**20:+.2f} MiB",
            f"{row['reserved_mib']:,.0f} MiB",
            f"{row['reserved_growth_bytes'] / 2**20:+.2f} MiB",
        ]
        for row in result["rows"]
    ]
    longest = in_thousands(result["rows"][0]["context"])
    title = f"**Memory over steps of varying lengths up to {longest} tokens** (between the first step and the last)"
    return title, header, rows


def quantized(result: dict[str, Any]) -> Table:
    """benchmarks/quantized.py: a base of 4 bits, at the longest context that Unsloth publishes for a size of GPU."""
    header = ["GPU's memory", "tokens", "", "step", "peak", "reserved", "offloaded layers", "host memory"]
    rows = []
    for row in result["rows"]:
        memory = row.get("memory", {})
        longest = "" if row["context"] == row["unsloth_context"] else " (lemo's longest)"
        rows.append(
            [
                f"{row['gpu_gb']} GB" if row["gpu_gb"] else "",
                f"{row['context']:,}{longest}",
                row["phase"] + " 0.5" * (row["phase"] == "skip"),
                f"{row['step_ms'] / 1000:.1f} s" if "step_ms" in row else row["error"],
                f"{row['peak_mib']:,} MiB" if "peak_mib" in row else "",
                f"{row['reserved_mib']:,} MiB" if "reserved_mib" in row else "",
                str(memory.get("offloaded", "")),
                f"{memory['host_bytes'] / 2**30:.1f} GiB" if memory.get("host_bytes") else "",
            ]
        )
    shape = f"{result['rows'][0]['model']}, rank {result['rows'][0]['rank']} on every linear layer"
    title = (
        f"**A base of 4 bits within a GPU's memory** ({shape}; lengths: the longest that Unsloth publishes, and lemo's)"
    )
    return title, header, rows
