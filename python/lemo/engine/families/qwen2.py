"""Qwen2 and Qwen2.5: Llama's layers with biases in the query, key and value projections, and in some versions with a
sliding window in the later ones."""

from __future__ import annotations

from typing import Any

from lemo.engine.families.llama import Llama


class Qwen2(Llama):
    name, model_type = "Qwen2", "qwen2"

    def biases(self, config: Any) -> tuple[str, ...]:
        return ("q", "k", "v")
