"""Which phase a step belongs to, and the callback that keeps count under the transformers Trainer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .config import Phase
from .trainers import go_first, running_trainer

if TYPE_CHECKING:
    from .attach import Controller


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


try:
    from transformers import TrainerCallback as _TrainerCallback
except ImportError:  # the operators are usable without transformers
    _TrainerCallback = object


class LemoCallback(_TrainerCallback):
    """Moves a controller along with a transformers Trainer, also after a resume, and adds to its logs.

    Adds lemo_phase (number of the phase) and lemo_kept (mean over layers of the kept fraction) to what the Trainer logs
    and its reporters write.
    """

    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        go_first(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        go_first(self)
        model = kwargs.get("model")
        self.controller.begin_training(model, args, running_trainer())
        self.controller.total_steps = state.max_steps
        self.controller.seek(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.seek(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.warn_of_unreached()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs and self.controller.kept_ratios and self.controller.applied:
            ratios = self.controller.kept_ratios
            ours = {"lemo_phase": self.controller.report()["phase"], "lemo_kept": sum(ratios) / len(ratios)}
            logs.update(ours)  # what later callbacks print and report
            if state.log_history:
                state.log_history[-1].update(ours)  # the Trainer stored its own copy before
