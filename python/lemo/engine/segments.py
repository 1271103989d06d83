"""Local graphs: autograd inside one attention or MLP of a layer, from its input to its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lemo.engine.linear import remade

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


@dataclass(eq=False)
class Segment:
    """The graph from h to y. Neither h nor y is kept unless the graph itself needs it.

    statistics: the other end, if the function has a second output with a gradient.
    """

    enter: GradientEdge
    leave: GradientEdge
    statistics: GradientEdge | None = None

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
    again: Callable[[], Tensor] | None = None,
) -> tuple[Tensor, Segment]:
    """function(h) with its local graph. note: gets the second output, if there is one; again: makes h once more in the
    backward pass, so that projections do not save it."""
    with torch.enable_grad():
        start = _Enter.apply(h.detach(), _ANCHOR)
        if again is not None:
            remade(start, again)
        edge = get_gradient_edge(start)
        y, statistics = split(function(start))
        if statistics is not None and note is not None:
            note(statistics)
        second = None if statistics is None or not statistics.requires_grad else get_gradient_edge(statistics)
        return y.detach(), Segment(edge, get_gradient_edge(y), second)


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
