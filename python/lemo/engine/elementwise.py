"""The elementwise part of a layer that has no operator in lemo.ops; it saves only what its gradient needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lemo.ops._autograd import first_order


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
