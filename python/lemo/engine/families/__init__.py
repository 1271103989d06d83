"""What the engine needs to know about a model family; one module per family."""

from __future__ import annotations

from typing import Any

from torch import nn

from lemo.engine.families.base import Family, NormWeights, UnsupportedModelError
from lemo.engine.families.llama import Llama
from lemo.engine.families.opt import OPT
from lemo.engine.wrappers import base_model

FAMILIES: tuple[Family, ...] = (Llama(), OPT())

__all__ = ["FAMILIES", "Family", "NormWeights", "UnsupportedModelError", "find"]


def find(model: Any) -> tuple[Family, nn.Module]:
    """The family and the causal language model inside `model` (itself, or what PEFT and torch.compile wrap).

    Raises UnsupportedModelError naming what is supported.
    """
    inner = base_model(model)
    for family in FAMILIES:
        if family.matches(inner):
            family.check(inner)
            return family, inner
    supported = ", ".join(family.model_class for family in FAMILIES)
    raise UnsupportedModelError(
        f"lemo does not support {type(inner).__name__}: expected {supported} of transformers, or a PeftModel around "
        "one of them"
    )
