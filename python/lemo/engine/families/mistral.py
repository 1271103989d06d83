"""Mistral: Llama's layers, and in some versions a sliding window, which documents must not exceed."""

from __future__ import annotations

from lemo.engine.families.llama import Llama


class Mistral(Llama):
    name, model_type = "Mistral", "mistral"
