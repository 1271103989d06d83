"""Phi-3, Phi-3.5 and Phi-4 (dense): Llama's layers with fused projections, one for q, k and v and one for gate and up,
and in some versions rotary positions in the first part of a head only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lemo import ops
from lemo.engine.families.base import ModelShape, Tables, refuse
from lemo.engine.families.llama import Llama, gated_down
from lemo.engine.linear import linear_group, made_here, unwrap


class Phi3(Llama):
    name, model_type = "Phi3", "phi3"
    liger = frozenset({"LigerRMSNorm", "LigerPhi3SwiGLUMLP"})
    projections: Mapping[str, str] = {
        "qkv_proj": "qkv",
        "o_proj": "o",
        "gate_up_proj": "gate_up",
        "down_proj": "down",
    }

    def shape(self, config: Any) -> ModelShape:
        return replace(super().shape(config), fused=True)

    def window(self, config: Any, layer: int) -> int | None:
        return config.sliding_window

    def check(self, lm: Any) -> None:
        super().check(lm)
        if lm.config.resid_pdrop:
            refuse(f"dropout of what sub-layers add (resid_pdrop={lm.config.resid_pdrop})", "set it to 0")

    def attention_modules(self, layer: Any) -> Sequence[nn.Module]:
        return layer.self_attn.qkv_proj, layer.self_attn.o_proj

    def mlp_modules(self, layer: Any) -> Sequence[nn.Module]:
        mlp = unwrap(layer.mlp)
        modules = (mlp.gate_up_proj, mlp.down_proj)
        return (*modules, mlp.activation_fn) if hasattr(mlp, "activation_fn") else modules

    def project(self, layer: Any, h: Tensor, want_output: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        a, m = layer.self_attn, h.shape[0]
        heads, kv_heads = a.config.num_attention_heads, a.config.num_key_value_heads
        (qkv,) = linear_group((a.qkv_proj,), h, want_output)
        q, k, v = qkv.contiguous().view(m, -1, a.head_dim).split((heads, kv_heads, kv_heads), 1)
        # v is saved: as a view it would keep the memory of all three, although q and k are gone once they are rotated.
        return q, k, v.contiguous()

    def rotate(self, layer: Any, x: Tensor, tables: Tables, rows: Tensor | None) -> Tensor:
        cos, sin = self.rotary_tables(layer, tables)
        width = cos.shape[-1]
        if width == x.shape[-1]:
            return ops.rotary(x, cos, sin, rows)
        return torch.cat((ops.rotary(x[..., :width], cos, sin, rows), x[..., width:]), -1)

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor:
        mlp = unwrap(layer.mlp)
        (both,) = linear_group((mlp.gate_up_proj,), h)
        gate, up = both.chunk(2, -1)
        return gated_down(mlp.down_proj, getattr(mlp, "activation_fn", None), gate, up, want_output, made_here(both))
