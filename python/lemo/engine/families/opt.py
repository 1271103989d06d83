"""OPT: LayerNorm, multi-head attention with learned positions, ReLU MLP, biases and dropout. OPT-350m has its norms
behind residual sums, and embeddings that are projected to and from the width of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lemo.engine.elementwise import ReLU
from lemo.engine.families.base import Classes, Family, ModelShape, NormWeights, Tables, layer_norm, refuse
from lemo.engine.linear import linear_group, ordinary, projection, reads_input

_NORM: Classes = (("torch.nn.modules.normalization", "LayerNorm"),)


class OPT(Family):
    name, model_type = "OPT", "opt"
    liger = frozenset({"LigerLayerNorm"})
    layers_path = "model.decoder.layers"
    projections: Mapping[str, str] = {
        "q_proj": "q",
        "k_proj": "k",
        "v_proj": "v",
        "out_proj": "o",
        "fc1": "up",
        "fc2": "down",
    }

    @cached_property
    def outer_modules(self) -> Mapping[str, Classes]:
        return {
            "model": self.own("Model"),
            "model.decoder": self.own("Decoder"),
            "model.decoder.final_layer_norm": _NORM,
        }

    @cached_property
    def layer_modules(self) -> Mapping[str, Classes]:
        return {
            "": self.own("DecoderLayer"),
            "self_attn": self.own("Attention"),
            "self_attn_layer_norm": _NORM,
            "final_layer_norm": _NORM,
        }

    def shape(self, config: Any) -> ModelShape:
        heads = config.num_attention_heads
        return ModelShape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=heads,
            head_dim=config.hidden_size // heads,
            ffn=config.ffn_dim,
            vocab=config.vocab_size,
            gated=False,
            tied=bool(config.tie_word_embeddings),
            positions=config.max_position_embeddings + 2,
            biases=("q", "k", "v", "o", "up", "down") if config.enable_bias else (),
            relu=config.activation_function == "relu",
            post_norm=not config.do_layer_norm_before,
            embedding=0 if config.word_embed_proj_dim == config.hidden_size else config.word_embed_proj_dim,
        )

    def check(self, lm: Any) -> None:
        super().check(lm)
        if lm.config.layerdrop:
            refuse(f"LayerDrop (layerdrop={lm.config.layerdrop})", "set it to 0")

    def decoder(self, lm: Any) -> Any:
        return lm.model.decoder

    def embed(self, decoder: Any, ids: Tensor | None, embeddings: Tensor | None, positions: Tensor) -> Tensor:
        x = super().embed(decoder, ids, embeddings, positions)
        if decoder.project_in is not None:
            x = decoder.project_in(x)
        return x + decoder.embed_positions(None, 0, position_ids=positions[None])[0]

    def default_positions(self, mask: Tensor) -> Tensor:
        return (mask.cumsum(1) * mask - 1).long()

    def tables(self, decoder: Any, x: Tensor, positions: Tensor) -> Tables:
        return None

    def norms(self, layer: Any) -> tuple[NormWeights, NormWeights]:
        after = not layer.do_layer_norm_before
        return layer_norm(layer.self_attn_layer_norm, after), layer_norm(layer.final_layer_norm, after)

    def final_norm(self, decoder: Any) -> NormWeights | None:
        return None if decoder.final_layer_norm is None else layer_norm(decoder.final_layer_norm)

    def project_out(self, decoder: Any) -> nn.Module | None:
        return decoder.project_out

    def final_modules(self, decoder: Any) -> Sequence[nn.Module | None]:
        return decoder.final_layer_norm, decoder.project_out

    def outside_modules(self, decoder: Any) -> Sequence[nn.Module]:
        projected = () if decoder.project_in is None else (decoder.project_in, decoder.project_out)
        return decoder.embed_tokens, decoder.embed_positions, *projected

    def attention_modules(self, layer: Any) -> Sequence[nn.Module]:
        a = layer.self_attn
        return a.q_proj, a.k_proj, a.v_proj, a.out_proj

    def mlp_modules(self, layer: Any) -> Sequence[nn.Module]:
        return layer.fc1, layer.fc2, layer.activation_fn

    def queries_keys_values(
        self, layer: Any, h: Tensor, tables: Tables, rows: Tensor | None, want_output: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        a, m = layer.self_attn, h.shape[0]
        q, k, v = linear_group((a.q_proj, a.k_proj, a.v_proj), h, want_output)
        return q.view(m, -1, a.head_dim), k.view(m, -1, a.head_dim), v.view(m, -1, a.head_dim)

    def attention_output(self, layer: Any, out: Tensor, want_output: bool = True) -> Tensor:
        return self._drop(layer, linear_group((layer.self_attn.out_proj,), out, want_output)[0])

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor:
        (inner,) = linear_group((layer.fc1,), h)
        # In place of what fc1 gave, unless someone else may hold that too.
        if ordinary(layer.activation_fn, "torch.nn.modules.activation.ReLU") and projection(layer.fc1) is not None:
            inner = ReLU.apply(inner, reads_input(layer.fc2))
        else:
            inner = layer.activation_fn(inner)
        return self._drop(layer, linear_group((layer.fc2,), inner, want_output)[0])

    @staticmethod
    def _drop(layer: Any, y: Tensor) -> Tensor:
        return F.dropout(y, layer.dropout, training=True) if layer.dropout > 0 and layer.training else y

    def dropout(self, lm: Any) -> float:
        return max(float(layer.dropout) for layer in self.decoder(lm).layers)
