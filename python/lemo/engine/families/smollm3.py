"""SmolLM3: Llama's layers, of which some, every fourth in the published models, have no position embedding (NoPE)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lemo.engine.families.base import Tables
from lemo.engine.families.llama import Llama


class SmolLM3(Llama):
    name, model_type = "SmolLM3", "smollm3"

    def window(self, config: Any, layer: int) -> int | None:
        return super().window(config, layer) if config.use_sliding_window else None

    def rotate(self, layer: Any, x: Tensor, tables: Tables, rows: Tensor | None) -> Tensor:
        return super().rotate(layer, x, tables, rows) if layer.self_attn.use_rope else x
