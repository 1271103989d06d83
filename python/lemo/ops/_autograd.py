"""Operators of the torch library `lemo` and autograd.

Tensors written in place count as changed (their version rises); outputs without a derivative never require one; and if
only a first derivative exists, asking for the second is an error, never zero.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

library = torch.library.Library("lemo", "DEF")


def refuse_derivatives(name: str) -> None:
    """Outputs of the operator require a gradient if an input does, and asking for it raises RuntimeError."""
    schema = _operator(name)._schema
    mutated = [i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write]
    single = len(schema.returns) == 1

    def underivable(run: Callable[..., Any], *args: Any) -> Any:
        outputs = _Underivable.apply(name, run, mutated, *args)
        if not mutated:
            return outputs
        # The dispatcher counts what the schema returns.
        return outputs[-1] if single else outputs[len(mutated) :] or None

    bind_autograd(name, underivable)


def written(tensor: Tensor) -> None:
    """Records that a kernel changed the tensor in place: autograd then refuses copies saved before."""
    if not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def bind_autograd(name: str, differentiable: Callable[..., Any]) -> None:
    """differentiable(run, *args) serves calls in which an argument requires a gradient; run(*args) is the operator
    itself below autograd. Like `torch.library.register_autograd`, which does not accept operators that write into an
    argument."""
    operator, grad_mode, below = _operator(name), torch.is_grad_enabled, torch._C._AutoDispatchBelowAutograd
    after = torch._C._after_autograd_keyset

    def kernel(keys: Any, *args: Any) -> Any:
        if grad_mode() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return differentiable(functools.partial(run, keys), *args)
        with below():
            return operator.redispatch(keys & after, *args)

    def run(keys: Any, *args: Any) -> Any:
        with below():
            return operator.redispatch(keys & after, *args)

    library.impl(name, kernel, "Autograd", with_keyset=True)


# What torch asks itself before a call. These are not public: without one of them, every call goes to the dispatcher.
_WATCHERS = (
    "_len_torch_dispatch_stack",
    "_len_torch_function_stack",
    "_autograd._profiler_enabled",
    "_functorch.peek_interpreter_stack",
    "_get_tracing_state",
)


def watchers(home: Any, names: Iterable[str] = _WATCHERS) -> tuple[Callable[[], Any], ...]:
    """The functions of these names; one that always objects if a version of torch lacks any of them."""
    try:
        return tuple(attrgetter(name)(home) for name in names)
    except AttributeError:
        return (lambda: True,)


_watching = watchers(torch._C)


def unwatched() -> bool:
    """Whether nothing but autograd takes part in the calls of operators: neither a mode nor a transform, a profiler, a
    tracer or a compiler."""
    if torch.compiler.is_compiling():  # first: a compiler cannot trace the others
        return False
    for watches in _watching:  # noqa: SIM110 - half the time of any(...), before every operator
        if watches():
            return False
    return True


def direct(
    operator: Callable[..., Any], context: Callable[..., None], gradient: Callable[..., Any]
) -> Callable[..., Any]:
    """operator, for calls that autograd records and nothing else watches as a function of autograd with this context
    and gradient: what `register_autograd` makes of the same takes three times as long."""

    class Direct(Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = operator(*inputs)
            context(ctx, inputs, output)
            return output

        backward = staticmethod(gradient)

    def call(*inputs: Any) -> Any:
        return (Direct.apply if unwatched() and differentiates(inputs) else operator)(*inputs)

    return call


def differentiates(tensors: Iterable[Any]) -> bool:
    """Whether autograd records what is computed of these (tensors, or anything else)."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def launcher(operator: Any) -> Callable[..., Any]:
    """The operator, past autograd if gradients are off: autograd kernels in Python double the cost of a call."""
    grad_mode, compiling = torch.is_grad_enabled, torch.compiler.is_compiling
    below = torch._C._AutoDispatchBelowAutograd
    direct = getattr(operator, "_op", operator)  # without a frame of Python around it

    def launch(*args: Any, **keywords: Any) -> Any:
        if compiling():
            return operator(*args, **keywords)
        if grad_mode():
            return direct(*args, **keywords)
        with below():
            return direct(*args, **keywords)

    return launch


def _operator(name: str) -> Any:
    return getattr(torch.ops.lemo, name).default


# --- if a second derivative is asked for -----------------------------------------------------------------------------


def _refuse(name: str) -> RuntimeError:
    return RuntimeError(
        f"lemo: {name} has no second derivative: this backward pass goes through a gradient that was made with "
        "create_graph=True. Detach that gradient, or compute the term that it enters (a gradient penalty) without "
        "lemo: from plain torch functions, or with the model after lemo.remove(model)"
    )


class _Underivable(Function):
    """An operator whose outputs have no derivative, though they depend on its inputs."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[..., Any], mutated: list[int], *args: Any) -> Any:
        ctx.name, ctx.inputs = name, 3 + len(args)
        outputs = run(*args)
        if not mutated:
            return outputs
        ctx.mark_dirty(*(args[i] for i in mutated))
        returned = (outputs,) if isinstance(outputs, Tensor) else outputs or ()
        return *(args[i] for i in mutated), *returned

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        if "backward" in ctx.name:  # it computes a first derivative
            raise _refuse(ctx.name)
        raise RuntimeError(
            f"lemo: {ctx.name} has no derivative, but a backward pass goes through its output: expected inputs that "
            "require no gradient. Detach them, or call it under torch.no_grad()"
        )


class _Refusal(Function):
    """Passes gradients on, tied to what they were computed from."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(t.detach() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise _refuse(ctx.name)


def first_order(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For the backward method of an autograd function: only first derivatives, and an error if more are needed.

    torch's `once_differentiable` misses second derivatives if the incoming gradient is a constant, as that of a loss
    is. A gradient also depends on the saved tensors, and on `ctx.depends`, set by functions that save nothing.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *incoming: Any) -> Any:
            # A compiled graph refuses second derivatives anyway.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *incoming)
            given = [*incoming, *ctx.saved_tensors, *getattr(ctx, "depends", ())]
            inputs = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
            with torch.no_grad():
                outputs = backward(ctx, *incoming)
            single = isinstance(outputs, Tensor)
            grads = (outputs,) if single else outputs
            tied = iter(_Refusal.apply(name, *_counted(grads), *inputs))
            grads = tuple(next(tied) if isinstance(g, Tensor) else None for g in grads)
            return grads[0] if single else grads

        return run

    return decorate


def _counted(grads: Iterable[Any]) -> list[Any]:
    tensors = [g for g in grads if isinstance(g, Tensor)]
    return [len(tensors), *tensors]


class _Link(Function):
    """An empty tensor that depends on the given ones without keeping them alive: for `ctx.depends`."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        ctx.count = len(tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, _: Any) -> tuple[None, ...]:
        return (None,) * ctx.count


def link(*tensors: Tensor | None) -> Tensor:
    return _Link.apply(*tensors)
