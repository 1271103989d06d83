"""Adapters, and ways to distribute a model, that lemo cannot train: refused by name.

Most PEFT adapters work, since lemo calls their modules with rows: tokens of all sequences one after the other. Those
that need more than a row - which sequence it belongs to, a cache, the logits - do not; nor do sharded parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine.families.base import UnsupportedModelError
from lemo.engine.wrappers import base_model

# PEFT's names of kinds that give the model something other than embeddings, or read its logits.
_KINDS = {
    "PREFIX_TUNING": "it trains a cache of keys and values (past_key_values)",
    "CARTRIDGE": "it trains a cache of keys and values (past_key_values)",
    "CPT": "its own loss reads the logits of every token, which lemo does not compute",
    "SHADOW": "it runs a second stack of states next to the decoder layers, which lemo computes itself",
}
_INSTEAD = (
    "use LoRA or another adapter of single projections, prompt tuning or P-tuning, or train this model without lemo"
)


def _refuse(what: str, why: str) -> None:
    raise UnsupportedModelError(f"lemo does not support {what}: {why}; {_INSTEAD}")


def _configs(model: Any) -> Iterator[Any]:
    """PEFT's settings of the wrappers around a transformers model."""
    inner = base_model(model)
    while model is not None and model is not inner:
        configs = getattr(model, "peft_config", None)
        if isinstance(configs, dict):
            yield from configs.values()
        model = getattr(model, "_orig_mod", None) or getattr(model, "module", None)


def check_adapters(model: Any) -> None:
    """Raises UnsupportedModelError, naming it, for an adapter on `model` (a transformers model, or what wraps it)."""
    for config in _configs(model):
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind in _KINDS:
            _refuse(f"PEFT's {type(config).__name__}", _KINDS[kind])
    by_sequence = "it treats the rows of a batch differently, and layers here see the tokens of all rows as one"
    for name, module in base_model(model).named_modules():
        home = type(module).__module__
        if not home.startswith("peft."):
            continue
        if home.startswith("peft.tuners.poly."):
            _refuse(f"Poly ({name})", by_sequence)
        variants = [type(variant).__name__ for variant in (getattr(module, "lora_variant", None) or {}).values()]
        if any(variant.startswith("ALora") for variant in variants):
            _refuse(f"aLoRA, LoraConfig(alora_invocation_tokens=...) ({name})", by_sequence)
        if any(variant.startswith("Monteclora") for variant in variants):
            buffered = "it takes its samples from a buffer, so recomputation in the backward pass would get others"
            _refuse(f"MonteCLoRA, LoraConfig(monteclora_config=...) ({name})", buffered)
        own = module.__dict__.get("forward")
        if type(getattr(own, "__self__", None)).__name__.startswith("XLora"):
            _refuse(f"X-LoRA ({name})", by_sequence)


def check_device(batch: Tensor, device: torch.device) -> None:
    """Raises UnsupportedModelError if a batch is not on the model's device."""
    if batch.device != device:
        raise UnsupportedModelError(
            f"lemo: the batch is on {batch.device}, the model on {device}. nn.DataParallel, which does this on several "
            "GPUs, is not supported: use DistributedDataParallel (torchrun, accelerate launch), or make one GPU visible"
        )


def check_weights(layers: Sequence[nn.Module]) -> None:
    """Raises UnsupportedModelError if the weights of layers are not whole tensors of this process."""
    for layer in layers:
        how = None
        for module in layer.modules():
            weight = module.__dict__.get("weight")
            if type(module).__name__ == "FullyShardedDataParallel" or (
                type(module) is nn.Linear and isinstance(weight, Tensor)
            ):
                how = "FSDP shards them"
            for p in module._parameters.values():
                if hasattr(p, "ds_id"):
                    how = "DeepSpeed ZeRO-3 partitions them"
                elif type(p).__name__ == "DTensor" or type(getattr(p, "data", None)).__name__ == "DTensor":
                    how = "they are DTensors, as FSDP2 and tensor parallelism make them"
        if how is not None:
            raise UnsupportedModelError(
                f"lemo needs the whole weights of every layer in each process; here {how}. Use "
                "DistributedDataParallel, or DeepSpeed ZeRO up to stage 2"
            )
