"""Local graphs: autograd inside one attention or MLP of a layer, from its input to its output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from lemo.engine.linear import Again, remade

# What makes a local graph's start require a gradient. Every graph ends in it, and none gives it one.
_ANCHOR = torch.zeros((), device="cpu", requires_grad=True)


class _Enter(Function):
    """Starts a local graph at h without keeping h alive, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, anchor: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[None, None]:
        return None, None


def address(t: Tensor) -> int:
    """Of the memory that t has, alone or with others."""
    return t.untyped_storage().data_ptr()


class Held:
    """What a local graph saves, by memory: whoever takes `memory` away and puts it back before the graph's backward
    pass has moved all of it. Weights and other tensors that outlive the layer's work stay in the graph.

    stays: addresses of those tensors. memory: uint8 [bytes], each the whole memory of a tensor or of several.
    """

    def __init__(self, stays: frozenset[int]) -> None:
        self.memory: list[Tensor] = []
        self._stays = stays
        self._places: dict[int, int] = {}

    def pack(self, t: Tensor) -> Tensor | HeldTensor:
        """What stands for t in a graph."""
        found = self.find(t)
        if found is not None:
            return found
        # Parameters are of a class of their own, as quantized weights are; views of them have their address.
        if type(t) is not Tensor or not t.numel() or t.layout is not torch.strided or address(t) in self._stays:
            return t
        self._places[address(t)] = len(self.memory)
        self.memory.append(torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.untyped_storage()))
        return self.find(t)  # type: ignore[return-value]

    def find(self, t: Tensor) -> HeldTensor | None:
        """What stands for t if its memory is held."""
        place = self._places.get(address(t)) if type(t) is Tensor and t.numel() else None
        return (
            None if place is None else HeldTensor(self, place, t.dtype, t.size(), t.stride(), int(t.storage_offset()))
        )


@dataclass(frozen=True, eq=False)
class HeldTensor:
    """A tensor whose memory is held: number `place` of it."""

    held: Held
    place: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        memory = self.held.memory[self.place]
        empty = torch.empty(0, dtype=self.dtype, device=memory.device)
        return empty.set_(memory.untyped_storage(), self.offset, self.size, self.stride)


def _unpack(saved: Tensor | HeldTensor) -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.tensor()


@dataclass(eq=False)
class Segment:
    """The graph from h to y. Neither h nor y is kept unless the graph itself needs it.

    statistics: the other end, if the function has a second output with a gradient. held: what the graph saves, if that
    may be moved.
    """

    enter: GradientEdge
    leave: GradientEdge
    statistics: GradientEdge | None = None
    held: Held | None = None

    def backward(
        self, dy: Tensor, params: Sequence[Tensor], dstatistics: Tensor | None = None
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """dh, and the gradients of params (None if the graph does not reach one). Frees the graph."""
        ends, given = [self.leave], [dy]
        if self.statistics is not None and dstatistics is not None:
            ends, given = [self.leave, self.statistics], [dy, dstatistics]
        grads = torch.autograd.grad(ends, [self.enter, *params], given, allow_unused=True)  # type: ignore[arg-type]
        return grads[0], grads[1:]


def trace(
    function: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
    h: Tensor,
    note: Callable[[Tensor], None] | None = None,
    again: Again | None = None,
    held: Held | None = None,
) -> tuple[Tensor, Segment]:
    """function(h) with its local graph. note: gets the second output, if there is one; again: makes h once more in the
    backward pass, so that projections do not save it; held: takes what the graph saves."""
    hooks = contextlib.nullcontext() if held is None else saved_tensors_hooks(held.pack, _unpack)
    with torch.enable_grad(), hooks:
        start = _Enter.apply(h.detach(), _ANCHOR)
        if again is not None:
            remade(start, again)
        edge = get_gradient_edge(start)
        y, statistics = split(function(start))
        if statistics is not None and note is not None:
            note(statistics)
        second = None if statistics is None or not statistics.requires_grad else get_gradient_edge(statistics)
        return y.detach(), Segment(edge, get_gradient_edge(y), second, held)


def gradients_through(
    function: Callable[[Tensor], Sequence[Tensor]], h: Tensor, dys: Sequence[Tensor], params: Sequence[Tensor]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """dh, and the gradients of params (None if the graph does not reach one), of a function with several outputs."""
    with torch.enable_grad():
        start = _Enter.apply(h.detach(), torch.zeros((), requires_grad=True))
        edge, ends = get_gradient_edge(start), [get_gradient_edge(y) for y in function(start)]
    del start
    grads = torch.autograd.grad(ends, [edge, *params], dys, allow_unused=True)  # type: ignore[arg-type]
    return grads[0], grads[1:]


def split(output: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The two outputs of an MLP; the second is None for most families."""
    return (output, None) if isinstance(output, Tensor) else output
