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
from lemo.engine.wrappers import base_model, sharded, sharded_tensor, tree

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
    inner = base_model(model)
    for module in tree(inner):
        home = type(module).__module__
        if not home.startswith("peft."):
            continue

        def refuse(what: str, why: str, module: nn.Module = module) -> None:
            _refuse(f"{what} ({next(name for name, m in inner.named_modules() if m is module)})", why)

        if home.startswith("peft.tuners.poly."):
            refuse("Poly", by_sequence)
        variants = [type(variant).__name__ for variant in (getattr(module, "lora_variant", None) or {}).values()]
        if any(variant.startswith("ALora") for variant in variants):
            refuse("aLoRA, LoraConfig(alora_invocation_tokens=...)", by_sequence)
        if any(variant.startswith("Monteclora") for variant in variants):
            buffered = "it takes its samples from a buffer, so recomputation in the backward pass would get others"
            refuse("MonteCLoRA, LoraConfig(monteclora_config=...)", buffered)
        own = module.__dict__.get("forward")
        if type(getattr(own, "__self__", None)).__name__.startswith("XLora"):
            refuse("X-LoRA", by_sequence)


def check_device(batch: Tensor, device: torch.device) -> None:
    """Raises UnsupportedModelError if a batch is not on the model's device."""
    if batch.device != device:
        raise UnsupportedModelError(
            f"lemo: the batch is on {batch.device}, the model on {device}. nn.DataParallel, which does this on several "
            "GPUs, is not supported: use DistributedDataParallel (torchrun, accelerate launch), or make one GPU visible"
        )


def check_weights(layers: Sequence[nn.Module]) -> None:
    """Raises UnsupportedModelError if the weights of layers are neither whole tensors of this process nor divided as
    `lemo.engine.weights` can gather them."""
    divided = [sharded(layer) for layer in layers]
    for layer in layers:
        how = _fsdp2(layer) if sharded(layer) else _elsewhere(layer)
        if how is None and any(divided) and not all(divided):
            how = f"fully_shard was called on {sum(divided)} of {len(divided)} layers"
        if how is not None:
            raise UnsupportedModelError(
                f"lemo needs the whole weights of a layer while it runs; here {how}. Use DistributedDataParallel, "
                "DeepSpeed ZeRO up to stage 2, or FSDP2 (torch.distributed.fsdp.fully_shard on every decoder layer and "
                "on the model)"
            )


def _elsewhere(layer: nn.Module) -> str | None:
    """How a layer's weights are spread, unless they are whole tensors of this process."""
    for module in tree(layer):
        weight = module.__dict__.get("weight")
        if type(module).__name__ == "FullyShardedDataParallel" or (
            type(module) is nn.Linear and isinstance(weight, Tensor)
        ):
            return "FSDP (version 1) shards them"
        if sharded(module):
            return "fully_shard was called on modules inside the layer, but not on the layer"
        for p in module._parameters.values():
            if hasattr(p, "ds_id"):
                return "DeepSpeed ZeRO-3 partitions them"
            if sharded_tensor(p):
                return "they are DTensors of a layer that fully_shard was not called on (tensor parallelism?)"
    return None


def _fsdp2(layer: nn.Module) -> str | None:
    """What is not supported of a layer that FSDP2 divides."""
    if any(module is not layer and sharded(module) for module in layer.modules()):
        return "fully_shard was called on modules inside the layer as well"
    for name, p in layer.named_parameters():
        if not sharded_tensor(p):
            if p.requires_grad:
                return f"FSDP2 leaves {name} out (ignored_params), although it trains: no process would average it"
            continue
        part: Any = p
        if any(type(place).__name__ not in ("Shard", "Replicate") for place in part.placements):
            return f"{name} is divided by FSDP2 and by tensor parallelism ({part.placements})"
        if part.to_local().device.type != part.device_mesh.device_type:
            return "FSDP2 keeps them on the CPU (CPUOffloadPolicy), where gradients cannot be averaged"
    return None
