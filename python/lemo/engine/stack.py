"""The decoder stack as one autograd function: kept rows in, gradients for kept rows out, one gradient buffer.

x [T, d] is the residual stream, updated in place layer by layer (`lemo.engine.forward`); dx [T, d] is its gradient,
updated likewise in reverse order (`lemo.engine.backward`). A layer works on the M kept rows of its list (paper section
5.1):

    h, x_kept = gather + norm (x)       a = attention(h)
    h2, x_mlp = norm (x_kept + a)       m = mlp(h2)             x[rows] = x_mlp + m

or, if its norms are behind the sums (`lemo.engine.residual`):

    x_kept = gather (x)                 a = attention(x_kept)
    h2, x_mlp = norm (x_kept + a)       m = mlp(h2)             x[rows], x_out = norm (h2 + m)

What a layer saves ("recompute"): "none": x_kept, x_mlp, x_out and what the local autograd graphs of attention and MLP
save; "attention": x_kept, the attention output and its log-sum-exp; "full": x_kept. The kept list is saved with it and
replayed. Mode "backward" runs the layer on all rows. With "none" the kept rows go through it with their graphs, and the
others without; otherwise only input, attention output and log-sum-exp of the kept rows are saved, and the backward pass
is the recomputation of "attention" on these. Either has the weights 1/p if asked for.

Layers may also save nothing but their lists ("segments", `lemo.engine.step`): one copy of the stream is saved before
each segment of them, and its layers run again in the backward pass, saving what `recompute` says for a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lemo.engine.backward import backward
from lemo.engine.forward import forward
from lemo.engine.gradients import handed_out, without_hooks
from lemo.engine.step import Step
from lemo.ops._autograd import first_order


class Stack(Function):
    """All layers at once. Inputs: x [T, d], the step, and the trained parameters of the layers, each once.

    Outputs: the stream after the last layer, and the sums of `Step.statistics` if the family has any.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Step, *params: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        stream = x.clone(memory_format=torch.contiguous_format) if step.borrowed else x.detach()
        with step.autocast():
            forward(step, stream)
        ctx.step, ctx.params = step, params
        ctx.depends = params
        return (stream, step.statistics.sums(len(step.layers))) if step.statistics else stream

    @staticmethod
    @first_order("a training step")
    def backward(ctx: Any, dy: Tensor, dstatistics: Tensor | None = None) -> tuple[Any, ...]:
        step: Step | None
        step, ctx.step = ctx.step, None
        if step is None:
            raise RuntimeError(
                "lemo: backward through the same step a second time: its saved tensors are gone (and retain_graph "
                "cannot keep them); run the forward pass again"
            )
        step.statistics.dtotal = dstatistics
        dx = step.handover.take(dy)
        worked = step.working
        with step.autocast(), without_hooks(ctx.params):
            grads = backward(step, dx, ctx.params)
        # Read only now that the device has done the work anyway, and before any gradient is handed out.
        step.raise_on_fault()
        if step.share is not None and not step.weights.divided:
            grads.sum_over(step.share.group)
        if step.weighted:  # a layer for which nothing was drawn has an estimate too: zero
            grads.add_zeros([layer for i, layer in enumerate(step.layers) if i not in worked])
        if step.when_done is not None:
            step.when_done()
        out = (handed_out(p, grads.of(p)) for p in ctx.params)
        return dx if ctx.needs_input_grad[0] else None, None, *out


def run(step: Step, x: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The residual stream after the last layer, [T, d], from x [T, d] before the first; `params` train."""
    output = Stack.apply(x, step, *params)
    x, total = output if isinstance(output, tuple) else (output, None)
    step.statistics.total = total if step.share is None or total is None else step.share.sum(total)
    return x
