"""From the residual stream to the loss: final norm, output head and cross-entropy in segments, in one function.

The gradient of the residual stream is computed in the forward pass, so between the passes one [T, d] buffer lives: the
gradient, which the decoder stack then updates in place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lemo import ops
from lemo.engine.families.base import NormWeights
from lemo.engine.gradients import Handover
from lemo.engine.linear import Projection, projection
from lemo.engine.packing import Packed
from lemo.engine.sequence import Share
from lemo.engine.step import Step
from lemo.ops._autograd import first_order, link
from lemo.ops.loss import usable

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, eq=False)
class _Settings:
    """Arguments of `_NormHeadLoss` other than tensors that may train.

    norm: kind and eps of the final norm, or None; rows int32 [M]: the rows of x that are read, with targets [M] (then
    neither norm nor head trains), or None: all of them; handover: that of the step.
    """

    norm: tuple[str, float] | None
    rows: Tensor | None
    lora_scale: float
    ignore_index: int
    reduction: Reduction
    segment_rows: int
    softcap: float
    handover: Handover


class _NormHeadLoss(Function):
    """Inputs: x [T, d], which is used up, the norm's and the head's tensors, targets int64 [T] (or [M]), and settings;
    `end` ties the second derivatives of all of them to the loss.

    Outputs: loss, float32; number of valid targets, int64.
    """

    @staticmethod
    def forward(  # autograd only sees tensors that are arguments
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        targets: Tensor,
        settings: _Settings,
        end: Tensor,
    ) -> tuple[Tensor, Tensor]:
        need, norm, rows = ctx.needs_input_grad, settings.norm, settings.rows
        params = (x, norm_weight, norm_bias, weight, bias, lora_a, lora_b)
        hidden = _normed(x, norm_weight, norm_bias, settings)
        bias, lora_a, lora_b = (None if t is None else t.to(x.dtype).contiguous() for t in (bias, lora_a, lora_b))
        loss, valid, dhidden, *dhead = ops.linear_cross_entropy(
            hidden,
            weight.to(x.dtype).contiguous(),
            bias,
            lora_a,
            lora_b,
            settings.lora_scale,
            targets,
            settings.ignore_index,
            settings.softcap,
            settings.reduction,
            settings.segment_rows,
            want_dhidden=any(need[:3]),
            want_dweight=need[3],
            want_dbias=need[4],
            want_dlora=need[5] or need[6],
        )
        dx = dhidden
        dnorm: tuple[Tensor | None, Tensor | None] = (None, None)
        if rows is not None and dhidden is not None:
            del hidden
            dx = _into_stream(x, rows, dhidden, norm_weight, norm)
        elif norm is not None and dhidden is not None:
            # The norm's output is no longer needed: its memory takes the gradient.
            dx = hidden
            dnorm = ops.gather_norm_backward_(dx, None, dhidden, x, norm_weight, None, *norm, False, need[1], need[2])
        ctx.grads = [
            g.to(p.dtype) if n and g is not None and p is not None else None
            for g, p, n in zip((dx, *dnorm, *dhead), params, need[:7], strict=True)
        ]
        ctx.handover, ctx.valid, ctx.depends = settings.handover, valid, (end,)
        # A copy, since a view made here could not be scaled in place by the receiver.
        return loss.view(()).clone(), valid.view(())

    @staticmethod
    @first_order("the loss of a step")
    def backward(ctx: Any, dloss: Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("lemo: backward through the same loss a second time: run the forward pass again")
        grads, ctx.grads = ctx.grads, None
        dloss = usable(dloss, ctx.valid)
        dx, *others = (None if g is None else g.mul_(dloss) for g in grads)
        if dx is not None:
            ctx.handover.offer(dx)
        return dx, *others, None, None, None


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, settings: _Settings) -> Tensor:
    """The rows of x that are read, after the final norm: [T, d] or [M, d]."""
    if settings.norm is not None:
        # Without the gathered rows themselves: by the time the backward pass needs them, this output is gone.
        return torch.ops.lemo.gather_norm(x, settings.rows, None, weight, bias, *settings.norm, False)[0]
    return x if settings.rows is None else ops.gather(x, settings.rows)


def _into_stream(
    x: Tensor, rows: Tensor, dhidden: Tensor, weight: Tensor | None, norm: tuple[str, float] | None
) -> Tensor:
    """The gradient [T, d] of x from dhidden [M, d], that of the hidden states of some rows int32 [M].

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

    values: int64 [T], already shifted, `ignore_index` for none; counted: labels of the batch as transformers
    counts them, including those that no token here predicts; items: transformers' num_items_in_batch. share: what this
    process holds of the batch; values are then those of its tokens.
    """

    values: Tensor
    ignore_index: int = -100
    counted: Tensor | None = None
    items: Tensor | int | None = None
    share: Share | None = None

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

    def of_share(self, share: Share | None) -> Targets:
        """Those of this process's tokens, of targets of the whole batch."""
        return self if share is None else replace(self, values=self.values[share.tokens].contiguous(), share=share)

    def only(self, rows: Tensor) -> Targets:
        """Those of some tokens, rows int32 [M]; rows of -1 predict nothing."""
        values = torch.where(rows >= 0, self.values[rows.clamp(min=0).long()], self.ignore_index)
        return replace(self, values=values)

    def loss(self, total: Tensor, valid: Tensor) -> Tensor:
        """(total / valid) * counted / items of the sum over `valid` targets; without items their mean, `total`.

        Items are those of a whole accumulation window, over all ranks. Weighted by its labels, the losses of a window
        add up to a mean, whatever tokens were left out. Nothing waits for the device.
        """
        if self.share is not None:
            total = self.share.sum(total)
        if self.items is None:
            return total if self.reduction == "mean" else total / valid.clamp(min=1)
        items = self.items.to(total.device) if torch.is_tensor(self.items) else self.items
        divisor = items * (torch.ones_like(total) if self.counted is None else valid / self.counted)
        return total / torch.where(valid > 0, divisor, 1.0)

    @property
    def reduction(self) -> Reduction:
        return "mean" if self.items is None and self.share is None else "sum"

    def all_valid(self, valid: Tensor) -> Tensor:
        """The number of valid targets int64 [] of the whole batch, from that of this process."""
        return valid if self.share is None else self.share.group.sum_(valid.clone())


def causal_lm_loss(
    x: Tensor,
    norm: NormWeights | None,
    head: Projection,
    targets: Targets,
    step: Step,
    *,
    project: nn.Module | None = None,
    segment_rows: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The loss of a batch and the number of targets it is over (int64, on the device).

    x [T, d]: output of the last layer, used up; project: `Family.project_out`. The loss is the mean cross-entropy over
    valid targets of tokens that took part, weighted as in `Targets.loss`. Over none of them it is 0, with zero
    gradients. Tokens that were in no layer only count if norm, head or something before the layers trains.
    """
    outside = (head.weight, head.bias, head.a, head.b, *_parameters(norm), *_held(project))
    rows = read_rows(step, outside)
    if rows is not None:
        targets, rows = (targets.only(rows), rows) if rows.shape[0] else (_nothing(targets), None)
    if project is not None:
        x = _Offer.apply(x, step.handover)
        x = head_input(x if rows is None else ops.gather(x, rows), norm, project, step)
        norm = rows = None
    if norm is not None:
        norm = replace(norm, weight=step.outside(norm.weight), bias=step.outside(norm.bias))
    loss, valid = _NormHeadLoss.apply(
        x,
        *((None, None) if norm is None else norm.operands),
        *(step.outside(p) for p in (head.dense_weight(), head.bias, head.a, head.b)),
        targets.values,
        _Settings(
            None if norm is None else (norm.kind, norm.eps),
            rows,
            float(head.scale),
            targets.ignore_index,
            targets.reduction,
            segment_rows,
            softcap,
            step.handover,
        ),
        link(x, *outside),
    )
    valid = targets.all_valid(valid)
    return targets.loss(loss, valid), valid


def causal_lm_logits(
    x: Tensor,
    norm: NormWeights | None,
    head: nn.Module,
    targets: Targets,
    step: Step,
    packed: Packed,
    *,
    project: nn.Module | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `causal_lm_loss` with any head module, and its logits [B, S, V], whole, in the model's dtype."""
    rows = read_rows(step, (*head.parameters(), *_parameters(norm), *_held(project)))
    values = targets.values
    if rows is not None:
        values = _nothing(targets).values.index_copy(0, rows.clamp(min=0).long(), targets.only(rows).values)
    hidden = head_input(x, norm, project, step)
    logits = head(packed.put(hidden))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(packed.take(logits).float(), values, ignore_index=targets.ignore_index, reduction="sum")
    valid = (values != targets.ignore_index).sum()
    if targets.items is None:
        loss = loss / valid.clamp(min=1)
    return targets.loss(loss, valid), valid, logits


def head_input(x: Tensor, norm: NormWeights | None, project: nn.Module | None, step: Step) -> Tensor:
    """Rows x of the stream as the head reads them: after the final norm and `Family.project_out`, differentiable."""
    if norm is not None:
        norm = replace(norm, weight=_own(norm.weight, step), bias=_own(norm.bias, step))
        x = ops.norm(x, *norm.operands, norm.kind, norm.eps)
    return x if project is None else _projected(x, project, step)


def _projected(x: Tensor, project: nn.Module, step: Step) -> Tensor:
    """x [M, d] after a linear layer outside of the layers."""
    spec = projection(project, head=True)
    if spec is None:
        if step.share is not None or step.weights.fleeting:
            raise ValueError(
                f"project_out is a {type(project).__name__} whose adapter several processes cannot train together: "
                "leave project_out out of the adapter's target_modules, or give it a plain LoRA without dropout"
            )
        return project(x)
    weight, bias, a, b = (
        None if p is None else _own(p, step).to(x.dtype)  # type: ignore[union-attr]
        for p in (spec.dense_weight(), spec.bias, spec.a, spec.b)
    )
    y = F.linear(x, weight, bias)  # type: ignore[arg-type]
    return y if a is None or b is None else y + spec.scale * F.linear(F.linear(x, a), b)


def _own(parameter: Tensor | None, step: Step) -> Tensor | None:
    """A parameter outside of the layers, as autograd may save it until the backward pass."""
    used = step.outside(parameter)
    # One that was gathered for a while is gone by then.
    return used.clone() if used is not None and step.weights.fleeting else used


class _Offer(Function):
    """x, whose gradient is a buffer that nobody else needs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handover: Handover) -> Tensor:
        ctx.handover = handover
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        ctx.handover.offer(dx)
        return dx, None


def auxiliary_loss(step: Step, config: Any) -> Tensor | None:
    """The scalar that the family adds to the loss of a batch, over the rows that its MLPs computed."""
    total = step.statistics.total
    return None if total is None else step.family.auxiliary_loss(config, total)


def refuse_auxiliary_loss(step: Step, config: Any) -> None:
    """Raises ValueError if there is one, and the loss is someone else's."""
    if auxiliary_loss(step, config) is not None:
        raise ValueError(
            f"{step.family.model_class} adds an auxiliary loss, which only the loss that lemo computes contains: pass "
            "labels to the model and use its loss, or switch the auxiliary loss off in the model's configuration"
        )


def causal_lm_output(loss: Tensor, logits: Tensor | None, return_dict: bool | None) -> Any:
    """transformers' output of the loss, with logits if there are any."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from lemo.engine.output import TrainingOutput

    output = TrainingOutput(loss=loss) if logits is None else CausalLMOutputWithPast(loss=loss, logits=logits)
    return output.to_tuple() if return_dict is False else output


def _parameters(norm: NormWeights | None) -> tuple[Tensor | None, ...]:
    return () if norm is None else norm.parameters


def _held(module: nn.Module | None) -> tuple[Tensor, ...]:
    return () if module is None else tuple(module.parameters())


def _nothing(targets: Targets) -> Targets:
    return replace(targets, values=torch.full_like(targets.values, targets.ignore_index))


def read_rows(step: Step, outside: Iterable[Tensor | None]) -> Tensor | None:
    """Rows int32 [M] of the tokens that took part in a layer. None: all tokens did, or the others have a gradient as
    well, since one of the parameters outside of the layers trains."""
    return None if any(p is not None and p.requires_grad for p in outside) else step.participation.rows()


def shift(labels: Tensor, ignore_index: int) -> Tensor:
    """labels [B, S] moved by one: what every token has to predict; the last token of a row predicts nothing."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:]
