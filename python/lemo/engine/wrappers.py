"""Wrappers around a transformers model: torch.compile, PEFT, DistributedDataParallel; and FSDP2, which changes the
classes of modules in place."""

from __future__ import annotations

from typing import Any

from torch import nn


def sharded(module: nn.Module) -> bool:
    """Whether FSDP2 divides this module's weights (`torch.distributed.fsdp.fully_shard` was called on it)."""
    kinds = type(module).__mro__
    return any(c.__name__ == "FSDPModule" and c.__module__.startswith("torch.distributed.") for c in kinds)


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
