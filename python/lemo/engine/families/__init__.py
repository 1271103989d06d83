"""What the engine needs to know about a model family; one module per family."""

from __future__ import annotations

from typing import Any

from torch import nn

from lemo.engine.families.base import AttentionOptions, Family, ModelShape, NormWeights, UnsupportedModelError
from lemo.engine.families.gemma import Gemma2, Gemma3
from lemo.engine.families.gpt_oss import GptOss
from lemo.engine.families.granite import Granite
from lemo.engine.families.llama import Llama
from lemo.engine.families.mistral import Ministral, Mistral
from lemo.engine.families.opt import OPT
from lemo.engine.families.phi3 import Phi3
from lemo.engine.families.qwen2 import Qwen2
from lemo.engine.families.qwen3 import Qwen3
from lemo.engine.families.qwen3_moe import Qwen3MoE
from lemo.engine.families.smollm3 import SmolLM3
from lemo.engine.wrappers import base_model

FAMILIES: tuple[Family, ...] = (
    Llama(),
    Mistral(),
    Ministral(),
    OPT(),
    Qwen2(),
    Qwen3(),
    Qwen3MoE(),
    Gemma2(),
    Gemma3(),
    GptOss(),
    Granite(),
    Phi3(),
    SmolLM3(),
)

__all__ = [
    "FAMILIES",
    "AttentionOptions",
    "Family",
    "ModelShape",
    "NormWeights",
    "UnsupportedModelError",
    "find",
    "language_config",
    "loading",
    "logit_scale",
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
        f"one of them{_within(getattr(inner, 'config', None))}"
    )


def language_config(config: Any) -> Any:
    """The configuration of the language model in one of several modalities, if that can be loaded alone; else config.

    `Family.loading` of it has the arguments that do.
    """
    text = getattr(config, "text_config", None)
    family = _of_type(getattr(text, "model_type", None))
    return text if family is not None and family.within == config.model_type else config


def _within(config: Any) -> str:
    text = language_config(config)
    if text is config:
        return ""
    family = of(text)
    arguments = ", ".join(f"{name}={value!r}" for name, value in family.loading(text).items())
    return f'. Load its language model alone: {family.model_class}.from_pretrained("...", {arguments})'


def loading(config: Any) -> dict[str, Any]:
    """`Family.loading`, for any causal language model."""
    family = _of_type(getattr(config, "model_type", None))
    return {"attn_implementation": "sdpa"} if family is None else family.loading(config)


def of(config: Any) -> Family:
    """The family of a transformers configuration. Raises UnsupportedModelError naming what is supported."""
    found = _of_type(getattr(config, "model_type", None))
    if found is None:
        raise UnsupportedModelError(
            f"lemo does not support {type(config).__name__} (model_type {getattr(config, 'model_type', None)!r}): "
            f"expected the configuration of {supported()}{_within(config)}"
        )
    return found


def logit_softcap(config: Any) -> float:
    """c > 0: logits are c tanh(z / c). Of any causal language model: one without a family has transformers' name."""
    family = _of_type(getattr(config, "model_type", None))
    return Family.logit_softcap(family, config) if family is None else family.logit_softcap(config)  # type: ignore[arg-type]


def logit_scale(config: Any) -> float:
    """The factor of the head's output that makes the logits; of any causal language model, as `logit_softcap`."""
    family = _of_type(getattr(config, "model_type", None))
    if family is not None:
        return family.logit_scale(config)
    return 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)


def _of_type(model_type: str | None) -> Family | None:
    return next((family for family in FAMILIES if family.model_type == model_type), None)
