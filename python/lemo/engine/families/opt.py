"""OPT: LayerNorm, multi-head attention with learned positions, ReLU MLP, biases and dropout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lemo.engine.elementwise import ReLU
from lemo.engine.families.base import Classes, Family, NormWeights, Tables, layer_norm, refuse
from lemo.engine.linear import linear_group, ordinary, projection, unwrap

_MODELING = "transformers.models.opt.modeling_opt"
_NORM: Classes = (("torch.nn.modules.normalization", "LayerNorm"),)


class OPT(Family):
    model_class = "OPTForCausalLM"
    model_type = "opt"
    modeling = _MODELING
    functions = ("eager_attention_forward", "create_causal_mask")
    outer_modules: Mapping[str, Classes] = {
        "model": ((_MODELING, "OPTModel"),),
        "model.decoder": ((_MODELING, "OPTDecoder"),),
        "model.decoder.final_layer_norm": _NORM,
    }
    layer_modules: Mapping[str, Classes] = {
        "": ((_MODELING, "OPTDecoderLayer"),),
        "self_attn": ((_MODELING, "OPTAttention"),),
        "self_attn_layer_norm": _NORM,
        "final_layer_norm": _NORM,
    }
    layers_path = "model.decoder.layers"

    def check(self, lm: Any) -> None:
        config = lm.config
        if not config.do_layer_norm_before:
            refuse(
                "OPT with the norm after the sub-layer (do_layer_norm_before=False, as OPT-350m has)",
                "every other size of OPT has the norm before it",
            )
        if config.word_embed_proj_dim != config.hidden_size:
            refuse("OPT with projected embeddings (word_embed_proj_dim != hidden_size)", "use another size of OPT")
        if config.attention_dropout:
            refuse(f"attention dropout (attention_dropout={config.attention_dropout})", "set it to 0")
        if config.layerdrop:
            refuse(f"LayerDrop (layerdrop={config.layerdrop})", "set it to 0")

    def decoder(self, lm: Any) -> Any:
        return lm.model.decoder

    def embed(self, decoder: Any, ids: Tensor | None, embeddings: Tensor | None, positions: Tensor) -> Tensor:
        x = decoder.embed_tokens(ids[None])[0] if embeddings is None else embeddings  # type: ignore[index]
        return x + decoder.embed_positions(None, 0, position_ids=positions[None])[0]

    def default_positions(self, mask: Tensor) -> Tensor:
        return (mask.cumsum(1) * mask - 1).long()

    def tables(self, decoder: Any, x: Tensor, positions: Tensor) -> Tables:
        return None

    def norms(self, layer: Any) -> tuple[NormWeights, NormWeights]:
        return layer_norm(layer.self_attn_layer_norm), layer_norm(layer.final_layer_norm)

    def norm_modules(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return unwrap(layer.self_attn_layer_norm), unwrap(layer.final_layer_norm)

    def final_norm(self, decoder: Any) -> NormWeights | None:
        return None if decoder.final_layer_norm is None else layer_norm(decoder.final_layer_norm)

    def attention_modules(self, layer: Any) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        a = layer.self_attn
        return a.q_proj, a.k_proj, a.v_proj, a.out_proj

    def mlp_modules(self, layer: Any) -> tuple[nn.Module, ...]:
        return layer.fc1, layer.fc2, layer.activation_fn

    def queries_keys_values(
        self, layer: Any, h: Tensor, tables: Tables, rows: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, m = layer.self_attn, h.shape[0]
        q, k, v = linear_group((a.q_proj, a.k_proj, a.v_proj), h)
        return q.view(m, -1, a.head_dim), k.view(m, -1, a.head_dim), v.view(m, -1, a.head_dim)

    def attention_output(self, layer: Any, out: Tensor, want_output: bool = True) -> Tensor:
        return self._drop(layer, linear_group((layer.self_attn.out_proj,), out, want_output)[0])

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor:
        (inner,) = linear_group((layer.fc1,), h)
        # In place of what fc1 gave, unless someone else may hold that too.
        relu = ordinary(layer.activation_fn, "torch.nn.modules.activation.ReLU") and projection(layer.fc1) is not None
        (y,) = linear_group((layer.fc2,), ReLU.apply(inner) if relu else layer.activation_fn(inner), want_output)
        return self._drop(layer, y)

    @staticmethod
    def _drop(layer: Any, y: Tensor) -> Tensor:
        return F.dropout(y, layer.dropout, training=True) if layer.dropout > 0 and layer.training else y

    def scale(self, layer: Any) -> float:
        return float(layer.self_attn.scaling)

    def dropout(self, lm: Any) -> float:
        return max(float(layer.dropout) for layer in self.decoder(lm).layers)
