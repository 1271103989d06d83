"""The windows of a run: those of the context, or in phases with `window` parts of them."""

from __future__ import annotations

import bisect
from collections.abc import Callable

from lemo.data import CutWindows, Documents, PackedWindows
from lemo.integration.schedule import Schedule
from lemo.training.settings import FinetuneSettings


def tokens_read(settings: FinetuneSettings) -> float:
    """Share of the tokens of whole windows that the run's steps read: 1 without phases with `window`."""
    steps = Schedule(settings.phases()).steps(settings.steps)
    read = sum(n * tokens for n, tokens in zip(steps, settings.window_lengths(), strict=True))
    return read / (settings.steps * settings.context)


def training_windows(
    documents: Documents,
    settings: FinetuneSettings,
    *,
    processes: int = 1,
    length: int | None = None,
    report: Callable[[str], None] | None = None,
) -> PackedWindows:
    """Windows in the order in which the steps of all processes take them. length: default, those of all steps."""
    per_step = settings.batch * settings.accumulate * processes
    length = settings.steps * per_step if length is None else length
    tokens = settings.window_lengths()
    if set(tokens) == {settings.context}:
        return PackedWindows(documents, settings.context, seed=settings.seed, length=length, report=report)
    ends = Schedule(settings.phases()).boundaries(settings.steps)

    def tokens_of(i: int) -> int:
        return tokens[min(bisect.bisect_right(ends, i // per_step), len(tokens) - 1)]

    return CutWindows(
        documents, settings.context, seed=settings.seed, tokens_of=tokens_of, length=length, report=report
    )
