"""The elementwise parts of a layer, each in one pass over memory: rotary positions, SwiGLU and ReLU.

M packed rows. Arithmetic in float32, every result rounded once. fp32 on the CPU, fp16 or bf16 on CUDA.
Errors: ValueError naming the argument, what was expected and what was given; nothing is written then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo.ops._autograd import direct, library
from lemo.ops._operator import need, operator


@operator("out")
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None, inverse: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None, inverse: bool = False) -> Tensor:
    """Rotates the pairs (j, j + D / 2) of every head by the angles of the row's position: [M, H, D].

    x [M, H, D], rows and heads may be strided; cos, sin [T, D] with equal halves, in the dtype of x or float32; rows
    int32 [M] names the row of the tables (-1: padding, zeros), None: row i, T = M. inverse rotates back.
    Differentiable in x, any number of times. The backward pass reads the same tables and rows, which nothing copies.
    """
    return _rotary_direct(x, cos, sin, rows, inverse)


@operator("out")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [M, f], both with rows that may be strided. Differentiable once; saves gate and up."""
    return _swiglu_direct(gate, up)


@operator("dgate dup", derivative="error")
def swiglu_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``swiglu`` for gate and up, in one pass: (dgate, dup), both [M, f]."""
    dgate = torch.empty_like(dout, memory_format=torch.contiguous_format)
    return dgate, torch.empty_like(dgate)


@operator(calls="swiglu_backward", writes="gate up", derivative="error", shared={"dgate": "gate", "dup": "up"})
def _swiglu_backward_(dout: Tensor, gate: Tensor, up: Tensor) -> None:
    return None


def swiglu_backward_(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As ``swiglu_backward``, in the memory of gate and up, which must not overlap and are returned: (dgate, dup)."""
    if not dout.device == gate.device == up.device:
        raise ValueError(f"dout, gate, up: expected one device, got {dout.device}, {gate.device} and {up.device}")
    if _overlap(gate, up):
        raise ValueError("up: expected memory that gate does not use, got an overlap; both are overwritten")
    _swiglu_backward_(dout, gate, up)
    return gate, up


@operator("bits", calls="relu", writes="x", derivative="error", shared={"out": "x"})
def relu_(x: Tensor) -> Tensor:
    """x [M, f] becomes max(x, 0). Returns all that ``relu_backward_`` needs: bits uint8 [M, ceil(f / 8)], one per
    element, whether its gradient passes (x > 0, or NaN)."""
    need("x", x, "M f")
    return x.new_empty(x.shape[0], (x.shape[1] + 7) // 8, dtype=torch.uint8)


@operator(calls="relu_backward", writes="dout", derivative="error", shared={"dx": "dout"})
def _relu_backward_(dout: Tensor, bits: Tensor) -> None:
    return None


def relu_backward_(dout: Tensor, bits: Tensor) -> Tensor:
    """dout [M, f] becomes the gradient of what ``relu_`` was given, and is returned."""
    _relu_backward_(dout, bits)
    return dout


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether matrices of one width share an element. Columns of one buffer do not."""
    if torch.compiler.is_compiling() or not type(a) is type(b) is Tensor or a.device.type == "meta":
        return False  # no addresses to compare
    if not a.numel() or not b.numel() or a.dim() != 2 or b.dim() != 2:
        return False
    first, second = sorted((a, b), key=Tensor.data_ptr)
    apart = (second.data_ptr() - first.data_ptr()) // first.element_size()
    stride, width = first.stride(0), first.shape[1]
    if apart >= (first.shape[0] - 1) * stride + width:
        return False
    return second.stride(0) != stride or not width <= apart % stride <= stride - width


def _rotary_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    # The tables belong to the step and the rows to the layer's kept list: not saved, so that they count for no layer.
    _, ctx.cos, ctx.sin, ctx.rows, ctx.inverse = inputs


def _rotary_grad(ctx, grad):
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError("lemo: rotary has no derivative in cos and sin: expected tables that require no gradient")
    return rotary(grad.contiguous(), ctx.cos, ctx.sin, ctx.rows, not ctx.inverse), None, None, None, None


def _swiglu_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_grad(ctx, grad):
    return swiglu_backward(grad.contiguous(), *ctx.saved_tensors)


# The functions above; whoever calls torch.ops.lemo, or is watched, has the same derivatives by registration.
_rotary_direct = direct(_rotary, _rotary_context, _rotary_grad)
_swiglu_direct = direct(_swiglu, _swiglu_context, _swiglu_grad)
torch.library.register_autograd("lemo::rotary", _rotary_grad, setup_context=_rotary_context, lib=library)
torch.library.register_autograd("lemo::swiglu", _swiglu_grad, setup_context=_swiglu_context, lib=library)
