"""Autograd graphs inside the stack: each spans one attention or MLP, and is freed by its own backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge


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
    """The graph from h [M, d] to y [M, d]. Neither h nor y is kept unless the graph itself needs it."""

    enter: GradientEdge
    leave: GradientEdge

    def backward(self, dy: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """dh, and the gradients of params (None where the graph does not reach one). Frees the graph."""
        grads = torch.autograd.grad((self.leave,), [self.enter, *params], (dy,), allow_unused=True)  # type: ignore[arg-type]
        return grads[0], grads[1:]


def trace(function: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Segment]:
    """function(h) with its local graph."""
    with torch.enable_grad():
        start = _Enter.apply(h.detach(), torch.zeros((), requires_grad=True))
        edge = get_gradient_edge(start)
        y = function(start)
        return y.detach(), Segment(edge, get_gradient_edge(y))
