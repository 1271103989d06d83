"""Elementwise functions of a layer other than those of lemo.ops; each saves only what its gradient needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lemo import ops
from lemo.engine.linear import Again, remade
from lemo.ops._autograd import first_order

if TYPE_CHECKING:  # families import this module
    from lemo.engine.families.base import NormWeights


class SwiGLU(Function):
    """`ops.swiglu` [M, f]. Saves gate and up.

    reuse: their gradients take their memory, which nothing else reads by then. want_output False, for recomputation if
    nothing reads the values: zeros without separate memory.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, reuse: bool, want_output: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.reuse = reuse
        return ops.swiglu(gate, up) if want_output else gate.new_zeros(1, 1).expand_as(gate)

    @staticmethod
    @first_order("SwiGLU")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = (t.detach() for t in ctx.saved_tensors)
        if not ctx.reuse:
            return *ops.swiglu_backward(dy.contiguous(), gate, up), None, None
        return *ops.swiglu_backward_(dy.contiguous(), gate, up), None, None


# Rows at a time, between whose gradients an intermediate result lives.
_GEGLU_ROWS = 2048


class GeGLU(Function):
    """gelu(gate) * up [M, f], GELU approximated by tanh. Saves gate and up; reuse: as of `SwiGLU`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, reuse: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.reuse = reuse
        return geglu(gate, up)

    @staticmethod
    @first_order("GeGLU")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = (t.detach() for t in ctx.saved_tensors)
        dgate, dup = (gate, up) if ctx.reuse else (torch.empty_like(gate), torch.empty_like(up))
        for start in range(0, dy.shape[0], _GEGLU_ROWS):
            c = slice(start, start + _GEGLU_ROWS)
            dact = dy[c] * up[c]
            torch.ops.aten.gelu.out(gate[c], approximate="tanh", out=dup[c]).mul_(dy[c])
            torch.ops.aten.gelu_backward.grad_input(dact, gate[c], approximate="tanh", grad_input=dgate[c])
        return dgate, dup, None


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up."""
    return F.gelu(gate, approximate="tanh").mul_(up)


def product_again(inner: Tensor, product: Callable[[Tensor, Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """inner = product(gate, up), which the projection after it need not save: gate and up are saved anyway."""
    if not inner.requires_grad:
        return inner
    return remade(inner, Again(product, (gate.detach(), up.detach())))


class InnerNorm(Function):
    """A norm within a sub-layer, of rows x [M, d]: of the heads of queries and keys, or of what a sub-layer adds.

    Saves x; the factor offset + weight is made again in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, n: NormWeights) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm, ctx.depends = n, n.parameters
        return ops.gather_norm(x, None, None, *n.operands, n.kind, n.eps)[0]

    @staticmethod
    @first_order("a norm within a layer")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        n = ctx.norm
        dx, *found = ops.gather_norm_backward(
            dy.contiguous(), x, n.operands[0], None, n.kind, n.eps, *ctx.needs_input_grad[1:3]
        )
        grads = (None if g is None else g.to(p.dtype) for g, p in zip(found, n.parameters, strict=True))
        return dx, *grads, None


def inner_norm(x: Tensor, n: NormWeights) -> Tensor:
    """The norm of the last dimension of x, which is contiguous."""
    return InnerNorm.apply(x.view(-1, x.shape[-1]), *n.parameters, n).view(x.shape)


class ReLU(Function):
    """max(x, 0) [M, f], computed in place of x. Its output is all that the gradient needs, and the next projection's
    input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        y = x.relu_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @first_order("ReLU")
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(dy, y, 0.0)
