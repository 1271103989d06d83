"""Output projection and cross-entropy in segments of tokens: logits never exist whole (paper section 5.2).

z = h W^T (+ lora_scale (h A^T) B^T) (+ bias); softcap c > 0: z = c tanh(z / c); loss = mean or sum over tokens whose
target is not ``ignore_index`` of logsumexp(z_t) - z_t[target_t]. Over no valid token, mean and sum are 0 with zero
gradients, whatever the loss is divided by afterwards (torch's mean is NaN there; its gradients are zero as well).
N tokens, d channels, V classes, rank r. A target outside [0, V) is a ValueError on the CPU and makes the loss NaN on
CUDA. Errors: ValueError naming the argument, what was expected and what was given; nothing is written then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lemo._native import call
from lemo.ops._schema import REDUCTIONS, choice, define, first_order, link, need


def _out(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    targets: Tensor,
    ignore_index: int,
    softcap: float,
    reduction: str,
    segment_rows: int,
    want_dhidden: bool,
    want_dweight: bool,
    want_dbias: bool,
    want_dlora: bool,
) -> tuple[Tensor, ...]:
    need("hidden", hidden, "N d")
    need("weight", weight, "V d")

    def gradient(of: Tensor | None, wanted: bool) -> Tensor:
        return hidden.new_empty(of.shape if wanted and of is not None else (0,), dtype=torch.float32)

    return (
        hidden.new_empty(1, dtype=torch.float32),
        hidden.new_empty(1, dtype=torch.int64),
        hidden.new_empty(hidden.shape if want_dhidden else (0,)),
        gradient(weight, want_dweight),
        gradient(bias, want_dbias),
        gradient(lora_a, want_dlora),
        gradient(lora_b, want_dlora),
    )


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    targets: Tensor,
    ignore_index: int,
    softcap: float,
    reduction: str,
    segment_rows: int,
    want_dhidden: bool,
    want_dweight: bool,
    want_dbias: bool,
    want_dlora: bool,
) -> tuple[Tensor, ...]:
    for name, wanted, of in (("dbias", want_dbias, bias), ("dlora_a", want_dlora, lora_a)):
        if wanted and of is None:
            raise ValueError(f"{name}: expected {name[1:]} where its gradient is wanted, got none")
    outputs = _out(
        hidden,
        weight,
        bias,
        lora_a,
        lora_b,
        lora_scale,
        targets,
        ignore_index,
        softcap,
        reduction,
        segment_rows,
        want_dhidden,
        want_dweight,
        want_dbias,
        want_dlora,
    )
    loss, valid, dhidden, dweight, dbias, dlora_a, dlora_b = outputs
    # The matrix kernels of CUDA want ranks in steps of 8: zero rows and columns change nothing.
    missing = 0
    if lora_a is not None and lora_b is not None and hidden.is_cuda and lora_a.shape[0] % 8:
        missing = -lora_a.shape[0] % 8
        lora_a, lora_b = F.pad(lora_a, (0, 0, 0, missing)), F.pad(lora_b, (0, missing))
        if want_dlora:
            dlora_a, dlora_b = (p.new_empty(p.shape, dtype=torch.float32) for p in (lora_a, lora_b))
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "lora_a": lora_a,
        "lora_b": lora_b,
        "targets": targets,
        "ignore_index": ignore_index,
        "lora_scale": lora_scale,
        "softcap": softcap,
        "reduction": choice("reduction", reduction, REDUCTIONS),
        "segment_rows": segment_rows,
        "loss": loss,
        "valid": valid,
        "dhidden": dhidden if want_dhidden else None,
        "dweight": dweight if want_dweight else None,
        "dbias": dbias if want_dbias else None,
        "dlora_a": dlora_a if want_dlora else None,
        "dlora_b": dlora_b if want_dlora else None,
    }
    call("linear_cross_entropy", hidden.device, arguments)
    if missing and want_dlora:
        outputs[5].copy_(dlora_a[:-missing])
        outputs[6].copy_(dlora_b[:, :-missing])
    return outputs


define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, "
    "float lora_scale, Tensor targets, int ignore_index, float softcap, str reduction, int segment_rows, "
    "bool want_dhidden, bool want_dweight, bool want_dbias, bool want_dlora) -> (Tensor loss, Tensor valid, "
    "Tensor dhidden, Tensor dweight, Tensor dbias, Tensor dlora_a, Tensor dlora_b)",
    _run,
    _out,
    derivative="none",
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scale: float,
    targets: Tensor,
    ignore_index: int = -100,
    softcap: float = 0.0,
    reduction: str = "mean",
    segment_rows: int = 0,
    *,
    want_dhidden: bool = True,
    want_dweight: bool = False,
    want_dbias: bool = False,
    want_dlora: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(loss float32 [1], valid int64 [1], dhidden, dweight, dbias, dlora_a, dlora_b), unwanted gradients None.

    hidden [N, d], weight [V, d], bias [V], lora_a [r, d], lora_b [V, r] in one dtype; targets int64 [N]. Gradients are
    those of the loss itself: dhidden in the dtype of hidden, the others float32. No output requires a gradient.
    segment_rows: tokens per segment, 0 = chosen so that the workspace stays near 128 MiB.
    """
    loss, valid, *grads = torch.ops.lemo.linear_cross_entropy(
        hidden,
        weight,
        bias,
        lora_a,
        lora_b,
        lora_scale,
        targets,
        ignore_index,
        softcap,
        reduction,
        segment_rows,
        want_dhidden,
        want_dweight,
        want_dbias,
        want_dlora,
    )
    wanted = (want_dhidden, want_dweight, want_dbias, want_dlora, want_dlora)
    return loss, valid, *(g if w else None for g, w in zip(grads, wanted, strict=True))


def linear_cross_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    ignore_index: int = -100,
    softcap: float = 0.0,
    reduction: str = "mean",
    segment_rows: int = 0,
) -> Tensor:
    """The loss as a float32 scalar, differentiable in hidden, weight, bias, lora_a and lora_b.

    Gradients are computed in the forward pass, for the inputs that require one. bias, lora_a and lora_b may be kept in
    another dtype than hidden (fp32 adapters over a bf16 base): they are rounded to it, their gradients are not.
    """
    return _Loss.apply(
        hidden,
        weight,
        bias,
        lora_a,
        lora_b,
        targets,
        float(lora_scale),
        ignore_index,
        float(softcap),
        reduction,
        segment_rows,
        None if torch.compiler.is_compiling() else link(hidden, weight, bias, lora_a, lora_b),
    )


def usable(dloss: Tensor, valid: Tensor) -> Tensor:
    """The gradient of a loss over ``valid`` [1] targets: 0 over none, where a division by their number made it inf."""
    return torch.where(valid.view(()) > 0, dloss, torch.zeros_like(dloss))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        lora_a,
        lora_b,
        targets,
        lora_scale,
        ignore_index,
        softcap,
        reduction,
        segment_rows,
        tie,
    ):
        ctx.depends = () if tie is None else (tie,)
        wants = ctx.needs_input_grad
        small = [None if p is None else p.to(hidden.dtype) for p in (bias, lora_a, lora_b)]
        loss, valid, *grads = torch.ops.lemo.linear_cross_entropy(
            hidden,
            weight,
            *small,
            lora_scale,
            targets,
            ignore_index,
            softcap,
            reduction,
            segment_rows,
            wants[0],
            wants[1],
            wants[2],
            wants[3] or wants[4],
        )
        ctx.save_for_backward(*grads)
        ctx.valid = valid
        ctx.dtypes = [None if p is None else p.dtype for p in (hidden, weight, bias, lora_a, lora_b)]
        ctx.wants = wants[:5]
        ctx.scaled = False
        # A copy, since a view made here could not be scaled in place by whoever receives it.
        return loss.view(()).clone()

    @staticmethod
    @first_order("linear_cross_entropy_loss")
    def backward(ctx, dloss):
        dloss = usable(dloss, ctx.valid)
        if torch.compiler.is_compiling():  # a compiled graph reuses buffers by itself
            scaled = [g * dloss if w else None for g, w in zip(ctx.saved_tensors, ctx.wants, strict=True)]
        else:
            # In place, as the gradients may be as large as the residual stream; so they serve one backward pass.
            if ctx.scaled:
                raise RuntimeError("linear_cross_entropy_loss: expected one backward pass, got a second (retain_graph)")
            ctx.scaled = True
            scaled = [g.mul_(dloss) if w else None for g, w in zip(ctx.saved_tensors, ctx.wants, strict=True)]
        grads = [None if g is None else g.to(t) for g, t in zip(scaled, ctx.dtypes, strict=True)]
        return *grads, None, None, None, None, None, None, None
