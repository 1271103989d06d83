"""Mixtures of experts: every row goes through a few gated MLPs, and their outputs are added with the router's weights.

Weights of all experts are stacked. Rows are sorted by expert, so that an expert is one product for all of its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


def row_statistics(probabilities: Tensor, index: Tensor) -> Tensor:
    """float32 [M, 2 E + 1], what `balance` needs of every row: probabilities, which experts it went to, and 1."""
    chosen = torch.zeros_like(probabilities).scatter_(1, index, 1.0)
    return torch.cat((probabilities, chosen, torch.ones_like(probabilities[:, :1])), 1)


def balance(statistics: Tensor, count: int) -> Tensor:
    """transformers' loss of the experts' load, over the rows of all layers together; statistics [L, 2 E + 1]: sums."""
    probabilities, chosen, rows = statistics.sum(0).split((count, count, 1))
    rows = rows.clamp(min=1)
    return count * (probabilities / rows * (chosen / rows)).sum()


@dataclass(frozen=True, eq=False)
class Gate:
    """What experts do with their inner rows [S, 2 f], gate and up. product: [S, f] of them; gradient: their gradient
    [S, 2 f] from that of the product [S, f] and from them, whose memory it may take."""

    product: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Stacked:
    """The frozen weights of E experts: gate_up [E, d, 2 f], down [E, f, d]; their biases [E, 2 f], [E, d] or None."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def count(self) -> int:
        return self.gate_up.shape[0]


def experts(
    h: Tensor, index: Tensor, weights: Tensor, stacked: Stacked, gate: Gate | None = None, want_output: bool = True
) -> Tensor:
    """sum over j of weights[:, j] * expert(index[:, j]) of h, [M, d].

    h [M, d]; index int64 [M, k]; weights [M, k]; gate None: SwiGLU, gates before ups. want_output False: only the graph
    is needed; values are zeros without separate memory.
    """
    return _Experts.apply(h, weights, index, stacked, gate or _SWIGLU, want_output)


class _Experts(Function):
    """Saves gate and up [M k, 2 f], the weights, and the order of the rows."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weights: Tensor, index: Tensor, stacked: Stacked, gate: Gate, want_output: bool
    ) -> Tensor:
        order = index.flatten().argsort(stable=True)
        ends = _ends(index, stacked.count)
        inner = _grouped(h.index_select(0, order // index.shape[1]), stacked.gate_up, ends, stacked.gate_up_bias)
        ctx.save_for_backward(inner, weights, order, ends)
        ctx.stacked, ctx.gate = stacked, gate
        if not want_output:
            return h.new_zeros(1, 1).expand_as(h)
        return _combine(_grouped(gate.product(inner), stacked.down, ends, stacked.down_bias), order, weights)

    @staticmethod
    @first_order("a mixture of experts")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        inner, weights, order, ends = ctx.saved_tensors
        stacked, gate = ctx.stacked, ctx.gate
        dy = dy.index_select(0, order // weights.shape[1])
        dproduct = _grouped(dy, stacked.down.transpose(1, 2), ends)
        by_expert = (dproduct * gate.product(inner)).sum(1, dtype=torch.float32)
        if stacked.down_bias is not None:
            by_expert += (dy * _of_rows(stacked.down_bias, ends, dy)).sum(1, dtype=torch.float32)
        del dy
        dweights = torch.empty_like(by_expert).index_copy_(0, order, by_expert).view_as(weights).to(weights.dtype)
        dproduct *= weights.flatten().index_select(0, order)[:, None]
        dinner = gate.gradient(dproduct, inner)
        dh = _combine(_grouped(dinner, stacked.gate_up.transpose(1, 2), ends), order, torch.ones_like(weights))
        return dh, dweights, None, None, None, None


def _ends(index: Tensor, count: int) -> Tensor:
    """int32 [E]: the row behind the last one of every expert, in the order of experts."""
    ones = torch.ones((), dtype=torch.int32, device=index.device).expand(index.numel())
    counts = torch.zeros(count, dtype=torch.int32, device=index.device).scatter_add_(0, index.flatten(), ones)
    return counts.cumsum(0, dtype=torch.int32)


def _of_rows(values: Tensor, ends: Tensor, x: Tensor) -> Tensor:
    """values[e] for the rows x [S, d] of every expert e, in the dtype of x; values [E, o]."""
    expert = torch.bucketize(torch.arange(x.shape[0], device=x.device), ends, right=True)
    return values.to(x.dtype).index_select(0, expert)


def _grouped(x: Tensor, weights: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
    """x[i] @ weights[e] + bias[e] for the rows of every expert e, [S, o]; x [S, d], weights [E, d, o], bias [E, o],
    ends int32 [E]."""
    y = _grouped_product(x, weights, ends)
    return y if bias is None else y.add_(_of_rows(bias, ends, x))


def _grouped_product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
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


def _swiglu(inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, 1)
    # The kernels move 16 bytes at a time.
    return ops.swiglu(gate, up) if gate.shape[1] % 8 == 0 else F.silu(gate) * up


def _swiglu_gradient(dy: Tensor, inner: Tensor) -> Tensor:
    gate, up = inner.chunk(2, 1)
    if gate.shape[1] % 8 == 0:
        ops.swiglu_backward_(dy, gate, up)  # in place of what they were made of, which nothing reads any more
        return inner
    return torch.cat((torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)), 1)


_SWIGLU = Gate(_swiglu, _swiglu_gradient)


def clamped_swiglu(alpha: float, limit: float) -> Gate:
    """gpt-oss's: (up + 1) gate sigmoid(alpha gate), of gates and ups in turns, clamped to `limit`."""
    return Gate(partial(_clamped, alpha, limit), partial(_clamped_gradient, alpha, limit))


def _clamped(alpha: float, limit: float, inner: Tensor) -> Tensor:
    gate, up = inner[:, ::2].clamp(max=limit), inner[:, 1::2].clamp(-limit, limit)
    return up.add_(1).mul_(gate.mul(alpha).sigmoid_().mul_(gate))


def _clamped_gradient(alpha: float, limit: float, dy: Tensor, inner: Tensor) -> Tensor:
    gate, up = inner[:, ::2].clamp(max=limit), inner[:, 1::2].clamp(-limit, limit)
    s = gate.mul(alpha).sigmoid_()
    dinner = torch.empty_like(inner)
    torch.mul(dy, s * gate, out=dinner[:, 1::2])
    # d/dg of g s(alpha g) is s (1 + alpha g (1 - s)).
    torch.mul(dy * up.add_(1), s * (1 + alpha * gate * (1 - s)), out=dinner[:, ::2])
    dinner[:, ::2].masked_fill_(inner[:, ::2] > limit, 0)
    dinner[:, 1::2].masked_fill_(inner[:, 1::2].abs() > limit, 0)
    return dinner
