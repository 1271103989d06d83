"""Llama 2 and 3: RMSNorm, grouped-query attention with rotary positions, SwiGLU. Families like it derive from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemo import ops
from lemo.engine.elementwise import SwiGLU, product_again
from lemo.engine.families.base import Classes, Family, ModelShape, NormWeights, Tables, rms_norm
from lemo.engine.linear import linear_group, made_here, ordinary, reads_input, unwrap

SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")


class Llama(Family):
    name, model_type = "Llama", "llama"
    liger = frozenset({"LigerRMSNorm", "LigerRMSNormForLlama", "LigerSwiGLUMLP"})
    projections: Mapping[str, str] = {f"{role}_proj": role for role in ("q", "k", "v", "o", "gate", "up", "down")}

    @cached_property
    def outer_modules(self) -> Mapping[str, Classes]:
        return {
            "model": self.own("Model"),
            "model.norm": self.own("RMSNorm"),
            "model.rotary_emb": self.own("RotaryEmbedding"),
        }

    @cached_property
    def layer_modules(self) -> Mapping[str, Classes]:
        return {
            "": self.own("DecoderLayer"),
            "self_attn": self.own("Attention"),
            "mlp": self.own("MLP"),
            "input_layernorm": self.own("RMSNorm"),
            "post_attention_layernorm": self.own("RMSNorm"),
        }

    def biases(self, config: Any) -> tuple[str, ...]:
        """Projections with a bias."""
        attention = ("q", "k", "v", "o") if getattr(config, "attention_bias", False) else ()
        return attention + (("gate", "up", "down") if getattr(config, "mlp_bias", False) else ())

    def shape(self, config: Any) -> ModelShape:
        heads = config.num_attention_heads
        return ModelShape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            ffn=config.intermediate_size,
            vocab=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            biases=self.biases(config),
        )

    def default_positions(self, mask: Tensor) -> Tensor:
        return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)

    def tables(self, decoder: Any, x: Tensor, positions: Tensor) -> Tables:
        cos, sin = decoder.rotary_emb(x[None], positions[None])
        return cos[0].contiguous(), sin[0].contiguous()

    def norms(self, layer: Any) -> tuple[NormWeights, NormWeights]:
        offset = self.norm_offset
        return rms_norm(layer.input_layernorm, offset), rms_norm(layer.post_attention_layernorm, offset)

    def final_norm(self, decoder: Any) -> NormWeights:
        return rms_norm(decoder.norm, self.norm_offset)

    def attention_modules(self, layer: Any) -> Sequence[nn.Module]:
        a = layer.self_attn
        return a.q_proj, a.k_proj, a.v_proj, a.o_proj

    def mlp_modules(self, layer: Any) -> Sequence[nn.Module]:
        mlp = unwrap(layer.mlp)
        modules = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return (*modules, mlp.act_fn) if hasattr(mlp, "act_fn") else modules  # Liger's has SiLU built in

    def queries_keys_values(
        self, layer: Any, h: Tensor, tables: Tables, rows: Tensor | None, want_output: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.project(layer, h, want_output)
        q, k = self.norm_heads(layer, q, k)
        return self.rotate(layer, q, tables, rows), self.rotate(layer, k, tables, rows), v

    def project(self, layer: Any, h: Tensor, want_output: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """q [M, Hq, D], k and v [M, Hk, D] as the projections give them; v has memory to itself."""
        a, m = layer.self_attn, h.shape[0]
        q, k, v = (t.contiguous() for t in linear_group((a.q_proj, a.k_proj, a.v_proj), h, want_output))
        return q.view(m, -1, a.head_dim), k.view(m, -1, a.head_dim), v.view(m, -1, a.head_dim)

    def norm_heads(self, layer: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [M, Hq, D] and keys [M, Hk, D] as they are rotated."""
        return q, k

    def rotate(self, layer: Any, x: Tensor, tables: Tables, rows: Tensor | None) -> Tensor:
        """Queries or keys [M, H, D] with the positions of their rows."""
        cos, sin = self.rotary_tables(layer, tables)
        return ops.rotary(x, cos, sin, rows)

    def rotary_tables(self, layer: Any, tables: Tables) -> tuple[Tensor, Tensor]:
        """Those of one layer, out of what `tables` made for all of them."""
        assert tables is not None
        cos, sin = tables
        return cos, sin

    def attention_output(self, layer: Any, out: Tensor, want_output: bool = True) -> Tensor:
        return linear_group((layer.self_attn.o_proj,), out, want_output)[0]

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor | tuple[Tensor, Tensor]:
        return swiglu(unwrap(layer.mlp), h, want_output)


def swiglu(mlp: Any, h: Tensor, want_output: bool = True) -> Tensor:
    """A gated MLP with transformers' names of its projections, or Liger's equivalent."""
    gate, up = linear_group((mlp.gate_proj, mlp.up_proj), h)
    reuse = made_here(gate) and made_here(up)
    return gated_down(mlp.down_proj, getattr(mlp, "act_fn", None), gate, up, want_output, reuse)


def gated_down(down: nn.Module, act: Any, gate: Tensor, up: Tensor, want_output: bool, reuse: bool) -> Tensor:
    """down(act(gate) * up); act None: SiLU. reuse: gradients may take the memory of gate and up."""
    # The kernels move 16 bytes at a time; no published model has a width that these do not divide.
    fused = (act is None or ordinary(act, *SILU)) and gate.shape[-1] % 8 == 0
    if not fused:
        inner = (F.silu if act is None else act)(gate) * up
    else:
        inner = SwiGLU.apply(gate, up, reuse, want_output or reads_input(down))
        if want_output:
            inner = product_again(inner, ops.swiglu, gate, up)
    return linear_group((down,), inner, want_output)[0]
