"""A stand-in for CUDA graphs on the CPU: records operators with the memory they use, and runs the same ones again.

Like a graph, a tape knows nothing of the Python around the operators: numbers that the host decided stay as they were,
and whatever changes has to be in the memory that was recorded. Reading a value on the host fails while it records.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What makes the host wait, or takes memory of the host that a graph would read again.
FORBIDDEN = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "lift_fresh", "rand")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _refuse(tensor: Tensor) -> None:
    raise RuntimeError("operation not permitted when stream is capturing: tolist")


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().rpartition("::")[2].partition(".")[0]
        if name in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        given = {_storage(t) for t in _tensors((args, kwargs))}
        self.calls.append((function, args, kwargs, [t for t in _tensors(output) if _storage(t) not in given]))
        return output

    @torch.no_grad()
    def play(self) -> None:
        for function, args, kwargs, outputs in self.calls:
            given = {_storage(t) for t in _tensors((args, kwargs))}
            made = [t for t in _tensors(function(*args, **kwargs)) if _storage(t) not in given]
            for old, new in zip(outputs, made, strict=True):
                old.copy_(new)


class Recorder:
    """tapes: in the order in which they were recorded."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        tape = Tape()
        with tape, mock.patch.object(torch.Tensor, "tolist", _refuse):  # which the dispatcher does not see
            work()
        self.tapes.append(tape)
        return tape.play

    def read_from_outside(self) -> list[StorageWeakRef]:
        """The memory that the tapes use and did not make, which they hold no longer after this, as graphs do not: they
        cannot be played again."""
        made = {_storage(t) for tape in self.tapes for call in tape.calls for t in call[3]}
        used = (t for tape in self.tapes for call in tape.calls for t in _tensors(call[1:3]))
        found = {_storage(t): StorageWeakRef(t.untyped_storage()) for t in used if _storage(t) not in made}
        for tape in self.tapes:
            tape.calls.clear()
        return list(found.values())
