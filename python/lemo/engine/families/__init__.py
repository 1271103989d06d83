"""What the engine needs to know about a model family; one module per family."""

from __future__ import annotations

from typing import Any

from torch import nn

from lemo.engine.families.base import AttentionOptions, Family, ModelShape, NormWeights, UnsupportedModelError
from lemo.engine.families.llama import Llama
from lemo.engine.families.mistral import Mistral
from lemo.engine.families.opt import OPT
from lemo.engine.families.qwen2 import Qwen2
from lemo.engine.wrappers import base_model

FAMILIES: tuple[Family, ...] = (Llama(), Mistral(), OPT(), Qwen2())

__all__ = [
    "FAMILIES",
    "AttentionOptions",
    "Family",
    "ModelShape",
    "NormWeights",
    "UnsupportedModelError",
    "find",
    "logit_softcap",
    "of",
]


def supported() -> str:
    *first, last = (family.model_class for family in FAMILIES)
    return f"{', '.join(first)} or {last}"


def find(model: Any) -> tuple[Family, nn.Module]:
    """The family and the causal language model inside `model` (itself, or what PEFT and torch.compile wrap).

    Raises UnsupportedModelError naming what is supported.
    """
    inner = base_model(model)
    for family in FAMILIES:
        if family.matches(inner):
            family.check(inner)
            return family, inner
    raise UnsupportedModelError(
        f"lemo does not support {type(inner).__name__}: expected {supported()} of transformers, or a PeftModel around "
        "one of them"
    )


def of(config: Any) -> Family:
    """The family of a transformers configuration. Raises UnsupportedModelError naming what is supported."""
    found = _of_type(getattr(config, "model_type", None))
    if found is None:
        raise UnsupportedModelError(
            f"lemo does not support {type(config).__name__} (model_type {getattr(config, 'model_type', None)!r}): "
            f"expected the configuration of {supported()}"
        )
    return found


def logit_softcap(config: Any) -> float:
    """c > 0: logits are c tanh(z / c). Of any causal language model: one without a family has transformers' name."""
    family = _of_type(getattr(config, "model_type", None))
    return Family.logit_softcap(family, config) if family is None else family.logit_softcap(config)  # type: ignore[arg-type]


def _of_type(model_type: str | None) -> Family | None:
    return next((family for family in FAMILIES if family.model_type == model_type), None)
