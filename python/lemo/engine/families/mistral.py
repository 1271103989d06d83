"""Mistral: Llama's layers, in some versions with a sliding window in all of them. Ministral: in some of them."""

from __future__ import annotations

from typing import Any

from lemo.engine.families.llama import Llama


class Mistral(Llama):
    name, model_type = "Mistral", "mistral"

    def window(self, config: Any, layer: int) -> int | None:
        return config.sliding_window


class Ministral(Llama):
    name, model_type = "Ministral", "ministral"
