"""Autograd functions for the inside of a layer; each saves only what its gradient needs.

Shapes: M packed rows; h [M, d] a norm's output. Saved per row: `Rope` nothing (tables and rows are shared), `SwiGLU`
gate and up, `ReLU` its output once, `LinearGroup` (lemo.engine.linear) its input once for all projections that read it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lemo.ops._autograd import first_order


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotates pairs (i, i + D/2) of every head by +-angle. x [M, H, D]; cos, sin [M, D] with equal halves."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    c, s = cos[:, None, :half], sin[:, None, :half]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(first, c, out=out[..., :half]).addcmul_(second, s, value=-sign)
    torch.mul(second, c, out=out[..., half:]).addcmul_(first, s, value=sign)
    return out


class Rope(Function):
    """Rotary position embedding of packed rows at their original positions.

    x [M, H, D]; cos, sin [T, D] of the whole batch; rows int32 [M], or None if packed rows are all tokens; sign -1
    rotates back. The tables belong to the step and the rows to the layer's kept list: nothing is saved for x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, sign: float = 1.0) -> Tensor:
        ctx.tables, ctx.sign = (cos, sin, rows), sign
        if rows is not None:
            cos, sin = cos.index_select(0, rows), sin.index_select(0, rows)
        return _rotate(x, cos, sin, sign)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        # Linear in x, so that every derivative is a rotation.
        return Rope.apply(dy, *ctx.tables, -ctx.sign), None, None, None, None


class SwiGLU(Function):
    """silu(gate) * up, both [M, f]; the product and silu(gate) are recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @first_order("SwiGLU")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), dup


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
