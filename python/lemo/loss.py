"""From the residual stream to the loss: final norm, output head and cross-entropy in segments, in one function.

The gradient of the residual stream is computed in the forward pass, so between the passes one [T, d] buffer lives: the
gradient, which the decoder stack then updates in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import ops
from .engine import Step
from .families.base import NormWeights
from .lora import Projection
from .ops._schema import first_order, link
from .ops.loss import usable


class _NormHeadLoss(Function):
    """Inputs: x [T, d], the norm's and the head's tensors, targets int64 [T], and settings.

    rows int32 [M]: the rows of x that are read, with targets [M]; then neither norm nor head trains. x is used up.
    Outputs: loss, float32; number of valid targets, int64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        targets: Tensor,
        norm: tuple[str, float] | None,
        rows: Tensor | None,
        lora_scale: float,
        ignore_index: int,
        reduction: str,
        segment_rows: int,
        step: Step,
        end: Tensor,
    ) -> tuple[Tensor, Tensor]:
        need = ctx.needs_input_grad
        params = (x, norm_weight, norm_bias, weight, bias, lora_a, lora_b)
        hidden = x
        if norm is not None:
            # Without the gathered rows themselves: where backward needs them, this output is gone.
            hidden, _ = torch.ops.lemo.gather_norm(x, rows, None, norm_weight, norm_bias, *norm, False)
        elif rows is not None:
            hidden = ops.gather(x, rows)
        loss, valid, dhidden, dweight, dbias, da, db = ops.linear_cross_entropy(
            hidden,
            weight.to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            None if lora_a is None else lora_a.to(x.dtype),
            None if lora_b is None else lora_b.to(x.dtype),
            lora_scale,
            targets,
            ignore_index,
            0.0,
            reduction,
            segment_rows,
            want_dhidden=any(need[:3]),
            want_dweight=need[3],
            want_dbias=need[4],
            want_dlora=need[5] or need[6],
        )
        dx, dnw, dnb = dhidden, None, None
        if rows is not None and dhidden is not None:
            del hidden
            dx = _into_stream(x, rows, dhidden, norm_weight, norm)
        elif norm is not None and dhidden is not None:
            # The norm's output is no longer needed: its memory takes the gradient.
            dx = hidden
            dnw, dnb = ops.gather_norm_backward_(
                dx, None, dhidden, x, norm_weight, None, *norm, False, need[1], need[2]
            )
        grads = (dx, dnw, dnb, dweight, dbias, da, db)
        ctx.grads = [
            g.to(p.dtype) if n and g is not None and p is not None else None
            for g, p, n in zip(grads, params, need[:7], strict=True)
        ]
        if ctx.grads[0] is not None:
            step.gradient = ctx.grads[0].data_ptr()
        ctx.valid, ctx.depends = valid, (end,)
        # A copy, since a view made here could not be scaled in place by whoever receives it.
        return loss.view(()).clone(), valid.view(())

    @staticmethod
    @first_order("the loss of a step")
    def backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("lemo: backward through the same loss a second time: run the forward pass again")
        grads, ctx.grads = ctx.grads, None
        dloss = usable(dloss, ctx.valid)
        return *(None if g is None else g.mul_(dloss) for g in grads), *[None] * 9


def _into_stream(
    x: Tensor, rows: Tensor, dhidden: Tensor, weight: Tensor | None, norm: tuple[str, float] | None
) -> Tensor:
    """The gradient [T, d] of x from that of some rows' hidden states.

    It takes x's memory: x is the stack's output, which nothing reads after the loss.
    """
    packed = None if norm is None else ops.gather(x, rows)
    dx = x.detach().zero_()
    if norm is None or packed is None:
        return ops.scatter_add_(dx, rows, dhidden)
    ops.gather_norm_backward_(dx, rows, dhidden, packed, weight, None, *norm, False)
    return dx


def causal_lm_loss(
    x: Tensor,
    norm: NormWeights | None,
    head: Projection,
    targets: Tensor,
    step: Step,
    *,
    num_items_in_batch: Tensor | int | None = None,
    counted: Tensor | None = None,
    ignore_index: int = -100,
    segment_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch and the number of targets it is over (int64, on the device).

    x [T, d]: output of the last layer, used up; targets int64 [T], already shifted. Without num_items_in_batch the mean
    cross-entropy over valid targets of tokens that took part; with it, as in `per_item`. Over none of them it is 0,
    with zero gradients. Tokens that were in no layer only count where norm, head or something before the layers trains.
    """
    outside = _outside(norm, head.weight, head.bias, head.a, head.b)
    rows = read_rows(step, outside)
    if rows is not None and rows.shape[0] == 0:
        rows, targets = None, torch.full_like(targets, ignore_index)
    if rows is not None:
        targets = torch.where(rows >= 0, targets[rows.clamp(min=0).long()], ignore_index)
    kind = None if norm is None else (norm.kind, norm.eps)
    loss, valid = _NormHeadLoss.apply(
        x,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        head.weight,
        head.bias,
        head.a,
        head.b,
        targets,
        kind,
        rows,
        float(head.scale),
        ignore_index,
        "mean" if num_items_in_batch is None else "sum",
        segment_rows,
        step,
        link(x, *outside),
    )
    return per_item(loss, valid, num_items_in_batch, counted), valid


def _outside(norm: NormWeights | None, *head: Tensor | None) -> tuple[Tensor | None, ...]:
    """Parameters between the layers and the loss."""
    return (*head, None if norm is None else norm.weight, None if norm is None else norm.bias)


def read_rows(step: Step, outside: Iterable[Tensor | None]) -> Tensor | None:
    """Rows [M] of the tokens that took part in a layer. None: all tokens did, or others have a gradient as well, since
    something outside of the layers trains."""
    return None if any(p is not None and p.requires_grad for p in outside) else step.part.rows()


def per_item(loss: Tensor, valid: Tensor, num_items_in_batch: Tensor | int | None, counted: Tensor | None) -> Tensor:
    """(loss / valid) * counted / num_items_in_batch of a sum over `valid` targets; the loss itself without a number.

    The number is that of a whole accumulation window, over all ranks, and counts labels: also those that no token here
    predicts, because it is padding or took part in no layer. counted: such labels of this batch (default: valid).
    Weighed by them, the losses of a window add up to a mean. Nothing waits for the device.
    """
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    divisor = num_items_in_batch * (torch.ones_like(loss) if counted is None else valid / counted)
    return loss / torch.where(valid > 0, divisor, 1.0)


def shift(labels: Tensor, ignore_index: int) -> Tensor:
    """labels [B, S] moved by one: what every token has to predict; the last token of a row predicts nothing."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
