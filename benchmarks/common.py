"""What every benchmark script shares: timing on the device, and result files that say how they were made."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "flash-attn-4", "transformers", "peft", "liger-kernel")


def device_name() -> str:
    """The GPU's name, or the processor's architecture where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"


def short_device_name() -> str:
    """For file names: "h200", "cpu"."""
    return device_name().split()[1].lower() if torch.cuda.is_available() else "cpu"


def commit() -> str:
    """The commit of the working tree, "-dirty" where tracked files differ; outside a checkout $LEMO_COMMIT."""
    try:
        run = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("LEMO_COMMIT", "unknown")[:12]
    return run.stdout.strip()


def header() -> dict[str, Any]:
    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["cudnn"] = torch.backends.cudnn.version()
    return {
        "gpu": device_name(),
        "versions": versions,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv),
    }


def command(arguments: Sequence[str]) -> str:
    """How to run it again from the root of a checkout: no result path, no limit of time, and files by name, wherever
    this machine had them, but for what lies in the checkout."""
    words = []
    skip = False
    for word in arguments:
        left_out = word in ("--out", "--budget-minutes")
        if not skip and not left_out:
            words.append(portable(Path(word)) if Path(word).is_absolute() else word)
        skip = left_out
    return shlex.join(["python", *words])


def results_path(name: str | Path) -> Path:
    """name: a path ending in .json, or a name within benchmarks/results."""
    path = Path(name)
    return path if path.suffix == ".json" else ROOT / "benchmarks" / "results" / f"{name}.json"


def readable(values: Any) -> str:
    """JSON with an entry on each line, but for lists of numbers, which have one line each."""
    # A line break is never inside a string of JSON, so what begins with a bracket and a break is a list.
    return re.sub(
        r"\[\n\s*([^\[\]{}\"]+?)\n\s*\]",
        lambda found: "[" + re.sub(r"\n\s*", " ", found[1]) + "]",
        json.dumps(values, indent=1),
    )


def portable(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def write_results(name: str | Path, rows: Sequence[dict[str, Any]], **more: Any) -> Path:
    """Writes ``rows`` under the header. name: as of ``results_path``."""
    path = results_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = readable(header() | more | {"rows": list(rows)})
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n")
    part.replace(path)
    return path


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--out", default=f"{name}-{short_device_name()}", help="result file, or a name in results/")


def milliseconds(runs: Sequence[Callable[[], Any]], repeat: int = 20, warm: int = 3) -> float:
    """Median time of one call on the GPU, by events.

    runs: the same work on different buffers; calls rotate through them, so that no call finds its inputs in the L2
    cache because the call before left them there.
    """
    for i in range(max(warm, len(runs))):
        runs[i % len(runs)]()
    torch.cuda.synchronize()
    pairs = []
    for i in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        runs[i % len(runs)]()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


def compete(
    runs: Mapping[str, Sequence[Callable[[], Any]]], budget_ms: float = 400.0, at_least: int = 5, at_most: int = 40
) -> dict[str, float]:
    """Median times of several contestants, a round at a time, so that clocks and temperature favor none of them.

    runs: as for ``milliseconds``, by contestant. Every round has another order: a contestant that always followed
    a kernel that draws little power would always find high clocks. Rounds last for about ``budget_ms`` in all. A short
    wait at the start lets the host run ahead: an event that waited for the host would count the launch as work.
    """
    names = list(runs)
    draw = random.Random(0)

    def one_round(i: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
        pairs = {}
        for name in draw.sample(names, len(names)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            runs[name][i % len(runs[name])]()
            end.record()
            pairs[name] = (begin, end)
        return [pairs[name] for name in names]

    for i in range(max(2, *(len(calls) for calls in runs.values()))):
        warm = one_round(i)
    torch.cuda.synchronize()
    rounds = int(budget_ms / max(sum(begin.elapsed_time(end) for begin, end in warm), 1e-3))
    torch.cuda._sleep(4_000_000)
    timed = [one_round(i) for i in range(max(at_least, min(at_most, rounds)))]
    torch.cuda.synchronize()
    return {
        name: statistics.median(pairs[c][0].elapsed_time(pairs[c][1]) for pairs in timed)
        for c, name in enumerate(names)
    }


def copies(bytes_each: int, at_most: int = 8) -> int:
    """How many sets of buffers outgrow the L2 cache (counted three times over)."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(at_most, -(-3 * cache // max(bytes_each, 1))))


def reason(error: Exception) -> str:
    """Of a peer that cannot run, in a line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def require_same(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Timing a wrong result would mean nothing: our output is theirs to a few roundings."""
    error = (ours.float() - theirs.float()).abs().max().item()
    if not error <= 0.03 * theirs.float().abs().max().item():
        raise RuntimeError(f"lemo and {name} differ by {error}")


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Rows as aligned text."""

    def text(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)

    lines = [list(columns), *([text(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
