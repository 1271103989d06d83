"""What a forward pass with labels returns: the loss, and in place of logits an object that explains their absence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from transformers.modeling_outputs import CausalLMOutputWithPast

_TEXT = (
    "logits are not available with this loss: lemo computes it in segments, so they never exist whole. To get them as "
    "well, set LemoConfig(return_logits=True) in training, and leave controller.loss_only() in evaluation; for a loss "
    "that lemo does not compute, call the model without labels"
)


class MissingLogitsError(RuntimeError, AttributeError):
    """The logits that a forward pass did not make were used. (An AttributeError, so that `hasattr` works.)"""

    def __init__(self) -> None:
        super().__init__(_TEXT)


def _missing(*_: Any, **__: Any) -> NoReturn:
    raise MissingLogitsError


class NoLogits:
    """Stands for the logits; every use is a MissingLogitsError, torch functions included."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{_TEXT}>"

    def __reduce__(self) -> str:
        return "NO_LOGITS"  # a single object, also in copies

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):  # what Python and libraries ask for to find an object's kind
            raise AttributeError(name)
        raise MissingLogitsError

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        raise MissingLogitsError

    __bool__ = __len__ = __iter__ = __getitem__ = __setitem__ = __contains__ = __float__ = __int__ = _missing
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = _missing
    __matmul__ = __rmatmul__ = __neg__ = __abs__ = __lt__ = __le__ = __gt__ = __ge__ = __array__ = _missing


NO_LOGITS = NoLogits()


@dataclass
class TrainingOutput(CausalLMOutputWithPast):
    """A loss without logits. As a dictionary and as a tuple it holds the loss alone, as if `logits` were None."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, None if value is NO_LOGITS else value)  # in a copy made from the fields

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.__dict__.get("logits") is None:
            self.__dict__["logits"] = NO_LOGITS  # past __setattr__, which would add a key

    def __getitem__(self, k: Any) -> Any:
        if k == "logits" and k not in self.keys():
            raise KeyError(_TEXT)
        return super().__getitem__(k)
