"""What lemo needs to know about the trainer that runs it, and no callback receives: who it is, and its callbacks.

transformers passes a callback its arguments and the model, but neither the trainer nor the handler. Both are callers of
the callback (the trainer also of the model's forward pass), so they are looked up there.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from lemo.engine.config import Phase


def _callers(method: str | None = None, variable: str = "self") -> Iterator[Any]:
    """A variable of the methods of transformers and TRL that are being executed, the innermost first: the object they
    belong to, unless it names another. method: only those of this name."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        library = str(frame.f_globals.get("__name__", "")).startswith(("transformers.trainer", "trl."))
        named = method is None or code.co_name == method
        if named and library and code.co_varnames[:1] == ("self",) and code.co_flags & inspect.CO_OPTIMIZED:
            variables = frame.f_locals
            yield variables.get(variable)
            if sys.version_info < (3, 13):
                variables.clear()  # a copy, which the frame would hold on to with everything in it
        frame = frame.f_back


def running_trainer() -> Any | None:
    """The transformers Trainer that this code runs under, or None."""
    from transformers import Trainer

    callers = list(_callers())
    return next((owner for owner in callers if isinstance(owner, Trainer)), None)


def evaluates_loss_only() -> bool:
    """Whether this code runs under a transformers Trainer's evaluation that reads nothing but the model's loss."""
    from transformers import Trainer

    asked = list(_callers("prediction_step", "prediction_loss_only"))
    trainer = running_trainer() if asked and asked[0] is True else None
    return (
        trainer is not None
        and type(trainer).compute_loss is Trainer.compute_loss
        and type(trainer).prediction_step is Trainer.prediction_step
        and trainer.compute_loss_func is None
        and trainer.label_smoother is None
    )


def go_first(callback: Any) -> None:
    """Moves a callback that is being called to the front of its trainer's list.

    Reporters (TensorBoard and others) come before the callbacks a user gives, and would otherwise write a step's logs
    before those have added to them.
    """
    for owner in list(_callers()):
        callbacks = getattr(owner, "callbacks", None)
        if isinstance(callbacks, list) and any(c is callback for c in callbacks):
            if callbacks[0] is not callback:
                # The list is being iterated, past this callback's old place: none is skipped or called twice.
                callbacks[:] = [callback, *(c for c in callbacks if c is not callback)]
            return


def _trl_class(kind: type) -> str | None:
    """The TRL class that `kind` is, or derives from most closely."""
    return next((c.__qualname__ for c in kind.__mro__ if c.__module__.split(".")[0] == "trl"), None)


def refuse_comparisons(phases: Iterable[Phase], trainer: Any = None, arguments: Any = None) -> None:
    """Raises ValueError if a TRL trainer other than SFTTrainer would run a phase whose forward pass is not exact.

    Such trainers compare log-probabilities of the training pass with those of another one (a reference model, the
    policy that sampled, the other answer of a pair), which sees every token and attends to all of them.
    """
    names = [_trl_class(type(given)) for given in (trainer, arguments) if given is not None]
    compares = next(
        (name for name in names if name and name not in ("SFTTrainer", "SFTConfig") and not name.startswith("_")), None
    )
    inexact = next((phase.mode for phase in phases if not phase.exact), None)
    if compares is None or inexact is None:
        return
    left_out = "tokens" if inexact == "skip" else "a part of attention"
    raise ValueError(
        f'{compares}: mode "{inexact}" is not available. The training pass would leave {left_out} out, but what its '
        "log-probabilities are compared with (a reference model, an earlier policy, generated tokens) comes from the "
        "whole model: losses and rewards would be wrong from the first step. Use phases with an exact forward, of mode "
        '"backward" or "dense": LemoConfig(phases=[Phase("backward", keep=0.5)])'
    )
