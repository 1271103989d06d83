"""Linear layers of the base model with their adapters: the cheap path, and the module itself if that is not safe.

The cheap path covers frozen `nn.Linear` weights, frozen quantized weights (4 and 8 bits of bitsandbytes, what torchao
can make dense), and PEFT's LoRA over them: plain adapters, one or several that are active together, and one DoRA;
without dropout. Adapters stay in their own dtype (fp32 over a bf16 base); products run in the dtype of the input,
adapter gradients accumulate in fp32. Everything else - other quantized bases, LoRA dropout, other adapter kinds,
trainable base weights - calls the module: correct, at the module's own memory cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from lemo.engine.wrappers import full_name, kind_of, sharded, sharded_tensor
from lemo.ops._autograd import first_order


@dataclass(frozen=True, eq=False)
class Form:
    """How a quantized weight is stored: what makes the dense one [o, d] of it, in a floating dtype; width o."""

    dequantize: Callable[[Tensor], Tensor]
    width: int


class Projection(NamedTuple):
    """y = g (h W^T + scale (h a^T) b^T) + bias; a [r, d], b [o, r].

    weight: as it is stored: W [o, d], frozen unless it is a loss head, or the form that W is made of. magnitude [o], of
    DoRA: g = magnitude / |W + scale b a|, norms of rows, which are constants to the gradient as in PEFT; None: g is 1.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    form: Form | None = None
    magnitude: Tensor | None = None

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
    for p in linear._parameters.values():  # noqa: SIM110 - half the time of any(...), of every projection in every use
        if p is not None and p.requires_grad:
            return False
    return True


def _class(module: Any) -> str:
    return full_name(kind_of(module))


def _four_bit(linear: Any) -> Form | None:
    """Of bitsandbytes: weights are quantized when the module moves to its device; until then the module is called, and
    so it is if they were repacked for inference on a CPU."""
    state = getattr(linear.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found, unused-ignore]

    return Form(lambda stored: dequantize_4bit(stored.data, state), linear.out_features)


def _eight_bit(linear: Any) -> Form | None:
    """Of bitsandbytes: rows of int8 with a scale each, which the layer's state takes over from the weight at the first
    call. Activations stay as they are, whereas bitsandbytes quantizes them too on a GPU."""
    scales = linear.state.SCB if linear.state.SCB is not None else getattr(linear.weight, "SCB", None)
    if scales is None or linear.weight.dtype != torch.int8 or linear.state.has_fp16_weights:
        return None
    return Form(lambda stored: stored.data * (scales / 127.0)[:, None], linear.out_features)


# Linear layers that store their weight in another form, by the class's full name; None for one that cannot be read yet.
# A class added here takes the cheap path.
QUANTIZED: dict[str, Callable[[Any], Form | None]] = {
    "bitsandbytes.nn.modules.Linear4bit": _four_bit,
    "bitsandbytes.nn.modules.Linear8bitLt": _eight_bit,
}
# PEFT's LoRA around them.
_LORA = tuple(f"peft.tuners.lora.{name}" for name in (
    "layer.Linear", "bnb.Linear4bit", "bnb.Linear8bitLt", "torchao.TorchaoLoraLinear",
))  # fmt: skip
_DORA = ("peft.tuners.lora.variants.DoraLinearVariant", "peft.tuners.lora.dora.DoraLinearLayer")


def _base(linear: Any, trainable: bool) -> Projection | None:
    """The projection of a linear layer without adapters."""
    if hooked(linear) or not (trainable or _frozen(linear)):
        return None
    if kind_of(linear) is nn.Linear:
        return _of_tensor(linear)
    kind = QUANTIZED.get(_class(linear))
    form = None if kind is None or not _frozen(linear) else kind(linear)
    return None if form is None else Projection(linear.weight, linear.bias, form=form)


def _of_tensor(linear: nn.Linear) -> Projection | None:
    """Of torch's own linear layer; torchao puts a tensor of its own kind into one."""
    weight: Tensor = linear.weight
    if type(weight) in (nn.Parameter, Tensor) or sharded_tensor(weight):
        return Projection(weight, linear.bias)
    if not type(weight).__module__.startswith("torchao.") or not hasattr(weight, "dequantize") or not _frozen(linear):
        return None
    return Projection(weight, linear.bias, form=Form(lambda stored: stored.dequantize(), linear.out_features))


def projection(module: Any, *, head: bool = False) -> Projection | None:
    """The weights of a module the cheap path covers, or None.

    head: of the loss: also covers a base weight that trains, but not DoRA, which the operator of the loss lacks.
    """
    outer, module = module, unwrap(module)
    if hooked(module) or (outer is not module and hooked(outer)):
        return None
    if _class(module) not in _LORA:
        return _base(module, head)
    base = _base(module.base_layer, head)
    if base is None:
        return None
    if module.merged or module.disable_adapters:
        return base
    # As they are registered: looking attributes of a module up takes long, and this is done several times a layer.
    lora_a, lora_b, dropouts = (module._modules[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
    active = [name for name in module.active_adapters if name in lora_a]
    if not active:
        return base
    for name in active:
        if module.fan_in_fan_out or not _undisturbed(lora_a[name], lora_b[name], dropouts[name]):
            return None
    pairs = [(lora_a[name].weight, lora_b[name].weight) for name in active]
    scales = [float(module.scaling[name]) for name in active]
    magnitude = None
    if module.lora_variant and any(name in module.lora_variant for name in active):
        magnitude = _magnitude(module, active)
        if head or magnitude is None:
            return None
    if len(active) == 1:
        (a, b), scale = pairs[0], scales[0]
    else:  # their sum is one adapter of all ranks
        a, scale = torch.cat([a for a, _ in pairs]), 1.0
        b = torch.cat([b * factor for (_, b), factor in zip(pairs, scales, strict=True)], 1)
    return Projection(base.weight, base.bias, a, b, scale, base.form, magnitude)


def _undisturbed(a: Any, b: Any, dropout: Any) -> bool:
    """Whether an adapter of PEFT's LoRA is two products and nothing else."""
    if type(a) is not nn.Linear or type(b) is not nn.Linear or type(dropout) is not nn.Identity:
        return False
    return not (hooked(a) or hooked(b) or hooked(dropout)) and b.bias is None


def _magnitude(module: Any, active: Sequence[str]) -> Tensor | None:
    """DoRA's vector, if that is the only active adapter."""
    if len(active) != 1 or _class(module.lora_variant.get(active[0])) != _DORA[0]:
        return None
    holder = module.lora_magnitude_vector[active[0]]
    return holder.weight if ordinary(holder, _DORA[1]) else None


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


def _row_norms(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """|W + scale b a| of every row, float32 [o], without a second tensor of W's size."""
    with torch.autocast(w.device.type, enabled=False):
        inner, b = _product_fp32(w, a.to(w.dtype).t()), b.float()
        squares = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32).square_()
        squares += (2 * scale) * (inner * b).sum(1)
        squares += scale**2 * ((b @ (a.float() @ a.float().t())) * b).sum(1)
        return squares.clamp_(min=0).sqrt_()


# Tensors of a projection in the arguments of LinearGroup: weight, bias, a, b, magnitude; four arguments come first.
_PARTS = 5
_BEFORE = 4
# Rows of a DoRA's output that are computed again at a time, for the gradient of its magnitude.
_DORA_ROWS = 4096


class Again(NamedTuple):
    """How a tensor is made once more: make(*tensors), from what is kept anyway. The graph saves `tensors` like anything
    else, so they may meanwhile be elsewhere; `make` must not hold anything that holds the graph."""

    make: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def remade(x: Tensor, again: Again) -> Tensor:
    """x, marked: projections that read it do not save it, but make it again in the backward pass, with the same
    values."""
    x.lemo_again = again  # type: ignore[attr-defined]
    return x


def made_here(y: Tensor) -> bool:
    """Whether y is the output of `linear_group`'s cheap path in a graph: nobody else has seen it, as hooks of a module
    that is called could, so its memory may be reused once the graph does not need it."""
    return type(y.grad_fn).__name__ == "LinearGroupBackward"


class LinearGroup(Function):
    """Several projections of the same rows. h [M, d] -> one [M, o_i] per projection.

    Arguments: h, scale and form of every projection, want_output, again, then weight, bias, a, b, magnitude of every
    projection. Saves h once, if any projection has an adapter that trains, and the [M, r] products h a^T; frozen
    weights get no gradient. again makes h once more, which is then not saved (see `remade`); None: nothing does. A
    quantized weight is saved as it is stored, and made dense again in the backward pass. DoRA saves its norms [o] as
    well; its output without the magnitude is computed again, in chunks of rows. With want_output False the outputs are
    zeros without separate memory: recomputation needs the graph, not always the last product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        settings: Sequence[tuple[float, Form | None]],
        want_output: bool,
        again: Again | None,
        *parts: Tensor | None,
    ) -> tuple[Tensor, ...]:
        outputs, norms = [], []
        adapters = _Adapters.of(parts, h.dtype)
        t = None if adapters.a is None else h @ adapters.a.t()
        inner = adapters.split(t)
        for i, (scale, form) in enumerate(settings):
            weight, bias, a, b, magnitude = parts[_PARTS * i : _PARTS * (i + 1)]
            assert weight is not None
            norm = g = None
            if want_output or magnitude is not None:
                w = _dense(weight, form).to(h.dtype)
            if magnitude is not None and a is not None and b is not None:
                norm = _row_norms(w, a, b, scale)
                g = magnitude.float() / norm
            if want_output:
                y = _output(h, w, bias, inner[i], adapters.b[i], scale, g)
            else:
                width = weight.shape[0] if form is None else form.width
                y = h.new_zeros(1, 1).expand(h.shape[0], width)
            outputs.append(y)
            norms.append(norm)
        trained_a, trained_b, trained_m = (any(_wanted(ctx, part)) for part in (2, 3, 4))
        wants_h = trained_a or trained_m
        again = again if wants_h else None
        ctx.settings, ctx.make = settings, None if again is None else again.make
        kept = h if wants_h and again is None else None, t if trained_b or trained_m else None
        ctx.save_for_backward(*kept, *norms, *parts, *(() if again is None else again.tensors))
        return tuple(outputs)

    @staticmethod
    @first_order("a linear layer with its adapter")
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        n = len(ctx.settings)
        h, t, *rest = ctx.saved_tensors
        norms, parts, made_of = rest[:n], rest[n : n + _PARTS * n], rest[n + _PARTS * n :]
        want_dh, (want_a, want_b, want_m) = ctx.needs_input_grad[0], (_wanted(ctx, part) for part in (2, 3, 4))
        dtype = dys[0].dtype
        adapters = _Adapters.of(parts, dtype)
        dh: Any = None
        dt = None
        if adapters.a is not None and (want_dh or any(want_a)):
            dt = dys[0].new_empty(dys[0].shape[0], adapters.a.shape[0])
        inner, dinner = adapters.split(t), adapters.split(dt)
        da: list[Tensor | None] = [None] * n
        db: list[Tensor | None] = [None] * n
        dm: list[Tensor | None] = [None] * n
        for i, ((scale, form), dy) in enumerate(zip(ctx.settings, dys, strict=True)):
            weight, _, _, b, magnitude = parts[_PARTS * i : _PARTS * (i + 1)]
            if want_dh or want_m[i]:
                w = _dense(weight, form).to(dtype)
            if magnitude is not None:
                if want_m[i]:
                    h = ctx.make(*made_of) if h is None else h
                    found = _magnitude_gradient(dy, h, w, inner[i], b, scale)
                    dm[i] = found.div_(norms[i]).to(magnitude.dtype)
                dy = dy * (magnitude.float() / norms[i]).to(dtype)
            if want_dh:
                dh = dy @ w if dh is None else dh.addmm_(dy, w)
                del w
            if dinner[i] is not None:
                dinner[i].addmm_(dy, adapters.b[i], beta=0, alpha=scale)
            if want_b[i]:
                db[i] = _product_fp32(dy.t(), inner[i])
        if want_dh and dt is not None:
            dh.addmm_(dt, adapters.a)
        if any(want_a):
            h = ctx.make(*made_of) if h is None else h
            of_each = adapters.split(_product_fp32(dt.t(), h), 0)  # type: ignore[union-attr]
            da = [of_each[i].to(parts[_PARTS * i + 2].dtype) if want_a[i] else None for i in range(n)]
        _scale([(g, scale) for g, (scale, _) in zip(db, ctx.settings, strict=True) if g is not None])
        db = [None if g is None else g.to(parts[_PARTS * i + 3].dtype) for i, g in enumerate(db)]
        grads = ((None, None, da[i], db[i], dm[i]) for i in range(n))
        return dh, None, None, None, *(g for of_one in grads for g in of_one)


def _wanted(ctx: Any, part: int) -> tuple[bool, ...]:
    """Whether one part of every projection needs a gradient."""
    return ctx.needs_input_grad[_BEFORE + part :: _PARTS]


class _Adapters(NamedTuple):
    """Adapters of several projections of the same rows, in the dtype of their products: all a as one [R, d], each b
    [o, r], and how many of the R each projection has."""

    a: Tensor | None
    b: list[Any]
    ranks: list[int]

    @classmethod
    def of(cls, parts: Sequence[Tensor | None], dtype: torch.dtype) -> _Adapters:
        a, b = parts[2::_PARTS], list(parts[3::_PARTS])
        ranks = [0 if one is None else one.shape[0] for one in a]
        given = [x for x in (*a, *b) if x is not None]
        count = len(given) // 2
        if not given:
            return cls(None, b, ranks)
        if all(x.dtype == dtype for x in given):
            return cls(given[0] if count == 1 else torch.cat(given[:count]), b, ranks)
        # Casts with one launch on a GPU; those of all a lie one after the other.
        sizes = [x.numel() for x in given]
        memory = given[0].new_empty(sum(sizes), dtype=dtype)
        cast = [piece.view(x.shape) for piece, x in zip(memory.split(sizes), given, strict=True)]
        torch._foreach_copy_(cast, given)
        rest = iter(cast[count:])
        joined = cast[0] if count == 1 else memory[: sum(sizes[:count])].view(sum(ranks), -1)
        return cls(joined, [None if x is None else next(rest) for x in b], ranks)

    def split(self, t: Tensor | None, dim: int = 1) -> list[Any]:
        """What each projection has of t [M, R], or with dim 0 of t [R, d]; None for one without an adapter."""
        if t is None:
            return [None] * len(self.ranks)
        pieces = iter(t.split(self.ranks, dim) if max(self.ranks) < t.shape[dim] else [t] * len(self.ranks))
        return [piece if rank else None for piece, rank in zip(pieces, self.ranks, strict=True)]


def _scale(pairs: Sequence[tuple[Tensor, float]]) -> None:
    """Multiplies tensors in place, all with one launch on a GPU."""
    if pairs:
        torch._foreach_mul_([tensor for tensor, _ in pairs], [factor for _, factor in pairs])


def _output(
    h: Tensor, w: Tensor, bias: Tensor | None, t: Tensor | None, b: Tensor | None, scale: float, g: Tensor | None
) -> Tensor:
    """y [M, o] of a projection; t [M, r]: h a^T; g float32 [o]: DoRA's factor."""
    bias = None if bias is None else bias.to(h.dtype)
    y = F.linear(h, w, bias if g is None else None)
    if t is not None and b is not None:
        y.addmm_(t, b.to(h.dtype).t(), alpha=scale)
    if g is not None:
        y.mul_(g)
        if bias is not None:
            y.add_(bias)
    return y


def _magnitude_gradient(dy: Tensor, h: Tensor, w: Tensor, t: Tensor, b: Tensor, scale: float) -> Tensor:
    """Sum over rows of dy times the output before the magnitude, float32 [o]."""
    total = torch.zeros(w.shape[0], dtype=torch.float32, device=w.device)
    for start in range(0, h.shape[0], _DORA_ROWS):
        c = slice(start, start + _DORA_ROWS)
        total += _output(h[c], w, None, t[c], b, scale, None).mul_(dy[c]).sum(0, dtype=torch.float32)
    return total


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
            parts += [spec.weight, spec.bias, spec.a, spec.b, spec.magnitude]
            settings.append((spec.scale, spec.form))
    if fast:
        # A module that is called may save h itself: making it again would then save nothing.
        again = getattr(h, "lemo_again", None) if len(fast) == len(modules) else None
        for i, y in zip(fast, LinearGroup.apply(h, settings, want_output, again, *parts), strict=True):
            outputs[i] = y
    return tuple(y for y in outputs if y is not None)
