"""Mixtures of experts: every row goes through a few gated MLPs, and their outputs are added with the router's weights.

Weights of all experts are stacked, [E, 2 f, d] and [E, d, f], as transformers stores them. Rows are sorted by expert,
so that an expert is one product for all of its rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from lemo import ops
from lemo.ops._autograd import first_order


def route(logits: Tensor, per_token: int, normed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of the router's logits [M, E]: probabilities float32 [M, E], the experts of every row int64 [M, k], and their
    weights [M, k]."""
    probabilities = logits.softmax(-1, dtype=torch.float32)
    weights, index = probabilities.topk(per_token, -1)
    if normed:
        weights = weights / weights.sum(-1, keepdim=True)
    return probabilities, index, weights.to(logits.dtype)


def experts(
    h: Tensor, index: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, want_output: bool = True
) -> Tensor:
    """sum over j of weights[:, j] * expert(index[:, j]) of h, [M, d]; experts are SwiGLU MLPs, and frozen.

    h [M, d]; index int64 [M, k]; weights [M, k]; gate_up [E, 2 f, d]; down [E, d, f]. want_output False: only the graph
    is needed; values are zeros without separate memory.
    """
    return _Experts.apply(h, weights, index, gate_up, down, want_output)


class _Experts(Function):
    """Saves gate and up [M k, 2 f], the weights, and the order of the rows."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weights: Tensor, index: Tensor, gate_up: Tensor, down: Tensor, want_output: bool
    ) -> Tensor:
        order = index.flatten().argsort(stable=True)
        ends = _ends(index, gate_up.shape[0])
        inner = _grouped(h.index_select(0, order // index.shape[1]), gate_up.transpose(1, 2), ends)
        ctx.save_for_backward(inner, weights, order, ends, gate_up, down)
        if not want_output:
            return h.new_zeros(1, 1).expand_as(h)
        y = _grouped(_swiglu(*inner.chunk(2, 1)), down.transpose(1, 2), ends)
        return _combine(y, order, weights)

    @staticmethod
    @first_order("a mixture of experts")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inner, weights, order, ends, gate_up, down = ctx.saved_tensors
        k, (gate, up) = weights.shape[1], inner.chunk(2, 1)
        dproduct = _grouped(dy.index_select(0, order // k), down, ends)
        by_expert = (dproduct * _swiglu(gate, up)).sum(1, dtype=torch.float32)
        dweights = torch.empty_like(by_expert).index_copy_(0, order, by_expert).view_as(weights).to(weights.dtype)
        dproduct *= weights.flatten().index_select(0, order)[:, None]
        dinner = torch.cat(_swiglu_backward(dproduct, gate, up), 1)
        dh = _combine(_grouped(dinner, gate_up, ends), order, torch.ones_like(weights))
        return dh, dweights, None, None, None, None


def _ends(index: Tensor, count: int) -> Tensor:
    """int32 [E]: the row behind the last one of every expert, in the order of experts."""
    ones = torch.ones((), dtype=torch.int32, device=index.device).expand(index.numel())
    counts = torch.zeros(count, dtype=torch.int32, device=index.device).scatter_add_(0, index.flatten(), ones)
    return counts.cumsum(0, dtype=torch.int32)


def _grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x[i] @ weights[e] for the rows of every expert e, [S, o]; x [S, d], weights [E, d, o], ends int32 [E]."""
    weights = weights.to(x.dtype)
    if x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        return F.grouped_mm(x, weights, offs=ends)
    y = x.new_empty(x.shape[0], weights.shape[2])
    start = 0
    for e, end in enumerate(ends.tolist()):  # waits for the device, which only grouped products avoid
        if end > start:
            torch.mm(x[start:end], weights[e], out=y[start:end])
        start = end
    return y


def _combine(y: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """[M, d]: the rows y [M k, d], which are in `order`, added with weights [M, k]. Always in the same order."""
    m, k = weights.shape
    back = torch.empty_like(order).index_copy_(0, order, torch.arange(m * k, device=order.device))
    return torch.bmm(weights[:, None], y.index_select(0, back).view(m, k, -1)).squeeze(1)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    # The kernels move 16 bytes at a time.
    return ops.swiglu(gate, up) if gate.shape[1] % 8 == 0 else F.silu(gate) * up


def _swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    if gate.shape[1] % 8 == 0:
        return ops.swiglu_backward(dy, gate, up)
    return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)
