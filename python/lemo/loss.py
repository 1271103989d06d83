"""From the residual stream to the loss: final norm, output head and cross-entropy in segments, in one function.

The gradient of the residual stream is computed in the forward pass, so between the passes one [T, d] buffer lives: the
gradient, which the decoder stack then updates in place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import ops
from .engine import Step
from .families.base import NormWeights
from .lora import Projection


class _NormHeadLoss(Function):
    """Inputs: x [T, d], the norm's and the head's tensors, targets int64 [T], and settings. Output: loss, float32."""

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
        lora_scale: float,
        ignore_index: int,
        reduction: str,
        segment_rows: int,
        step: Step,
    ) -> Tensor:
        need = ctx.needs_input_grad
        params = (x, norm_weight, norm_bias, weight, bias, lora_a, lora_b)
        norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias))
        hidden = x
        if norm is not None:
            hidden, _ = ops.gather_norm(x, None, None, norm_weight, norm_bias, *norm)
        loss, _, dhidden, dweight, dbias, da, db = ops.linear_cross_entropy(
            hidden,
            weight.to(x.dtype).contiguous(),
            None if bias is None else bias.to(x.dtype).contiguous(),
            None if lora_a is None else lora_a.to(x.dtype).contiguous(),
            None if lora_b is None else lora_b.to(x.dtype).contiguous(),
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
        if norm is not None and dhidden is not None:
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
        return loss.view(()).clone()  # a view could not be divided in place, as gradient accumulation does

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("lemo: backward through the same loss a second time: run the forward pass again")
        grads, ctx.grads = ctx.grads, None
        return *(None if g is None else g.mul_(dloss) for g in grads), *[None] * 7


def causal_lm_loss(
    x: Tensor,
    norm: NormWeights | None,
    head: Projection,
    targets: Tensor,
    step: Step,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    segment_rows: int = 0,
) -> Tensor:
    """Mean cross-entropy over valid targets, or their sum over `num_items_in_batch`: transformers' causal-LM loss.

    x [T, d]: output of the last layer; targets int64 [T], already shifted.
    """
    kind = None if norm is None else (norm.kind, norm.eps)
    loss = _NormHeadLoss.apply(
        x,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        head.weight,
        head.bias,
        head.a,
        head.b,
        targets,
        kind,
        float(head.scale),
        ignore_index,
        "mean" if num_items_in_batch is None else "sum",
        segment_rows,
        step,
    )
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def shift(labels: Tensor, ignore_index: int) -> Tensor:
    """labels [B, S] moved by one: what every token has to predict; the last token of a row predicts nothing."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
