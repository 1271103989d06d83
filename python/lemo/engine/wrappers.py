"""Wrappers around a transformers model: torch.compile, PEFT, DistributedDataParallel; and FSDP2, which changes the
classes of modules in place."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn


def sharded(module: nn.Module) -> bool:
    """Whether FSDP2 divides this module's weights (`torch.distributed.fsdp.fully_shard` was called on it)."""
    kind: Any = type(module)
    return _of_fsdp2(kind)


@functools.lru_cache(maxsize=1024)  # a property of the class, which FSDP2 replaces; every step asks it of every module
def _of_fsdp2(kind: type) -> bool:
    return any(c.__name__ == "FSDPModule" and c.__module__.startswith("torch.distributed.") for c in kind.__mro__)


@functools.lru_cache(maxsize=1024)
def full_name(kind: Any) -> str:
    """A class's module and qualified name."""
    return f"{kind.__module__}.{kind.__qualname__}"


def tree(*modules: nn.Module) -> list[nn.Module]:
    """Modules and all that they contain, each once. For every step: `nn.Module.modules` makes names on the way, and
    takes several times as long."""
    found: dict[int, nn.Module] = {}
    waiting: list[Any] = list(reversed(modules))
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            if module._modules:
                waiting += reversed(module._modules.values())
    return list(found.values())


def parameters(*modules: nn.Module) -> dict[int, Tensor]:
    """The parameters of modules and all that they contain, by id."""
    held = (p for module in tree(*modules) if module._parameters for p in module._parameters.values())
    return {id(p): p for p in held if p is not None}


def sharded_tensor(tensor: Any) -> bool:
    """Whether a parameter is a DTensor, a part of which is here."""
    return type(tensor).__name__ == "DTensor" or type(getattr(tensor, "data", None)).__name__ == "DTensor"


def kind_of(module: nn.Module) -> Any:
    """The class of a module, as it was before FSDP2 put its own in front of it."""
    kind: Any = type(module)
    return kind.__bases__[-1] if sharded(module) else kind


def base_model(model: Any) -> Any:
    """The transformers model inside wrappers of torch.compile, PEFT and DistributedDataParallel, in any order."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
