"""What cannot be computed if several processes share a sequence: refused by name, before anything is changed."""

from __future__ import annotations

from typing import Any

from lemo.engine.checks import loose_modules
from lemo.engine.config import LemoConfig
from lemo.engine.families.base import Family
from lemo.engine.randomness import draws
from lemo.engine.sequence import Group


def check_sequence(group: Group, family: Family, model: Any, config: LemoConfig) -> None:
    """Raises ValueError, naming it, for what `sequence_group` cannot be combined with."""
    group.check_heads(family.shape(model.config))
    for phase in config.phases or ():
        if config.scores_exactly(phase):
            _refuse(
                'policy "exact" needs the queries and keys of all tokens in one process',
                'use "predictors", "update_norm", "sampled" or "random"',
            )
        if phase.mode == "sparse" and phase.tile_policy == "predictors":
            _refuse(
                'tile_policy "predictors" reads tiles of tokens that several processes hold parts of',
                'use tile_policy "probe" or "recent"',
            )
    if config.return_logits:
        _refuse("return_logits=True asks for logits of tokens that other processes hold", "leave it out")
    if config.plans_memory:
        _refuse(
            "memory_budget, offload and recompute_layers plan without the rows that processes exchange",
            'set recompute="full" (or "attention", "none") instead',
        )
    layers = family.layers(family.decoder(model))
    if family.dropout(model) > 0 or draws(loose_modules(family, layers)):
        _refuse(
            "dropout and other randomness in the layers would differ from that of one process",
            "set the model's dropout and lora_dropout to 0",
        )


def _refuse(what: str, instead: str) -> None:
    raise ValueError(f"sequence_group: {what}; {instead}")
