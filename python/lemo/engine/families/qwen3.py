"""Qwen3: Llama's layers with norms of the heads of queries and keys, before they are rotated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lemo.engine.elementwise import inner_norm
from lemo.engine.families.base import Classes, ModelShape, rms_norm
from lemo.engine.families.llama import Llama


class Qwen3(Llama):
    name, model_type = "Qwen3", "qwen3"

    @cached_property
    def layer_modules(self) -> Mapping[str, Classes]:
        heads = ("self_attn.q_norm", "self_attn.k_norm")
        return {**super().layer_modules, **dict.fromkeys(heads, self.own("RMSNorm"))}

    def shape(self, config: Any) -> ModelShape:
        shape = super().shape(config)
        # The norms' inputs.
        heads = (shape.heads + shape.kv_heads) * shape.head_dim
        return replace(shape, inner_parameters=2 * shape.head_dim, inner_saved=heads)

    def attention_modules(self, layer: Any) -> Sequence[nn.Module]:
        return *super().attention_modules(layer), layer.self_attn.q_norm, layer.self_attn.k_norm

    def norm_heads(self, layer: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        a = layer.self_attn
        return inner_norm(q, rms_norm(a.q_norm)), inner_norm(k, rms_norm(a.k_norm))
