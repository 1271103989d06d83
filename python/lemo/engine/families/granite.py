"""Granite 3 and later dense models: Llama's layers, with factors of the embedding, of what every sub-layer adds, of the
scores and of the logits. (That of the scores is the attention's scale.)"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lemo.engine.families.llama import Llama, swiglu
from lemo.engine.linear import unwrap


class Granite(Llama):
    name, model_type = "Granite", "granite"

    def logit_scale(self, config: Any) -> float:
        return 1.0 / float(config.logits_scaling)

    def embed(self, decoder: Any, ids: Tensor | None, embeddings: Tensor | None, positions: Tensor) -> Tensor:
        return super().embed(decoder, ids, embeddings, positions) * decoder.embedding_multiplier

    def attention_output(self, layer: Any, out: Tensor, want_output: bool = True) -> Tensor:
        return super().attention_output(layer, out, want_output) * layer.residual_multiplier

    def mlp(self, layer: Any, h: Tensor, want_output: bool = True) -> Tensor:
        return swiglu(unwrap(layer.mlp), h, want_output) * layer.residual_multiplier
