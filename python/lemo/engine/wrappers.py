"""Wrappers around a transformers model: torch.compile, PEFT, DistributedDataParallel."""

from __future__ import annotations

from typing import Any

from torch import nn


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
