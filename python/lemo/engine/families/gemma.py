"""Gemma 2 and the text models of Gemma 3: norms before and after every sub-layer, GeGLU, layers with a window between
those without. Gemma 2 has soft-capped scores and logits; Gemma 3 has norms of queries and keys, and rotary positions
of another base in layers with a window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemo.engine import elementwise
from lemo.engine.elementwise import GeGLU, inner_norm, product_again
from lemo.engine.families.base import AttentionOptions, Classes, ModelShape, NormWeights, Tables, refuse, rms_norm
from lemo.engine.families.llama import Llama
from lemo.engine.linear import linear_group, made_here, ordinary, unwrap

_GELU = ("transformers.activations.GELUTanh",)


class Gemma2(Llama):
    name, model_type = "Gemma2", "gemma2"
    liger = frozenset({"LigerRMSNorm", "LigerRMSNormForGemma2", "LigerGEGLUMLP"})
    norm_offset = 1.0

    def loading(self, config: Any) -> dict[str, Any]:
        return {"attn_implementation": "eager"}  # the only one of transformers' own that computes soft-caps

    def check(self, lm: Any) -> None:
        super().check(lm)
        softcap = self.score_softcap(lm.config)
        if softcap and getattr(lm.config, "_attn_implementation", None) == "sdpa":
            refuse(
                f"attention 'sdpa' with soft-capped scores (attn_logit_softcapping={softcap:g}): transformers then "
                "leaves the soft-cap out of evaluation",
                'load the model with attn_implementation="eager"',
            )

    @cached_property
    def layer_modules(self) -> Mapping[str, Classes]:
        after = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        return {**super().layer_modules, **dict.fromkeys(after, self.own("RMSNorm"))}

    def shape(self, config: Any) -> ModelShape:
        shape = super().shape(config)
        # The norms behind attention and MLP, and their inputs.
        return replace(shape, inner_parameters=2 * shape.hidden, inner_saved=2 * shape.hidden)

    def embed(self, decoder: Any, ids: Tensor | None, embeddings: Tensor | None, positions: Tensor) -> Tensor:
        x = super().embed(decoder, ids, embeddings, positions)
        if hasattr(import_module(self.modeling), f"{self.name}TextScaledWordEmbedding"):
            return x  # the embedding is scaled
        return x * torch.tensor(decoder.config.hidden_size**0.5, dtype=x.dtype)  # Gemma 2 in transformers 5.0

    def norms(self, layer: Any) -> tuple[NormWeights, NormWeights]:
        return self._norm(layer.input_layernorm), self._norm(layer.pre_feedforward_layernorm)

    def score_softcap(self, config: Any) -> float:
        return float(config.attn_logit_softcapping or 0.0)

    def attention_options(self, layer: Any) -> AttentionOptions:
        return replace(super().attention_options(layer), softcap=self.score_softcap(layer.self_attn.config))

    def attention_modules(self, layer: Any) -> Sequence[nn.Module]:
        return *super().attention_modules(layer), layer.post_attention_layernorm

    def mlp_modules(self, layer: Any) -> Sequence[nn.Module]:
        return *super().mlp_modules(layer), layer.post_feedforward_layernorm

    def attention_output(self, layer: Any, out: Tensor, want_output: bool = True) -> Tensor:
        # Whether anyone reads the output or not: the norm's gradient needs its input.
        return inner_norm(super().attention_output(layer, out), self._norm(layer.post_attention_layernorm))

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor:
        return inner_norm(geglu(unwrap(layer.mlp), h), self._norm(layer.post_feedforward_layernorm))

    def _norm(self, module: nn.Module) -> NormWeights:
        return rms_norm(module, self.norm_offset)


class Gemma3(Gemma2):
    name, model_type = "Gemma3", "gemma3_text"
    modeling = "transformers.models.gemma3.modeling_gemma3"
    liger = frozenset({"LigerRMSNorm", "LigerRMSNormForGemma3", "LigerGEGLUMLP"})
    within = "gemma3"

    def loading(self, config: Any) -> dict[str, Any]:
        # Published models from 4B on read images as well; the names of the language model's weights say so.
        return {"attn_implementation": "sdpa", "key_mapping": {r"^language_model\.model\.": "model."}}

    @cached_property
    def outer_modules(self) -> Mapping[str, Classes]:
        return {**super().outer_modules, "model": self.own("TextModel")}

    @cached_property
    def layer_modules(self) -> Mapping[str, Classes]:
        heads = ("self_attn.q_norm", "self_attn.k_norm")
        return {**super().layer_modules, **dict.fromkeys(heads, self.own("RMSNorm"))}

    def shape(self, config: Any) -> ModelShape:
        shape = super().shape(config)
        return replace(
            shape,
            inner_parameters=shape.inner_parameters + 2 * shape.head_dim,
            inner_saved=shape.inner_saved + (shape.heads + shape.kv_heads) * shape.head_dim,
        )

    def score_softcap(self, config: Any) -> float:
        return 0.0  # there is a setting, which transformers' Gemma 3 does not use

    def attention_modules(self, layer: Any) -> Sequence[nn.Module]:
        return *super().attention_modules(layer), layer.self_attn.q_norm, layer.self_attn.k_norm

    def tables(self, decoder: Any, x: Tensor, positions: Tensor) -> Tables:
        kinds = (decoder.rotary_emb(x[None], positions[None], kind) for kind in _kinds(decoder.config))
        return tuple(table[0].contiguous() for kind in kinds for table in kind)

    def rotary_tables(self, layer: Any, tables: Tables) -> tuple[Tensor, Tensor]:
        assert tables is not None
        a = layer.self_attn
        i = 2 * _kinds(a.config).index(a.config.layer_types[a.layer_idx])
        return tables[i], tables[i + 1]

    def norm_heads(self, layer: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        a = layer.self_attn
        return inner_norm(q, self._norm(a.q_norm)), inner_norm(k, self._norm(a.k_norm))


def _kinds(config: Any) -> list[str]:
    """The kinds of layers, in the order of `Gemma3.tables`."""
    return sorted(set(config.layer_types))


def geglu(mlp: Any, h: Tensor) -> Tensor:
    """A gated MLP with GELU, with transformers' names of its projections, or Liger's equivalent."""
    gate, up = linear_group((mlp.gate_proj, mlp.up_proj), h)
    act: Any = getattr(mlp, "act_fn", None)
    # `act` of GELUTanh: the exact function of torch, not the one that older checkpoints name.
    fused = act is None or (ordinary(act, *_GELU) and getattr(act.act, "func", None) is F.gelu)
    if fused:
        reuse = made_here(gate) and made_here(up)
        inner = product_again(GeGLU.apply(gate, up, reuse), elementwise.geglu, gate, up)
    else:
        inner = act(gate) * up
    return linear_group((mlp.down_proj,), inner)[0]
