"""How lemo enters a module and leaves it again, even if others wrap its `forward` meanwhile.

An entry is a `forward` on the module's instance that checks at every call whether lemo is applied. Others wrap
`forward` as well (Accelerate for mixed precision, TRL for its fused head) and keep the entry they found inside a
closure, from which nothing can remove it. So an entry holds no state of the run and remembers what it covers: without
a handle on the module it steps aside, and a later `attach` finds it and reuses it instead of adding a second one.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import nn


class Attached(Protocol):
    """What an entry asks of the controller of its module, `lemo.Controller`."""

    @property
    def referring(self) -> bool: ...

    def stepped_aside(self, module: nn.Module, named: dict[str, Any]) -> None: ...

    @property
    def loss_only_passes(self) -> LossOnlyPasses: ...


class LossOnlyPasses(Protocol):
    """Evaluation passes that are run without their logits (`lemo.integration.evaluation`)."""

    def serves(self, module: nn.Module, named: dict[str, Any]) -> bool: ...

    def run(self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any: ...


# Runs a training call: (controller, module, original, args, kwargs) -> the module's output.
Run = Callable[[Any, Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

HANDLE = "_lemo"
_SEARCHED = 500  # callables looked at in one chain of wrappers, which usually has fewer than ten
_entries: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


class Handle:
    """Ties a module to its controller. A copy of the model has a separate controller; a pickled model has none."""

    def __init__(self, controller: Attached) -> None:
        self.controller = controller

    def __reduce__(self) -> tuple[Any, ...]:
        return types.NoneType, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return Handle(copy.deepcopy(self.controller, memo))


def controller_of(module: nn.Module) -> Attached | None:
    handle = module.__dict__.get(HANDLE)
    return None if handle is None else handle.controller


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a forward pass by name, those of **kwargs included."""
    # Of the class: a wrapper around the instance's forward need not have its parameters.
    bound = inspect.signature(type(module).forward).bind_partial(module, *args, **kwargs)
    named = dict(bound.arguments)
    del named["self"]
    named.update(named.pop("kwargs", {}))
    return named


# --- chains of wrappers -----------------------------------------------------------------------------------------------


def _inside(function: Any) -> Iterator[Any]:
    """The callables that a callable may hand its call on to."""
    yield getattr(function, "__func__", None)
    yield getattr(function, "__wrapped__", None)
    if isinstance(function, functools.partial):
        yield function.func
        yield from function.args
        yield from function.keywords.values()
    elif isinstance(function, types.FunctionType):
        for cell in function.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # not assigned yet
                continue
    else:
        yield from getattr(function, "__dict__", {}).values()


def search(start: Any, wanted: Callable[[Any], bool]) -> Any | None:
    """The first callable among `start` and what it wraps for which `wanted` holds, or None."""
    queue, seen = [start], {id(start)}
    for function in queue:
        if len(queue) > _SEARCHED:
            return None
        if wanted(function):
            return function
        for inner in _inside(function):
            if callable(inner) and not isinstance(inner, (nn.Module, type)) and id(inner) not in seen:
                seen.add(id(inner))
                queue.append(inner)
    return None


def is_entry(function: Any) -> bool:
    return isinstance(function, types.FunctionType) and function in _entries


def current_forward(module: nn.Module) -> Any:
    """The `forward` that someone put on the instance, or None if it has its class's."""
    return module.__dict__.get("forward")


# --- entries ----------------------------------------------------------------------------------------------------------


def _bind(covered: Any, module: nn.Module) -> Callable[..., Any]:
    if covered is None:
        return types.MethodType(type(module).forward, module)
    return types.MethodType(covered, module) if isinstance(covered, types.FunctionType) else covered


def add_entry(module: nn.Module, run: Run) -> None:
    """Covers the present `forward` with an entry that calls `run` while lemo is applied and the module trains."""
    own = current_forward(module)
    # Functions are bound to the module at each call: a copy.deepcopy of the model then calls itself, not the original.
    covered = own.__func__ if getattr(own, "__self__", None) is module else own
    # The engine reads the batch on the host and updates tensors in place: none of that belongs in a compiled graph.
    run = torch.compiler.disable(run)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        original = _bind(covered, self)
        controller = controller_of(self)
        if controller is None:
            return original(*args, **kwargs)
        if controller.referring or (self.training and torch.is_grad_enabled()):
            return run(controller, self, original, args, kwargs)
        controller.stepped_aside(self, kwargs)
        if controller.loss_only_passes.serves(self, kwargs):
            return controller.loss_only_passes.run(self, original, args, kwargs)
        return original(*args, **kwargs)

    kind = type(module).forward
    functools.update_wrapper(forward, kind)
    # Accelerate unwraps by following __wrapped__ to the end, and would silently drop the entry.
    del forward.__wrapped__  # type: ignore[attr-defined]
    forward.__signature__ = inspect.signature(kind)  # type: ignore[attr-defined]
    _entries.add(forward)
    module.__dict__["forward"] = types.MethodType(forward, module)


def covered_by_entry(entry: Any) -> Any | None:
    """What an entry covers: a function, another callable, or None for the class's own `forward`."""
    closure = inspect.getclosurevars(entry).nonlocals
    return closure["covered"]


def attach(module: nn.Module, controller: Attached, run: Run) -> None:
    """Applies lemo to one module, through an entry left from before if the module's `forward` still reaches it."""
    own = current_forward(module)
    if own is None or search(own, is_entry) is None:
        add_entry(module, run)
    module.__dict__[HANDLE] = Handle(controller)


def detach(module: nn.Module) -> None:
    """Takes lemo off one module. Entries that others have wrapped stay, and step aside from then on."""
    del module.__dict__[HANDLE]
    while is_entry(getattr(current_forward(module), "__func__", None)):
        covered = covered_by_entry(module.__dict__["forward"].__func__)
        if covered is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = _bind(covered, module)
