"""TRL's fused head (trl 1.16), computed by lemo's segmented loss.

TRL's trainers call `model(..., labels=labels, fused_lm_head=True)` and take log-probabilities and statistics per token
from the output of a `forward` that TRL puts on the model. It lies below our entry if lemo was applied after the trainer
was built, and hides it if lemo was applied before. In the second case `cover` adds an entry on top, which marks the
call, so that ours computes it below everything else that is wrapped around it.

The gradient is that of the segmented loss, the sum over tokens, whose rows are then weighted by what arrives at each
token's log-probability: exact, since no token's loss depends on another row of the residual stream.

Labels that no token predicts (in mode "skip", those of tokens that were in no layer) get the mean of the others: TRL
divides by the number of all labels, so its loss is the mean over tokens that took part, as lemo's own is.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lemo.engine.config import LemoConfig
from lemo.engine.families.base import Family, NormWeights
from lemo.engine.gradients import Handover
from lemo.engine.linear import Projection, projection
from lemo.engine.loss import Targets, causal_lm_loss, head_input, read_rows, refuse_auxiliary_loss, shift
from lemo.engine.packing import Packed
from lemo.engine.step import Step
from lemo.integration.entries import add_entry, current_forward, is_entry, search
from lemo.integration.training_pass import Inputs

MARK = "lemo_head"  # keyword under which a marked call carries TRL's function
_SEGMENT = 1 << 24  # logits computed at a time for the statistics


class Runs(Protocol):
    """What the head asks of `lemo.Controller`."""

    family: Family
    config: LemoConfig

    def run(self, inputs: Inputs) -> tuple[Tensor, Step]: ...

    def count_loss_tokens(self, count: Tensor) -> None: ...

    def note(self, text: str) -> None: ...


def is_fused_head(function: Any) -> bool:
    return (
        isinstance(function, types.FunctionType)
        and function.__code__.co_name == "_fused_forward"
        and str(function.__globals__.get("__name__", "")).startswith("trl.")
    )


def cover(module: nn.Module) -> None:
    """Puts an entry on top of TRL's head if it hides ours."""
    own = current_forward(module)
    head = search(own, is_fused_head)
    if head is None or search(head, is_entry) is None:
        return
    if search(own, lambda f: is_entry(f) and search(f, lambda g: g is head) is not None) is None:
        add_entry(module, _mark)


def _mark(controller: Runs, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("fused_lm_head"):
        head = search(original, is_fused_head)
        if head is not None and covers(controller, module, head):
            kwargs = {name: value for name, value in kwargs.items() if name != "fused_lm_head"} | {MARK: head}
    return original(*args, **kwargs)


def wanted(controller: Runs, module: nn.Module, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any | None:
    """TRL's function whose call this is, if lemo computes it; None for any other call."""
    if MARK in kwargs:
        return kwargs[MARK]
    head = search(original, is_fused_head) if kwargs.get("fused_lm_head") else None
    return head if head is not None and covers(controller, module, head) else None


def covers(controller: Runs, module: Any, head: Any) -> bool:
    """Whether the segmented loss gives what this head does. The layers run through lemo in any case."""
    asked = inspect.getclosurevars(head).nonlocals
    norm, project = _before_head(controller.family, module)
    weights = projection(module.lm_head, head=True)
    reason = None
    if weights is None:
        reason = f"lm_head is a {type(module.lm_head).__name__}"
    elif any(p is not None and p.requires_grad for p in _outside(norm, project, weights)):
        # Their gradients are sums over tokens, which cannot be weighted by token afterwards.
        reason = "lm_head or what is before it trains"
    elif any(
        asked.get(name, plain) not in (plain, None)
        for name, plain in (("temperature", 1.0), ("logit_scale", 1.0), ("final_logit_softcapping", None))
    ):
        reason = "the logits are scaled"
    elif asked.get("cast_lm_head_to_fp32"):
        reason = "cast_lm_head_to_fp32 is set"
    elif not {"log_probs", "is_top1", "mean_logits", "log_sum_sq_probs", "entropy"}.issuperset(asked["outputs"]):
        reason = f"the trainer asks for {', '.join(asked['outputs'])}"
    elif "entropy" in asked["outputs"] and "is_top1" not in asked["outputs"]:
        reason = "the trainer may train by the entropy"
    if reason is not None:
        controller.note(f"TRL's own head computes the loss, since {reason}; the layers run through lemo")
    return reason is None


def _before_head(family: Family, module: Any) -> tuple[NormWeights | None, nn.Module | None]:
    decoder = family.decoder(module)
    return family.head_norm(decoder), family.project_out(decoder)


def _outside(norm: NormWeights | None, project: nn.Module | None, head: Projection) -> tuple[Tensor | None, ...]:
    return (
        *(norm.parameters if norm is not None else ()),
        *(project.parameters() if project is not None else ()),
        *(head.weight, head.bias, head.a, head.b),
    )


# --- per token --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Weights:
    """Gradients that arrived at the tokens' log-probabilities, float32 [T], on their way to the rows of the residual
    stream."""

    handover: Handover
    by_row: Tensor | None = None


class _WeighRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: _Weights) -> Tensor:
        ctx.weights = weights
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        weights: _Weights = ctx.weights
        by_row, weights.by_row = weights.by_row, None
        assert by_row is not None
        dx = weights.handover.take(dx).mul_(by_row[:, None])
        weights.handover.offer(dx)
        return dx, None


class _LogProbs(Function):
    """The given values, with the gradient of minus `total`'s terms."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, values: Tensor, weights: _Weights) -> Tensor:
        ctx.weights = weights
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor) -> tuple[Tensor, None, None]:
        ctx.weights.by_row = -dvalues
        return dvalues.new_ones(()), None, None


class _Statistic(Function):
    """A value for logs: asking for its gradient is an error, not zero."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, total: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, dvalues: Tensor) -> Any:
        raise RuntimeError(
            "lemo's head gives the entropy for logs only, without a gradient: detach it, or call lemo.remove(model) to "
            "train by the entropy"
        )


def _statistics(hidden: Tensor, head: Projection, targets: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Per token, float32 [N], of logits hidden [N, d] weight^T, a segment at a time. Without gradients."""
    dtype = hidden.dtype
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    rows = max(1, _SEGMENT // head.width)
    weight, bias = head.dense_weight().to(dtype), None if head.bias is None else head.bias.to(dtype)
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        logits = F.linear(hidden[part], weight, bias)
        if head.a is not None and head.b is not None:
            logits.addmm_(hidden[part] @ head.a.to(dtype).t(), head.b.to(dtype).t(), alpha=head.scale)
        logits = logits.float()
        log_z = logits.logsumexp(1)
        chosen = logits.gather(1, targets[part, None])[:, 0]
        for name in names:
            if name == "log_probs":
                value = chosen - log_z
            elif name == "is_top1":
                value = (logits.argmax(1) == targets[part]).float()
            elif name == "mean_logits":
                value = logits.mean(1)
            elif name == "log_sum_sq_probs":
                value = (2 * logits).logsumexp(1) - 2 * log_z
            else:
                value = log_z - (logits.softmax(1) * logits).sum(1)
            found[name].append(value)
    return {name: torch.cat(parts) if parts else hidden.new_zeros(0).float() for name, parts in found.items()}


def fused_output(controller: Runs, module: Any, head: Any, named: dict[str, Any], inputs: Inputs) -> Any:
    """TRL's FusedCausalLMOutput for one training call."""
    packed = inputs.packed
    labels, mask = _labels(named, packed)
    targets = packed.take(labels).contiguous()
    asked = inspect.getclosurevars(head).nonlocals["outputs"]
    names = ("log_probs", *(name for name in asked if name != "log_probs"))

    x, step = controller.run(replace(inputs, labelled=targets != -100))
    refuse_auxiliary_loss(step, module.config)
    norm, project = _before_head(controller.family, module)
    weights = projection(module.lm_head, head=True)
    assert weights is not None
    part = read_rows(step, _outside(norm, project, weights))
    predicted = _predicted(targets, part)
    index = predicted.nonzero()[:, 0]  # one synchronisation; TRL's own head has it too
    with torch.no_grad():
        hidden = head_input(x.index_select(0, index), norm, project, step)
        found = _statistics(hidden, weights, targets.index_select(0, index), names)
        del hidden
    arrived = _Weights(step.handover)
    total, count = causal_lm_loss(
        _WeighRows.apply(x, arrived),
        norm,
        weights,
        Targets(targets, items=1),  # their sum
        step,
        project=project,
        segment_rows=controller.config.segment_rows,
    )
    controller.count_loss_tokens(count)

    fields = {name: v.new_zeros(targets.shape[0]).index_copy(0, index, v) for name, v in found.items()}
    fields["log_probs"] = _LogProbs.apply(total, fields["log_probs"], arrived)
    if "entropy" in fields:
        fields["entropy"] = _Statistic.apply(fields["entropy"], total)
    fields = _in_batch(fields, packed, mask, predicted)
    if named.get("shift_labels") is None:
        fields, mask = {name: values[:, :-1] for name, values in fields.items()}, mask[:, :-1]
    if "is_top1" in fields and part is None:
        fields["is_top1"] = fields["is_top1"] > 0
    items = named.get("num_items_in_batch")
    loss = -fields["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)
    return head.__globals__["FusedCausalLMOutput"](loss=loss, label_mask=mask, **fields)


def _labels(named: dict[str, Any], packed: Packed) -> tuple[Tensor, Tensor]:
    """What every token has to predict, int64 [B, S], and whether it has to predict anything, bool [B, S]."""
    labels, shifted = named.get("labels"), named.get("shift_labels")
    given = labels if shifted is None else shifted
    if given is None or tuple(given.shape) != packed.shape:
        got = None if given is None else list(given.shape)
        raise ValueError(f"labels must have the shape of the batch, {list(packed.shape)}; got {got}")
    wide = (shift(given, -100) if shifted is None else given).to(packed.positions.device)
    return wide, wide != -100


def _predicted(targets: Tensor, part: Tensor | None) -> Tensor:
    """bool [T]: tokens with a target, int64 [T], that took part in a layer (rows int32 [M], None: all of them)."""
    predicted = targets != -100
    if part is None:
        return predicted
    # -1 if a selection failed: one place more takes it.
    places = part.to(targets)
    places = places.where(places >= 0, targets.shape[0])
    took_part = predicted.new_zeros(targets.shape[0] + 1).index_fill(0, places, True)
    return predicted & took_part[:-1]


def _in_batch(fields: dict[str, Tensor], packed: Packed, mask: Tensor, predicted: Tensor) -> dict[str, Tensor]:
    """Values by token [T] as values of the batch [B, S]; labels that no token predicts get the mean of the others."""

    def put(values: Tensor) -> Tensor:
        return packed.put(values[:, None])[..., 0]

    missing, count = mask & ~put(predicted), predicted.sum().clamp(min=1)
    return {name: torch.where(missing, values.sum() / count, put(values)) for name, values in fields.items()}
