"""Which phase of the run a step belongs to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lemo.engine.config import Phase


class Schedule:
    """Phases laid over a run's steps in proportion to their shares."""

    def __init__(self, phases: Sequence[Phase]) -> None:
        if not phases:
            raise ValueError("a schedule needs at least one phase; got none")
        self.phases = tuple(phases)

    def boundaries(self, total: int) -> list[int]:
        """First step after every phase; the last is `total`. Shares round to the nearest step."""
        whole = sum(phase.share for phase in self.phases)
        ends, done = [], 0.0
        for phase in self.phases:
            done += phase.share
            ends.append(int(total * done / whole + 0.5))
        ends[-1] = total
        return ends

    def steps(self, total: int) -> list[int]:
        """Steps of every phase in a run of `total`; few steps may leave a phase none."""
        ends = self.boundaries(total)
        return [b - a for a, b in itertools.pairwise([0, *ends])]

    def least_steps(self, phase: int) -> int | None:
        """Of the shortest run in which the phase has a step; None if that is longer than any that is tried."""
        return next((total for total in range(1, 10_000) if self.steps(total)[phase]), None)

    def index(self, step: int, total: int | None) -> int:
        """Number of the phase that step `step` (from 0) of `total` belongs to; steps past the end: the last."""
        if len(self.phases) == 1:
            return 0
        if total is None:
            raise RuntimeError(
                "a schedule of several phases needs to know how many steps the run has: add controller.callback() to "
                "the Trainer's callbacks, or set controller.total_steps in your own loop"
            )
        for i, end in enumerate(self.boundaries(total)):
            if step < end:
                return i
        return len(self.phases) - 1

    def phase(self, step: int, total: int | None) -> Phase:
        """The phase that step `step` (from 0) of `total` belongs to."""
        return self.phases[self.index(step, total)]
