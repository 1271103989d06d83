"""A run's log as a table and as pictures: loss curve, kept ratio of every layer over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lemo.training.phases import PlannedPhase


def steps_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines that report a training step, in order."""
    return [r for r in records if "loss" in r]


def last_step(records: list[dict[str, Any]]) -> int:
    """The last step that a line of the log is about; 0 before the first."""
    return max((r.get("step", 0) for r in records), default=0)


def _numbers(records: list[dict[str, Any]], name: str) -> np.ndarray:
    """The field as floats; nan if it is null or was not logged."""
    return np.array([math.nan if r.get(name) is None else r[name] for r in records], float)


def _known(values: np.ndarray) -> np.ndarray:
    """Without what is nan; one nan if nothing is left."""
    known = values[~np.isnan(values)]
    return known if len(known) else np.array([math.nan])


def summary(records: list[dict[str, Any]], unreached: Sequence[PlannedPhase] = ()) -> str:
    """A line per phase (mean loss, speed, kept ratio, share of the pairs of tiles, peak memory), one per phase that has
    not been reached, and the held-out evaluations."""
    steps = steps_of(records)
    if not steps:
        return "no step has been logged yet"
    columns = f"{'loss':>8}  {'last':>8}  {'tokens/s':>9}  {'kept':>6}  {'pairs':>6}  {'peak MiB':>9}"
    lines = [f"{'phase':28}  {'steps':>11}  {columns}"]
    start = 0
    for i in range(1, len(steps) + 1):
        if i < len(steps) and phase_name(steps[i]) == phase_name(steps[start]):
            continue
        part, start = steps[start:i], i
        # The first step of a run pays for set-up; the median is not moved by it.
        speed = float(np.median(_known(_numbers(part, "tokens_per_second"))))
        loss = _numbers(part, "loss")
        kept, pairs = ([k for r in part for k in r.get(name, [])] for name in ("kept", "density"))
        shares = "  ".join(f"{np.mean(values) if values else 1.0:6.3f}" for values in (kept, pairs))
        peak = _known(_numbers(part, "peak_memory_bytes")).max() / 2**20
        lines.append(
            f"{phase_name(part[0]):28}  {part[0]['step']:>5}-{part[-1]['step']:<5}  "
            f"{_known(loss).mean():8.4f}  {loss[-1]:8.4f}  {speed:9.1f}  {shares}  {peak:9.0f}"
        )
    lines += [f"{phase.name:28}  {phase.first:>5}-{phase.last:<5}  not reached" for phase in unreached]
    for r in records:
        if r.get("event") == "held-out":
            interval = f"  [{r['interval'][0]:.3f}, {r['interval'][1]:.3f}]" if r.get("interval") else ""
            value = "not finite" if r["perplexity"] is None else f"{r['perplexity']:.3f}"
            lines.append(f"held-out perplexity after step {r['step']}: {value}{interval}")
    return "\n".join(lines)


def phase_name(record: dict[str, Any]) -> str:
    """The phase of a step's line as text; empty if it was not logged."""
    phase = record.get("phase", "")
    if isinstance(phase, dict):
        limits = [f"{k} {phase[k]:g}" for k in ("density", "keys", "mass", "window") if phase.get(k) is not None]
        return " ".join([*(str(phase[k]) for k in ("mode", "keep", "policy") if phase.get(k) is not None), *limits])
    return str(phase)


# What is drawn by layer, if steps have it.
_MAPS = {"kept": "kept tokens", "density": "pairs of tiles"}


def plot_run(records: list[dict[str, Any]], path: Path, title: str = "") -> None:
    """Write a PNG: loss above, and below it maps, layers by steps, of the kept ratio and, if steps left out pairs of
    tiles, of the share that they computed. Needs matplotlib.

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
    maps = [name for name in _MAPS if any(r.get(name) for r in steps)]
    rows = 1 + len(maps)
    figure, axes = plt.subplots(
        rows, 1, figsize=(8, 3.2 + 2.8 * len(maps)), sharex=True, squeeze=False, layout="constrained"
    )
    top = axes[0, 0]
    top.plot(x, loss, color="0.75", linewidth=0.8, label="step")
    width = max(1, len(x) // 20)
    if len(x) > 2 * width:
        smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
        top.plot(x[width - 1 :], smooth, color="C0", label=f"mean of {width} steps")
    for i in range(1, len(steps)):
        if phase_name(steps[i]) != phase_name(steps[i - 1]):
            top.axvline(x[i] - 0.5, color="C3", linestyle=":", linewidth=1)
            top.annotate(phase_name(steps[i]), (x[i], top.get_ylim()[1]), fontsize=8, va="top", color="C3")
    top.set_ylabel("training loss")
    top.legend(loc="best", fontsize=8)
    if title:
        top.set_title(title)
    for axis, name in zip(axes[1:, 0], maps, strict=True):
        _draw_map(figure, axis, steps, name)
    axes[-1, 0].set_xlabel("step")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_map(figure: Any, axis: Any, steps: list[dict[str, Any]], name: str) -> None:
    """A value of every layer at the steps that have it."""
    mapped = [r for r in steps if r.get(name)]
    grid = np.full((max(len(r[name]) for r in mapped), len(mapped)), np.nan)
    for column, r in enumerate(mapped):
        grid[: len(r[name]), column] = r[name]
    edges = np.array([r["step"] for r in mapped], float)
    mesh = axis.pcolormesh(edges, np.arange(len(grid)), grid, vmin=0, vmax=1, shading="nearest", cmap="viridis")
    axis.set_ylabel("layer")
    figure.colorbar(mesh, ax=axis, label=_MAPS[name])
