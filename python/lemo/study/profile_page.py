"""Profiles as a table for a terminal, and as one HTML page."""

from __future__ import annotations

from typing import Any

from lemo.pages.charts import stacked_bars
from lemo.pages.html import Section, escape, missing, page, table, values
from lemo.study.profile import PARTS, PEER, Profile

_NOTE = (
    "The profiler slows a step: parts belong to the step with it. What no operator accounts for (on a GPU, when it "
    "waits; on the CPU, what runs outside of operators) is not divided among the parts; a sum above the step means "
    "that threads overlapped. Other: Python and autograd around the operators. Forward passes that the backward pass "
    "repeats count as forward. A product is the adapter's if an operand has the adapter's rank as a size, and an "
    "operator the loss's if one has the vocabulary's."
)


def _what(profiles: list[Profile]) -> str:
    if profiles[0].device:
        return "times of GPU kernels, by the operator that launched them"
    return "times of operators on the CPU, each without the operators that it calls"


def summary_rows(profiles: list[Profile]) -> list[tuple[str, list[float | None]]]:
    """(name, a value for every profile): totals, and how far the parts account for them."""
    return [
        ("step without the profiler, ms", [p.wall_ms for p in profiles]),
        ("step with the profiler, ms", [p.profiled_ms for p in profiles]),
        ("sum of the parts, ms", [p.attributed_ms for p in profiles]),
        ("sum / step with the profiler", [p.attributed_ms / p.profiled_ms for p in profiles]),
        ("not accounted for, ms", [p.profiled_ms - p.attributed_ms for p in profiles]),
        ("peak memory, MiB", [None if p.peak_bytes is None else p.peak_bytes / 2**20 for p in profiles]),
    ]


def as_text(profiles: list[Profile]) -> str:
    """Milliseconds per step by part, a column for each way of training."""
    done = [p for p in profiles if not p.error]
    lines = [f"{p.name}: {p.error}" for p in profiles if p.error]
    if not done:
        return "\n".join(lines)
    widths = [max(12, len(p.name)) for p in done]
    lines.append(f"{'ms per step':30}  " + "  ".join(f"{p.name:>{w}}" for p, w in zip(done, widths, strict=True)))
    rows: list[tuple[str, list[float | None]]] = [(part, [p.parts[part] for p in done]) for part in PARTS]
    for name, found in [*rows, *summary_rows(done)]:
        cells = (f"{'?' if v is None else format(v, '.3f'):>{w}}" for v, w in zip(found, widths, strict=True))
        lines.append(f"{name:30}  " + "  ".join(cells))
    lines.append(f"parts: {_what(done)}")
    return "\n".join(lines)


def profile_page(title: str, profiles: list[Profile], about: dict[str, Any]) -> str:
    """about: settings and the like, by name."""
    done = [p for p in profiles if not p.error]
    failed = "".join(missing(f"{p.name} was not measured:", p.error) for p in profiles if p.error)
    if not done:
        return page(title, failed, [Section("about", "Settings", values(about))])
    names = [p.name for p in done]
    bars = stacked_bars("A step by part", "ms", [(p.name, [(part, p.parts[part]) for part in PARTS]) for p in done])
    rows = [[part, *(p.parts[part] for p in done)] for part in PARTS]
    parts = table(["part", *names], rows, "Milliseconds per step", "parts-table")
    totals = table(["", *names], [[name, *found] for name, found in summary_rows(done)], name="totals-table")
    sections = [
        Section(
            "parts", "Time by part", f'{bars}{parts}<p class="note">{escape(f"Parts: {_what(done)}. {_NOTE}")}</p>'
        ),
        Section("totals", "Totals", totals),
        Section("layers", "Time by layer", _layers(done)),
        Section("memory", "Memory", _memory(done)),
        Section("about", "Settings and environment", values(about)),
    ]
    return page(title, failed, sections, {"parts": {p.name: p.parts for p in done}})


def _layers(done: list[Profile]) -> str:
    count = max(max(p.layers, default=-1) for p in done) + 1
    rows = [[i, *(p.layers.get(i) for p in done)] for i in range(count)]
    note = f"lemo: forward and backward. {PEER}: forward passes alone, since autograd does not know layers."
    return table(["layer", *(p.name for p in done)], rows, f"Milliseconds per step. {note}", "layers-table")


def _memory(done: list[Profile]) -> str:
    rows = [[part, *(p.allocated[part] / 2**20 for p in done)] for part in PARTS]
    caption = "MiB that the operators of a part allocated in a step (what was freed included: not a peak)"
    peak = "the allocator's, weights included" if done[0].device else "what a step held on top of the weights"
    listed = table(["part", *(p.name for p in done)], rows, caption, "memory-table")
    return f'{listed}<p class="note">{escape(f"The peak among the totals is {peak}.")}</p>'
