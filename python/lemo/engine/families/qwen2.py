"""Qwen2 and Qwen2.5: Llama's layers with biases in the query, key and value projections."""

from __future__ import annotations

from typing import Any

from lemo.engine.families.base import refuse
from lemo.engine.families.llama import Llama


class Qwen2(Llama):
    name, model_type = "Qwen2", "qwen2"

    def biases(self, config: Any) -> tuple[str, ...]:
        return ("q", "k", "v")

    def window(self, config: Any) -> int | None:
        return config.sliding_window if config.use_sliding_window else None

    def check(self, lm: Any) -> None:
        super().check(lm)
        config = lm.config
        if config.use_sliding_window:
            refuse(
                f"sliding-window attention (use_sliding_window=True of {self.model_class}, "
                f"sliding_window={config.sliding_window})",
                "load it with use_sliding_window=False, so that every layer sees all tokens before its own",
            )
