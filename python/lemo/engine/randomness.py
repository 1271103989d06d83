"""Which modules draw random numbers, and the generators they draw from.

What is recomputed in the backward pass must draw what the forward pass drew. nn.Dropout is only one way to draw:
adapters drop ranks or whole modules, multiply blocks by random masks, or sample. An unknown module may draw.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine.linear import hooked, unwrap

# PEFT's kinds of adapter that draw nothing unless an attribute named ...dropout is above 0.
_STEADY_PEFT = {"adalora", "boft", "fourierft", "hra", "ia3", "loha", "lokr", "lora", "oft", "vblora", "vera"}
_DRAWING_PEFT = {"monteclora", "pvera"}


def _probability(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_probability(v) for v in value.values())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _draws_itself(module: nn.Module) -> bool | None:
    kind = type(module)
    home = kind.__module__.split(".")
    if isinstance(module, nn.modules.dropout._DropoutNd) or "Dropout" in kind.__name__:
        p = getattr(module, "p", None)
        return _probability(p) if p is not None else None
    if isinstance(module, nn.RReLU) or (home[0] == "peft" and not _DRAWING_PEFT.isdisjoint(home)):
        return True
    if any("dropout" in name and _probability(value) for name, value in module.__dict__.items()):
        return True
    if hooked(module):
        return None
    if home[0] == "peft":
        return False if not _STEADY_PEFT.isdisjoint(home) else None
    return False if home[:2] == ["torch", "nn"] or home[0] in ("transformers", "bitsandbytes") else None


def draws(modules: Sequence[nn.Module]) -> bool | None:
    """Whether any of these modules draws random numbers in training, as dropout does; None: one of them may."""
    answers: set[bool | None] = set()
    for module in modules:
        if hooked(module):
            answers.add(None)
        answers |= {_draws_itself(m) for m in unwrap(module).modules()}
    return True if True in answers else None if None in answers else False


# States of Python's own generator, torch's on the CPU, and torch's on the device.
Generators = tuple[Any, Tensor, Tensor | None]


def generators(device: torch.device) -> Generators:
    """The states of the default generators. Reading them never waits for the device."""
    return random.getstate(), torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_generators(states: Generators, device: torch.device) -> None:
    random.setstate(states[0])
    torch.set_rng_state(states[1])
    if states[2] is not None:
        torch.cuda.set_rng_state(states[2], device)


def same_generators(a: Generators, b: Generators) -> bool:
    device = a[2] is b[2] or (a[2] is not None and b[2] is not None and torch.equal(a[2], b[2]))
    return a[0] == b[0] and torch.equal(a[1], b[1]) and device


def process_rank() -> int:
    """This process's rank in torch.distributed, 0 without it."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
