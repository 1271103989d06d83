"""Linear layers of the base model with their adapters: the cheap path, and the module itself if that is not safe.

The cheap path covers frozen `nn.Linear` weights, frozen 4-bit weights of bitsandbytes, and PEFT's plain LoRA over them:
one active adapter, no dropout, no variant (DoRA and others). Adapters stay in their own dtype (fp32 over a bf16 base);
products run in the dtype of the input, adapter gradients accumulate in fp32. Everything else - other quantized bases,
LoRA dropout, DoRA, other adapter kinds, trainable base weights - calls the module: correct, at the module's own memory
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lemo.engine.wrappers import kind_of, sharded
from lemo.ops._autograd import first_order


@dataclass(frozen=True, eq=False)
class Form:
    """How a quantized weight is stored: what makes the dense one [o, d] of it, in a floating dtype; width o."""

    dequantize: Callable[[Tensor], Tensor]
    width: int


@dataclass(frozen=True, eq=False)
class Projection:
    """y = h W^T + bias + scale (h a^T) b^T; a [r, d], b [o, r].

    weight: as it is stored: W [o, d], frozen unless it is a loss head, or the form that W is made of.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    form: Form | None = None

    @property
    def width(self) -> int:
        """o."""
        return self.weight.shape[0] if self.form is None else self.form.width

    def dense_weight(self) -> Tensor:
        """W [o, d]. Made anew by every call if it is stored in another form: use it and let it go."""
        return _dense(self.weight, self.form)


def _dense(stored: Tensor, form: Form | None) -> Tensor:
    if form is None:
        return stored
    with torch.no_grad():
        return form.dequantize(stored)


# --- which modules the cheap path covers ------------------------------------------------------------------------------


def unwrap(module: Any) -> Any:
    """The module that runs in place of PEFT's `modules_to_save` wrapper; any other module itself."""
    children = getattr(module, "_modules", ())
    if "modules_to_save" not in children or "original_module" not in children:
        return module
    saved = module.modules_to_save
    active = [name for name in getattr(module, "active_adapters", []) if name in saved]
    if getattr(module, "disable_adapters", False) or not active:
        return module.original_module
    return saved[active[0]]


# Where torch keeps a module's hooks.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked(module: nn.Module) -> bool:
    """Whether calling the module runs hooks, or a forward method that is the instance's own. Of a module that FSDP2
    divides, only the latter: its hooks gather the weights, and others are not told apart from them here."""
    s = module.__dict__
    hooks = s["_forward_hooks"] or s["_forward_pre_hooks"] or s["_backward_hooks"] or s["_backward_pre_hooks"]
    return (bool(hooks) and not sharded(module)) or "forward" in s


def ordinary(module: nn.Module, *kinds: str) -> bool:
    """Whether a module is of one of these very classes (full names), without hooks or a replaced forward method."""
    return _class(module) in kinds and not hooked(module)


def _frozen(linear: nn.Module) -> bool:
    return not any(p is not None and p.requires_grad for p in linear._parameters.values())


def _class(module: Any) -> str:
    kind = kind_of(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _four_bit(linear: Any) -> Form | None:
    """Of bitsandbytes: weights are quantized when the module moves to its device; until then the module is called, and
    so it is if they were repacked for inference on a CPU."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found, unused-ignore]

    return Form(lambda stored: dequantize_4bit(stored.data, state), linear.out_features)


# Linear layers that store their weight in another form, by the class's full name; None for one that cannot be read yet.
# A class added here takes the cheap path.
QUANTIZED: dict[str, Callable[[Any], Form | None]] = {"bitsandbytes.nn.modules.Linear4bit": _four_bit}
# PEFT's plain LoRA around them.
_LORA = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.bnb.Linear4bit")


def _base(linear: Any, trainable: bool) -> Projection | None:
    """The projection of a linear layer without adapters."""
    if hooked(linear) or not (trainable or _frozen(linear)):
        return None
    if kind_of(linear) is nn.Linear:
        return Projection(linear.weight, linear.bias)
    kind = QUANTIZED.get(_class(linear))
    form = None if kind is None or not _frozen(linear) else kind(linear)
    return None if form is None else Projection(linear.weight, linear.bias, form=form)


def projection(module: Any, *, trainable: bool = False) -> Projection | None:
    """The weights of a module the cheap path covers, or None. `trainable`: also cover a base weight that trains."""
    outer, module = module, unwrap(module)
    if hooked(module) or (outer is not module and hooked(outer)):
        return None
    if _class(module) not in _LORA:
        return _base(module, trainable)
    base = _base(module.base_layer, trainable)
    if base is None:
        return None
    active = [name for name in module.active_adapters if name in module.lora_A]
    if module.merged or module.disable_adapters or not active:
        return base
    name = active[0]
    a: Any = module.lora_A[name]
    b: Any = module.lora_B[name]
    plain = (
        len(active) == 1
        and all(type(m) is nn.Linear and not hooked(m) for m in (a, b))
        and b.bias is None
        and type(module.lora_dropout[name]) is nn.Identity
        and not hooked(module.lora_dropout[name])
        and name not in module.lora_variant
        and not module.fan_in_fan_out
    )
    return replace(base, a=a.weight, b=b.weight, scale=float(module.scaling[name])) if plain else None


def reads_input(module: Any) -> bool:
    """Whether `linear_group` without an output still reads the values of its input: for an adapter's gradient, or since
    it calls the module."""
    spec = projection(module)
    return spec is None or spec.a is not None


def _product_fp32(x: Tensor, y: Tensor) -> Tensor:
    """x @ y accumulated and returned in fp32, without fp32 copies of the factors if the backend can."""
    if x.dtype == torch.float32:
        return x @ y
    if x.is_cuda:
        try:
            return torch.mm(x, y, out_dtype=torch.float32)
        except (TypeError, RuntimeError):  # a torch before 2.8
            pass
    return (x @ y).float()


class LinearGroup(Function):
    """Several projections of the same rows. h [M, d] -> one [M, o_i] per projection.

    Arguments: h, scale and form of every projection, want_output, then weight, bias, a, b of every projection. Saves h
    once, if any projection has an adapter that trains, and the [M, r] products h a^T; frozen weights get no gradient. A
    quantized weight is saved as it is stored, and made dense again in the backward pass. With want_output False the
    outputs are zeros without separate memory: recomputation needs the graph, not always the last product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        settings: Sequence[tuple[float, Form | None]],
        want_output: bool,
        *parts: Tensor | None,
    ) -> tuple[Tensor, ...]:
        dtype, outputs, inner = h.dtype, [], []
        adapters = False
        for i, (scale, form) in enumerate(settings):
            weight, bias, a, b = parts[4 * i : 4 * i + 4]
            assert weight is not None
            if want_output:
                y = F.linear(h, _dense(weight, form).to(dtype), None if bias is None else bias.to(dtype))
            else:
                width = weight.shape[0] if form is None else form.width
                y = h.new_zeros(1, 1).expand(h.shape[0], width)
            t = None
            if a is not None and b is not None:
                t = h @ a.to(dtype).t()
                if want_output:
                    y.addmm_(t, b.to(dtype).t(), alpha=scale)
                adapters = adapters or ctx.needs_input_grad[3 + 4 * i + 2]
            outputs.append(y)
            inner.append(t if t is not None and ctx.needs_input_grad[3 + 4 * i + 3] else None)
        ctx.settings = settings
        ctx.save_for_backward(h if adapters else None, *inner, *parts)
        return tuple(outputs)

    @staticmethod
    @first_order("a linear layer with its adapter")
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        n = len(ctx.settings)
        h, *rest = ctx.saved_tensors
        inner, parts = rest[:n], rest[n:]
        dh: Any = None
        grads: list[Tensor | None] = []
        want_dh = ctx.needs_input_grad[0]
        for i, ((scale, form), dy) in enumerate(zip(ctx.settings, dys, strict=True)):
            weight, _, a, b = parts[4 * i : 4 * i + 4]
            want_a, want_b = ctx.needs_input_grad[3 + 4 * i + 2], ctx.needs_input_grad[3 + 4 * i + 3]
            dtype = dy.dtype
            if want_dh:
                w = _dense(weight, form).to(dtype)
                dh = dy @ w if dh is None else dh.addmm_(dy, w)
                del w
            da = db = None
            if a is not None:
                dt: Any = None
                if want_dh or want_a:
                    dt = (dy @ b.to(dtype)).mul_(scale)
                if want_dh:
                    dh.addmm_(dt, a.to(dtype))
                if want_a:
                    da = _product_fp32(dt.t(), h).to(a.dtype)
                if want_b:
                    db = _product_fp32(dy.t(), inner[i]).mul_(scale).to(b.dtype)
            grads += [None, None, da, db]
        return dh, None, None, *grads


def linear_group(modules: Sequence[nn.Module], h: Tensor, want_output: bool = True) -> tuple[Tensor, ...]:
    """Outputs of several linear modules that read the same rows h [M, d], in h's dtype.

    want_output False: values are not needed, only the graph behind them; the cheap path then skips the product.
    """
    outputs: list[Tensor | None] = [None] * len(modules)
    fast: list[int] = []
    parts: list[Tensor | None] = []
    settings: list[tuple[float, Form | None]] = []
    for i, module in enumerate(modules):
        spec = projection(module)
        if spec is None:
            outputs[i] = module(h).to(h.dtype)
        else:
            fast.append(i)
            parts += [spec.weight, spec.bias, spec.a, spec.b]
            settings.append((spec.scale, spec.form))
    if fast:
        for i, y in zip(fast, LinearGroup.apply(h, settings, want_output, *parts), strict=True):
            outputs[i] = y
    return tuple(y for y in outputs if y is not None)
