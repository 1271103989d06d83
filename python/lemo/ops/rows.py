"""Kept rows of the residual stream: gather, norm, scatter-add and their backward passes (paper section 5.1).

T tokens, M packed rows, d channels. ``rows`` int32 [M] names the row of the residual stream behind each packed row, no
row twice; -1 is padding (gathers zeros, scatters nothing). fp32 on the CPU, fp16 or bf16 on CUDA.
Errors: ValueError naming the argument, what was expected and what was given; nothing is written then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lemo.ops._autograd import bind_autograd, library
from lemo.ops._operator import Norm, need, operator


@operator("out")
def gather(x: Tensor, rows: Tensor, weights: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
    """out[i] = weights[slots[i]] * x[rows[i]], [M, d]. Differentiable in x and weights, any number of times.

    x [T, d]; weights float32 [K] by block slot, with slots int32 [M].
    """
    need("x", x, "T d")
    need("rows", rows, "M")
    return x.new_empty(rows.shape[0], x.shape[1])


@operator(writes="x")
def _scatter_add_(x: Tensor, rows: Tensor, y: Tensor, base: Tensor | None = None) -> None:
    """Nothing to allocate."""


def scatter_add_(x: Tensor, rows: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
    """x[rows[i]] += y[i] in place, or x[rows[i]] = base[i] + y[i]. Returns x [T, d]. Sums in fp32, rounds once.

    Differentiable in x, y and base, any number of times.
    """
    _scatter_add_(x, rows, y, base)
    return x


@operator("y packed")
def _gather_norm(
    x: Tensor,
    rows: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: Norm,
    eps: float,
    want_packed: bool,
) -> tuple[Tensor, Tensor | None]:
    need("x", x, "T d")
    if rows is not None:
        need("rows", rows, "M")
    y = x.new_empty(x.shape[0] if rows is None else rows.shape[0], x.shape[1])
    return y, torch.empty_like(y) if want_packed else None


def gather_norm(
    x: Tensor,
    rows: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Norm of gathered rows: s_i = x[rows[i]] + residual[i], y = norm(s) * weight + bias. Returns (y, s), both [M, d].

    rows None: every row. norm: "rms" (s / sqrt(mean(s^2) + eps)) or "layer" ((s - mean) / sqrt(var + eps)).
    weight, bias [d] in the dtype of x or float32. s is what ``gather_norm_backward`` needs; it is x itself if neither
    rows nor residual are given.
    """
    y, packed = _gather_norm(x, rows, residual, weight, bias, norm, eps, rows is not None or residual is not None)
    return y, x if packed is None else packed


@operator("ds dweight dbias", renamed={"ds": "dx"}, constants={"accumulate": False}, derivative="error")
def gather_norm_backward(
    dy: Tensor,
    s: Tensor,
    weight: Tensor | None,
    ds_extra: Tensor | None,
    norm: Norm,
    eps: float,
    want_dweight: bool = False,
    want_dbias: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of the norm at s plus ``ds_extra``: (ds [M, d], dweight, dbias float32 [d] or None)."""
    ds = torch.empty_like(dy, memory_format=torch.contiguous_format)
    return ds, *_parameter_gradients(s, want_dweight, want_dbias)


@operator("dweight dbias", calls="gather_norm_backward", writes="dx", derivative="error")
def gather_norm_backward_(
    dx: Tensor,
    rows: Tensor | None,
    dy: Tensor,
    s: Tensor,
    weight: Tensor | None,
    ds_extra: Tensor | None,
    norm: Norm,
    eps: float,
    accumulate: bool = True,
    want_dweight: bool = False,
    want_dbias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """In place: dx[rows[i]] += ds_i (or = ds_i with accumulate False), ds as in ``gather_norm_backward``.

    Other rows of dx [T, d] are not touched. Returns (dweight, dbias), float32 [d] or None.
    """
    return _parameter_gradients(s, want_dweight, want_dbias)


def _parameter_gradients(s: Tensor, want_dweight: bool, want_dbias: bool) -> tuple[Tensor | None, Tensor | None]:
    need("s", s, "M d")
    dweight = s.new_empty(s.shape[1], dtype=torch.float32) if want_dweight else None
    return dweight, s.new_empty(s.shape[1], dtype=torch.float32) if want_dbias else None


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    kind: str = "rms",
    eps: float = 1e-6,
    rows: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``gather_norm`` as a differentiable function of x, residual, weight and bias. Returns y [M, d]."""
    return gather_norm(x, rows, residual, weight, bias, kind, eps)[0]


def _gather_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, rows, weights, slots = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, rows, weights, slots)
    ctx.shape = x.shape


def _gather_grad(ctx, grad):
    x, rows, weights, slots = ctx.saved_tensors
    grad = grad.contiguous()
    dx = dweights = None
    if x is not None:
        values = (grad.float() * gather(x, rows).float()).sum(1)
        dweights = torch.zeros_like(weights).index_add(0, slots.clamp(min=0).long(), values)  # padding gathered zeros
    if ctx.needs_input_grad[0]:
        if weights is not None:
            own = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device).where(rows >= 0, -1)
            grad = gather(grad, own, weights, slots)
        dx = grad.new_zeros(ctx.shape)
        scatter_add_(dx, rows, grad)
    return dx, None, dweights, None


class _ScatterAdd(Function):
    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, rows: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        run(x, rows, y, base)
        ctx.mark_dirty(x)
        ctx.save_for_backward(rows)
        ctx.replaces = base is not None
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (rows,) = ctx.saved_tensors
        packed = gather(grad.contiguous(), rows)
        dx: Tensor | None = grad
        if ctx.replaces and ctx.needs_input_grad[1]:
            dx = grad.clone(memory_format=torch.contiguous_format)
            scatter_add_(dx, rows, torch.zeros_like(packed), torch.zeros_like(packed))
        return None, dx, None, packed, packed if ctx.replaces else None


def _scatter_add_with_gradient(run: Any, x: Tensor, rows: Tensor, y: Tensor, base: Tensor | None = None) -> None:
    _ScatterAdd.apply(run, x, rows, y, base)


def _norm_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, rows, residual, weight, _, ctx.norm, ctx.eps, want_packed = inputs
    ctx.save_for_backward(output[1] if want_packed else x, rows, weight)
    ctx.shape, ctx.has_residual = x.shape, residual is not None
    ctx.bias_dtype = None if inputs[4] is None else inputs[4].dtype
    if not want_packed:
        ctx.mark_non_differentiable(output[1])


def _norm_grad(ctx, dy, ds_extra):
    s, rows, weight = ctx.saved_tensors
    want_dweight, want_dbias = ctx.needs_input_grad[3], ctx.needs_input_grad[4]
    if ds_extra is not None and ds_extra.shape != dy.shape:
        ds_extra = None  # the placeholder of a forward pass that did not return s
    extra = None if ds_extra is None else ds_extra.contiguous()
    options = (ctx.norm, ctx.eps, want_dweight, want_dbias)
    ds, dweight, dbias = gather_norm_backward(dy.contiguous(), s, weight, extra, *options)
    dx = ds
    if rows is not None:
        dx = ds.new_zeros(ctx.shape)
        scatter_add_(dx, rows, ds)
    dresidual = ds if ctx.has_residual else None
    dweight = None if dweight is None else dweight.to(weight.dtype)
    dbias = None if dbias is None else dbias.to(ctx.bias_dtype)
    return dx, None, dresidual, dweight, dbias, None, None, None


torch.library.register_autograd("lemo::gather", _gather_grad, setup_context=_gather_context, lib=library)
torch.library.register_autograd("lemo::gather_norm", _norm_grad, setup_context=_norm_context, lib=library)
bind_autograd("scatter_add_", _scatter_add_with_gradient)
