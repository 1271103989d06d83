"""Llama 2 and 3: RMSNorm, grouped-query attention with rotary positions, SwiGLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine.elementwise import Rope, SwiGLU
from lemo.engine.families.base import Classes, Family, NormWeights, Tables, refuse, rms_norm
from lemo.engine.linear import linear_group, ordinary, unwrap

_MODELING = "transformers.models.llama.modeling_llama"
_SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
_NORM: Classes = ((_MODELING, "LlamaRMSNorm"),)


class Llama(Family):
    model_class = "LlamaForCausalLM"
    model_type = "llama"
    modeling = _MODELING
    functions = ("apply_rotary_pos_emb", "rotate_half", "repeat_kv", "eager_attention_forward", "create_causal_mask")
    outer_modules: Mapping[str, Classes] = {
        "model": ((_MODELING, "LlamaModel"),),
        "model.norm": _NORM,
        "model.rotary_emb": ((_MODELING, "LlamaRotaryEmbedding"),),
    }
    layer_modules: Mapping[str, Classes] = {
        "": ((_MODELING, "LlamaDecoderLayer"),),
        "self_attn": ((_MODELING, "LlamaAttention"),),
        "mlp": ((_MODELING, "LlamaMLP"),),
        "input_layernorm": _NORM,
        "post_attention_layernorm": _NORM,
    }
    layers_path = "model.layers"

    def check(self, lm: Any) -> None:
        config = lm.config
        if getattr(config, "attention_dropout", 0.0):
            refuse(f"attention dropout (attention_dropout={config.attention_dropout})", "set it to 0")
        if getattr(config, "sliding_window", None):
            refuse(f"sliding-window attention (sliding_window={config.sliding_window})", "full causal attention only")

    def decoder(self, lm: Any) -> Any:
        return lm.model

    def embed(self, decoder: Any, ids: Tensor | None, embeddings: Tensor | None, positions: Tensor) -> Tensor:
        # A leading dimension of 1: hooks on the embedding (NEFTune) expect a batch.
        return decoder.embed_tokens(ids[None])[0] if embeddings is None else embeddings  # type: ignore[index]

    def default_positions(self, mask: Tensor) -> Tensor:
        return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)

    def tables(self, decoder: Any, x: Tensor, positions: Tensor) -> Tables:
        cos, sin = decoder.rotary_emb(x[None], positions[None])
        return cos[0].contiguous(), sin[0].contiguous()

    def norms(self, layer: Any) -> tuple[NormWeights, NormWeights]:
        return rms_norm(layer.input_layernorm), rms_norm(layer.post_attention_layernorm)

    def norm_modules(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return unwrap(layer.input_layernorm), unwrap(layer.post_attention_layernorm)

    def final_norm(self, decoder: Any) -> NormWeights:
        return rms_norm(decoder.norm)

    def attention_modules(self, layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        a = layer.self_attn
        return a.q_proj, a.k_proj, a.v_proj, a.o_proj

    def mlp_modules(self, layer: Any) -> tuple[nn.Module, ...]:
        mlp = unwrap(layer.mlp)
        modules = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        return (*modules, mlp.act_fn) if hasattr(mlp, "act_fn") else modules  # Liger's has SiLU built in

    def queries_keys_values(
        self, layer: Any, h: Tensor, tables: Tables, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, m = layer.self_attn, h.shape[0]
        q, k, v = linear_group((a.q_proj, a.k_proj, a.v_proj), h)
        assert tables is not None
        q = Rope.apply(q.view(m, -1, a.head_dim), *tables, rows)
        k = Rope.apply(k.view(m, -1, a.head_dim), *tables, rows)
        return q, k, v.view(m, -1, a.head_dim)

    def attention_output(self, layer: Any, out: Tensor, want_output: bool = True) -> Tensor:
        return linear_group((layer.self_attn.o_proj,), out, want_output)[0]

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor:
        mlp: Any = unwrap(layer.mlp)
        gate, up = linear_group((mlp.gate_proj, mlp.up_proj), h)
        act: Any = getattr(mlp, "act_fn", None)
        silu = act is None or ordinary(act, *_SILU)
        inner = SwiGLU.apply(gate, up) if silu else act(gate) * up
        return linear_group((mlp.down_proj,), inner, want_output)[0]

    def scale(self, layer: Any) -> float:
        return float(layer.self_attn.scaling)

    def dropout(self, lm: Any) -> float:
        return 0.0
