"""Which model a calibration belongs to: its shape and a digest over a sample of its weights, adapters left out."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
from torch import nn

_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_SAMPLES = 64  # values taken of every weight, evenly spaced: enough to notice any training, cheap on any size
_ADAPTER = re.compile(r"(^|\.)(lora_|modules_to_save\.|ia3_|vera_|oft_|boft_|hada_|lokr_|loha_|prompt_encoder)")
_WRAPPERS = re.compile(r"\.(base_layer|original_module)(?=\.)")


def config_fingerprint(config: Any) -> dict[str, Any]:
    """The part of `model_fingerprint` that a model's configuration alone tells."""
    return {"config": {name: getattr(config, name, None) for name in _CONFIG_FIELDS}}


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Fingerprint of a transformers causal language model, the same with and without PEFT adapters around it.

    Returns {"config": fields that fix shapes, "embeddings_and_norms": digest, "linear": digest, or None if linear
    weights are quantized}. Values are rounded to bfloat16 first, so that a model stored in 16 or 32 bits and loaded in
    another type keeps its fingerprint. Position settings are left out: extending the context does not change the model.
    """
    fields = config_fingerprint(model.config)["config"]
    digests = {"embeddings_and_norms": hashlib.sha256(), "linear": hashlib.sha256()}
    quantized = False
    prefix = "base_model.model." if hasattr(model, "get_base_model") else ""
    rows = []
    for name, weight in model.named_parameters():
        name = _WRAPPERS.sub("", name.removeprefix(prefix))
        if _ADAPTER.search(name):
            continue
        small = weight.dim() < 2 or "embed" in name
        if not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
            quantized = quantized or not small
            continue
        rows.append((name, small, weight))
    for name, small, weight in sorted(rows, key=lambda row: row[0]):
        flat = weight.detach().reshape(-1)
        count = min(_SAMPLES, flat.numel())
        index = torch.arange(count, device=flat.device) * flat.numel() // max(count, 1)
        values = flat[index].to("cpu", torch.bfloat16).view(torch.int16)
        digest = digests["embeddings_and_norms" if small else "linear"]
        digest.update(name.encode() + b"\0" + values.numpy().tobytes())
    return {
        "config": fields,
        "embeddings_and_norms": digests["embeddings_and_norms"].hexdigest(),
        "linear": None if quantized else digests["linear"].hexdigest(),
    }


def differences(recorded: dict[str, Any], model: dict[str, Any], made: str) -> list[str]:
    """In what a recorded fingerprint and a model's differ, as texts: nothing if they are equal as far as both tell.

    made: what the recorded one was, as in "calibrated for".
    """
    fields = recorded.get("config")
    fields = fields if isinstance(fields, dict) else {}
    found = [
        f"{name}: {made} {fields.get(name)}, the model has {value}"
        for name, value in model["config"].items()
        if fields.get(name) != value
    ]
    if not found:
        for part in ("embeddings_and_norms", "linear"):  # quantized linear weights have no fingerprint to compare
            if None not in (recorded.get(part), model.get(part)) and recorded[part] != model[part]:
                found.append(f"weights ({part.replace('_', ' ')}) differ")
    return found
