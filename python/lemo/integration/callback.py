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

    What the Trainer logs, and its reporters (tensorboard, trackio, wandb) write, also has, of the last forward pass:
    lemo_phase (number of the phase), lemo_kept (mean over layers of the kept fraction), lemo_loss_tokens (targets the
    loss was over: of tokens that took part in a layer), lemo_cost (products compared with a dense step) and, in mode
    "sparse", lemo_density (mean share of the pairs of tiles) and lemo_covered (that of attention, if it is estimated).
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
            ours = _numbers(self.controller.report())
            logs.update(ours)  # what later callbacks print and report
            if state.log_history:
                state.log_history[-1].update(ours)  # the Trainer stored its own copy before


def _numbers(report: dict[str, Any]) -> dict[str, Any]:
    """A report's numbers as reporters take them: one each."""
    means = {"kept": report["kept"], "density": report["density"], "covered": report["covered"]}
    found = {"phase": report["phase"], "loss_tokens": report["loss_tokens"], "cost": report["cost_ratio"]}
    for name, values in means.items():
        if values and None not in values:
            found[name] = sum(values) / len(values)
    return {f"lemo_{name}": value for name, value in found.items() if value is not None}
