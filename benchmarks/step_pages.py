"""Tables of one LoRA step: the headline, all rows, long contexts, several GPUs, small models; `summary.py` puts
them into the pages."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from typing import Any

from memory_pages import saved
from page_tables import RESULTS, Table, in_thousands, left_out, markdown, source

SHOWN = ("peer", "dense", "sparse-8k-keys", "skip-0.5", "skip-0.3", "backward-0.5")
PEERS = ("peer-liger-offload", "peer-trl")


@dataclass(frozen=True)
class Headline:
    """The rows that README and the figure show. Ratios are better for lemo above 1 (faster) and below 1 (memory).

    bars: label, milliseconds, MiB, times faster than the first bar, share of its memory.
    """

    title: str
    memory: str
    bars: list[tuple[str, float, int, float, float]]
    source: str


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


def headline_table() -> list[str]:
    if (found := headline()) is None:
        return []
    rows = [
        [name, f"{ms / 1000:.2f} s", f"{faster:.2f} x", f"{mib / 1024:.1f} GiB", f"{share:.2f} x"]
        for name, ms, mib, faster, share in found.bars
    ]
    header = ["", "step", "faster", found.memory, "of the peer's"]
    return [f"**{found.title}**", "", *markdown(header, rows), "", found.source]


def offloaded() -> list[str]:
    """The headline's rows with attention's output saved in host memory, in a separate run."""
    for name, result in step_results().items():
        rows = [
            row
            for row in result["rows"]
            if (row["context"], row["model"]) == (65536, "llama3-8b")
            and (row["method"] != "lemo" or (row["recompute"] == "attention" and row.get("offload")))
            and {"time_ratio", "memory_ratio"} <= row.keys()
        ]
        if {"peer", "dense"} <= {row["row"] for row in rows}:
            cells = [
                [
                    label(row),
                    f"{row['step_ms'] / 1000:.2f} s",
                    f"{row['time_ratio']:.2f} x",
                    f"{row['peak_mib'] / 1024:.1f} GiB",
                    f"{row['memory_ratio']:.2f} x",
                    f"{row['host_mib'] / 1024:.1f} GiB" if row.get("host_mib") else "",
                ]
                for row in (row for name in (SHOWN[0], *PEERS, *SHOWN[1:]) for row in rows if row["row"] == name)
            ]
            title = "**The same with attention's output saved, and saved rows in pinned host memory** (`offload=True`, "
            title += '`recompute="attention"`; the first peer as above)'
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
    files = [f"- {s}" for s in dict.fromkeys(sources)]
    folded = ["<details><summary>Files and commands of this table</summary>", "", *files, "", "</details>", ""]
    return [*lines, *markdown(header, cells), "", *folded]


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


def small(result: dict[str, Any]) -> Table:
    """benchmarks/small.py: steps with and without CUDA graphs. The time of one that did not fit or run is its error."""

    def times(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.2f} x" if key in row else ""

    def mib(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:,} MiB" if key in row else ""

    rows = [
        [
            row["shape"],
            in_thousands(row["context"]),
            row["row"] if "PEFT" in row["row"] else f"lemo, {row['row']}",
            f"{row['step_ms']:.1f} ms" if "step_ms" in row else row["error"],
            f"{row['step_ms_min']:.1f} - {row['step_ms_max']:.1f}" if "step_ms" in row else "",
            f"{row['host_ms']:.1f} ms" if "step_ms" in row else "",
            times(row, "graph_ratio"),
            times(row, "time_ratio"),
            mib(row, "peak_mib"),
            mib(row, "reserved_mib"),
        ]
        for row in result["rows"]
    ]
    header = ["shape", "tokens", "", "step", "least - most", "host", "without graphs / with", "peer's time / ours"]
    title = (
        "**Small models, nothing recomputed, keep 0.5 in mode `skip`** (peer: transformers + PEFT; host: CPU time of "
        "the thread that runs the step, waiting for the GPU included; what graphs hold counts as reserved memory, not "
        "as allocated)"
    )
    return title, [*header, "allocated", "reserved"], rows
