"""Output projection and cross-entropy in segments of tokens: logits never exist as a whole (paper section 5.2).

z = h W^T (+ lora_scale (h A^T) B^T) (+ bias); softcap c > 0: z = c tanh(z / c); loss = mean or sum over tokens whose
target is not ``ignore_index`` of logsumexp(z_t) - z_t[target_t]. Over no valid token, mean and sum are 0 with zero
gradients, whatever the loss is divided by afterwards (torch's mean is NaN there; its gradients are zero as well).
N tokens, d channels, V classes, rank r. A target outside [0, V) is a ValueError on the CPU and makes the loss NaN on
CUDA. Errors: ValueError naming the argument, what was expected and what was given; nothing is written then.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lemo.ops._autograd import first_order, link
from lemo.ops._operator import Launch, Reduction, need, operator


def _pad_ranks(run: Launch, arguments: dict[str, Any]) -> None:
    """The matrix kernels of CUDA want ranks in steps of 8: zero rows and columns change nothing."""
    lora_a, lora_b = arguments["lora_a"], arguments["lora_b"]
    missing = 0 if lora_a is None or lora_b is None or not lora_a.is_cuda else -lora_a.shape[0] % 8
    if not missing:
        return run(arguments)
    padded = {"lora_a": F.pad(lora_a, (0, 0, 0, missing)), "lora_b": F.pad(lora_b, (0, missing))}
    wanted = arguments["dlora_a"] is not None
    if wanted:
        padded |= {f"d{name}": p.new_empty(p.shape, dtype=torch.float32) for name, p in padded.items()}
    run(arguments | padded)
    if wanted:
        arguments["dlora_a"].copy_(padded["dlora_a"][:-missing])
        arguments["dlora_b"].copy_(padded["dlora_b"][:, :-missing])


@operator("loss valid dhidden dweight dbias dlora_a dlora_b", derivative="none", around=_pad_ranks)
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
    reduction: Reduction = "mean",
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
    need("hidden", hidden, "N d")
    need("weight", weight, "V d")

    def gradient(name: str, of: Tensor | None, wanted: bool) -> Tensor | None:
        if wanted and of is None:
            raise ValueError(f"d{name}: expected {name} if its gradient is wanted, got no tensor")
        return hidden.new_empty(of.shape, dtype=torch.float32) if wanted and of is not None else None

    return (
        hidden.new_empty(1, dtype=torch.float32),
        hidden.new_empty(1, dtype=torch.int64),
        hidden.new_empty(hidden.shape) if want_dhidden else None,
        gradient("weight", weight, want_dweight),
        gradient("bias", bias, want_dbias),
        gradient("lora_a", lora_a, want_dlora),
        gradient("lora_b", lora_b, want_dlora),
    )


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
    parameters = (hidden, weight, bias, lora_a, lora_b)
    tie = None if torch.compiler.is_compiling() else link(*parameters)
    options = (float(lora_scale), targets, ignore_index, float(softcap), reduction, segment_rows)
    return _Loss.apply(*parameters, tie, *options)


def usable(dloss: Tensor, valid: Tensor) -> Tensor:
    """The gradient of a loss over ``valid`` [1] targets: 0 over none, for which a division by their number gave inf."""
    return torch.where(valid.view(()) > 0, dloss, torch.zeros_like(dloss))


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, lora_a, lora_b, tie, *options):
        ctx.depends = () if tie is None else (tie,)
        ctx.wants = wants = ctx.needs_input_grad[:5]
        inputs: Any = (*(None if p is None else p.to(hidden.dtype) for p in (bias, lora_a, lora_b)), *options)
        flags = {"want_dhidden": wants[0], "want_dweight": wants[1], "want_dbias": wants[2]}
        flags["want_dlora"] = wants[3] or wants[4]
        loss, valid, *grads = linear_cross_entropy(hidden, weight, *inputs, **flags)
        ctx.save_for_backward(*grads)
        ctx.valid = valid
        ctx.dtypes = [None if p is None else p.dtype for p in (hidden, weight, bias, lora_a, lora_b)]
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
        return *grads, *(None for _ in ctx.needs_input_grad[5:])
