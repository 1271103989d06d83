"""From the residual stream to the loss: final norm, output head and cross-entropy in segments, in one function.

The gradient of the residual stream is computed in the forward pass, so between the passes one [T, d] buffer lives: the
gradient, which the decoder stack then updates in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lemo import ops
from lemo.engine.families.base import NormWeights
from lemo.engine.linear import Projection
from lemo.engine.packing import Packed
from lemo.engine.stack import Step
from lemo.ops._autograd import first_order, link
from lemo.ops.loss import usable


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
        norm_weight, norm_bias = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias))
        hidden = x
        if norm is not None:
            # Without the gathered rows themselves: where backward needs them, this output is gone.
            hidden, _ = torch.ops.lemo.gather_norm(x, rows, None, norm_weight, norm_bias, *norm, False)
        elif rows is not None:
            hidden = ops.gather(x, rows)
        loss, valid, dhidden, dweight, dbias, da, db = ops.linear_cross_entropy(
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


@dataclass(frozen=True, eq=False)
class Targets:
    """What the tokens of a batch have to predict.

    values: int64 [T], already shifted, `ignore_index` where nothing; counted: labels of the batch as transformers
    counts them, also those that no token here predicts; items: transformers' num_items_in_batch.
    """

    values: Tensor
    ignore_index: int = -100
    counted: Tensor | None = None
    items: Tensor | int | None = None

    @classmethod
    def of(cls, packed: Packed, named: dict[str, Any]) -> Targets:
        """From the arguments of a transformers model. Raises ValueError for labels of another shape."""
        ignore_index, given = named.get("ignore_index", -100), named.get("shift_labels")
        name, labels = ("labels", named["labels"]) if given is None else ("shift_labels", given)
        if tuple(labels.shape) != packed.shape:
            raise ValueError(f"{name} must have the shape of the batch, {list(packed.shape)}; got {list(labels.shape)}")
        shifted = (shift(labels, ignore_index) if given is None else labels).to(packed.positions.device)
        counted = (shifted != ignore_index).sum()
        return cls(packed.take(shifted).contiguous(), ignore_index, counted, named.get("num_items_in_batch"))

    def only(self, rows: Tensor) -> Targets:
        """Those of some tokens [M]; rows of -1 predict nothing."""
        values = torch.where(rows >= 0, self.values[rows.clamp(min=0).long()], self.ignore_index)
        return replace(self, values=values)

    def loss(self, total: Tensor, valid: Tensor) -> Tensor:
        """(total / valid) * counted / items of the sum over `valid` targets; without items their mean, `total`.

        Items are those of a whole accumulation window, over all ranks. Weighed by its labels, the losses of a window
        add up to a mean, whatever tokens were left out. Nothing waits for the device.
        """
        if self.items is None:
            return total
        items = self.items.to(total.device) if torch.is_tensor(self.items) else self.items
        divisor = items * (torch.ones_like(total) if self.counted is None else valid / self.counted)
        return total / torch.where(valid > 0, divisor, 1.0)

    @property
    def reduction(self) -> str:
        return "mean" if self.items is None else "sum"


def causal_lm_loss(
    x: Tensor, norm: NormWeights | None, head: Projection, targets: Targets, step: Step, *, segment_rows: int = 0
) -> tuple[Tensor, Tensor]:
    """The loss of a batch and the number of targets it is over (int64, on the device).

    x [T, d]: output of the last layer, used up. The loss is the mean cross-entropy over valid targets of tokens that
    took part, weighed as `Targets.loss` says. Over none of them it is 0, with zero gradients. Tokens that were in no
    layer only count where norm, head or something before the layers trains.
    """
    outside = (head.weight, head.bias, head.a, head.b, *_parameters(norm))
    rows = read_rows(step, outside)
    if rows is not None:
        targets, rows = (targets.only(rows), rows) if rows.shape[0] else (_nothing(targets), None)
    loss, valid = _NormHeadLoss.apply(
        x,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        head.weight,
        head.bias,
        head.a,
        head.b,
        targets.values,
        None if norm is None else (norm.kind, norm.eps),
        rows,
        float(head.scale),
        targets.ignore_index,
        targets.reduction,
        segment_rows,
        step,
        link(x, *outside),
    )
    return targets.loss(loss, valid), valid


def causal_lm_logits(
    x: Tensor, norm: NormWeights | None, head: nn.Module, targets: Targets, step: Step, packed: Packed
) -> tuple[Tensor, Tensor, Tensor]:
    """As `causal_lm_loss` with any head module, and its logits [B, S, V], whole, in the model's dtype."""
    rows = read_rows(step, (*head.parameters(), *_parameters(norm)))
    values = targets.values
    if rows is not None:
        values = _nothing(targets).values.index_copy(0, rows.clamp(min=0).long(), targets.only(rows).values)
    hidden = x if norm is None else ops.norm(x, norm.weight, norm.bias, norm.kind, norm.eps)
    logits = head(packed.put(hidden))
    loss = F.cross_entropy(packed.take(logits).float(), values, ignore_index=targets.ignore_index, reduction="sum")
    valid = (values != targets.ignore_index).sum()
    if targets.items is None:
        loss = loss / valid.clamp(min=1)
    return targets.loss(loss, valid), valid, logits


def causal_lm_output(loss: Tensor, logits: Tensor | None, return_dict: bool | None) -> Any:
    """transformers' output of the loss, with logits where there are any."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from lemo.engine.output import TrainingOutput

    output = TrainingOutput(loss=loss) if logits is None else CausalLMOutputWithPast(loss=loss, logits=logits)
    return output.to_tuple() if return_dict is False else output


def _parameters(norm: NormWeights | None) -> tuple[Tensor | None, ...]:
    return () if norm is None else (norm.weight, norm.bias)


def _nothing(targets: Targets) -> Targets:
    return replace(targets, values=torch.full_like(targets.values, targets.ignore_index))


def read_rows(step: Step, outside: Iterable[Tensor | None]) -> Tensor | None:
    """Rows [M] of the tokens that took part in a layer. None: all tokens did, or others have a gradient as well, since
    one of the parameters outside of the layers trains."""
    return None if any(p is not None and p.requires_grad for p in outside) else step.part.rows()


def shift(labels: Tensor, ignore_index: int) -> Tensor:
    """labels [B, S] moved by one: what every token has to predict; the last token of a row predicts nothing."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
