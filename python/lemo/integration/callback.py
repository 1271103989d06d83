"""The callback that moves a controller along with a transformers Trainer."""

from __future__ import annotations

from typing import Any, Protocol

from lemo.integration.trainers import go_first, running_trainer

try:
    from transformers import TrainerCallback as _TrainerCallback
except ImportError:  # the operators work without transformers
    _TrainerCallback = object


class Driven(Protocol):
    """What the callback asks of `lemo.Controller`."""

    total_steps: int | None
    kept_ratios: list[float]

    @property
    def applied(self) -> bool: ...

    def begin_training(self, model: Any, arguments: Any, trainer: Any) -> None: ...

    def seek(self, step: int) -> None: ...

    def end_step(self) -> None: ...

    def warn_of_unreached(self) -> None: ...

    def report(self) -> dict[str, Any]: ...


class LemoCallback(_TrainerCallback):
    """Moves a controller along with a transformers Trainer, also after a resume, and adds to its logs.

    Adds lemo_phase (number of the phase), lemo_kept (mean over layers of the kept fraction) and, in mode "sparse",
    lemo_density (that of the pairs of tiles) to what the Trainer logs and its reporters write.
    """

    def __init__(self, controller: Driven) -> None:
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
            ratios, report = self.controller.kept_ratios, self.controller.report()
            ours = {"lemo_phase": report["phase"], "lemo_kept": sum(ratios) / len(ratios)}
            if densities := report["density"]:
                ours["lemo_density"] = sum(densities) / len(densities)
            logs.update(ours)  # what later callbacks print and report
            if state.log_history:
                state.log_history[-1].update(ours)  # the Trainer stored its own copy before
