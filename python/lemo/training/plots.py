"""A run's log as a table and as pictures: loss curve, kept ratio of every layer over the steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np


def steps_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that report a training step, in order."""
    return [r for r in records if "loss" in r]


def _numbers(records: list[dict[str, Any]], name: str) -> np.ndarray:
    """The field as floats; nan if it is null or was not logged."""
    return np.array([math.nan if r.get(name) is None else r[name] for r in records], float)


def _known(values: np.ndarray) -> np.ndarray:
    """Without what is nan; one nan if nothing is left."""
    known = values[~np.isnan(values)]
    return known if len(known) else np.array([math.nan])


def summary(records: list[dict[str, Any]]) -> str:
    """A line per phase (mean loss, speed, kept ratio, peak memory), and the held-out evaluations."""
    steps = steps_of(records)
    if not steps:
        return "no step has been logged yet"
    lines = [f"{'phase':28}  {'steps':>11}  {'loss':>8}  {'last':>8}  {'tokens/s':>9}  {'kept':>6}  {'peak MiB':>9}"]
    start = 0
    for i in range(1, len(steps) + 1):
        if i < len(steps) and _phase(steps[i]) == _phase(steps[start]):
            continue
        part, start = steps[start:i], i
        # The first step of a run pays for set-up; the median is not moved by it.
        speed = float(np.median(_known(_numbers(part, "tokens_per_second"))))
        loss = _numbers(part, "loss")
        kept = [k for r in part for k in r.get("kept", [])]
        lines.append(
            f"{_phase(part[0]):28}  {part[0]['step']:>5}-{part[-1]['step']:<5}  "
            f"{_known(loss).mean():8.4f}  {loss[-1]:8.4f}  {speed:9.1f}  "
            f"{np.mean(kept) if kept else 1.0:6.3f}  {_known(_numbers(part, 'peak_memory_bytes')).max() / 2**20:9.0f}"
        )
    for r in records:
        if r.get("event") == "held-out":
            interval = f"  [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]" if r.get("interval") else ""
            value = "not finite" if r["perplexity"] is None else f"{r['perplexity']:.3f}"
            lines.append(f"held-out perplexity after step {r['step']}: {value}{interval}")
    return "\n".join(lines)


def _phase(record: dict[str, Any]) -> str:
    phase = record.get("phase", "")
    if isinstance(phase, dict):
        return " ".join(str(phase[k]) for k in ("mode", "keep", "policy") if phase.get(k) is not None)
    return str(phase)


def plot_run(records: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Write a PNG: loss above, and below it a map of the kept ratio, layers by steps. Needs matplotlib.

    Raises ImportError if matplotlib is missing and ValueError if no step has been logged.
    """
    try:
        import matplotlib
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps = steps_of(records)
    if not steps:
        raise ValueError("no step has been logged yet, so there is nothing to draw")
    x = np.array([r["step"] for r in steps])
    loss = _numbers(steps, "loss")
    mapped = [r for r in steps if r.get("kept")]
    figure, axes = plt.subplots(
        2 if mapped else 1, 1, figsize=(8, 6 if mapped else 3.2), sharex=True, squeeze=False, layout="constrained"
    )
    top = axes[0, 0]
    top.plot(x, loss, color="0.75", linewidth=0.8, label="step")
    width = max(1, len(x) // 20)
    if len(x) > 2 * width:
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        top.plot(x[width - 1 :], smooth, color="C0", label=f"mean of {width} steps")
    for i in range(1, len(steps)):
        if _phase(steps[i]) != _phase(steps[i - 1]):
            top.axvline(x[i] - 0.5, color="C3", linestyle=":", linewidth=1)
            top.annotate(_phase(steps[i]), (x[i], top.get_ylim()[1]), fontsize=8, va="top", color="C3")
    top.set_ylabel("training loss")
    top.legend(loc="best", fontsize=8)
    if title:
        top.set_title(title)
    if mapped:
        layers = max(len(r["kept"]) for r in mapped)
        grid = np.full((layers, len(mapped)), np.nan)
        for column, r in enumerate(mapped):
            grid[: len(r["kept"]), column] = r["kept"]
        bottom = axes[1, 0]
        edges = np.array([r["step"] for r in mapped], float)
        mesh = bottom.pcolormesh(edges, np.arange(layers), grid, vmin=0, vmax=1, shading="nearest", cmap="viridis")
        bottom.set_ylabel("layer")
        figure.colorbar(mesh, ax=bottom, label="kept tokens")
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=130)
    plt.close(figure)
