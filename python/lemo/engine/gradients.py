"""Gradients on their way through a step: those of parameters, and the one buffer of the residual stream's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lemo.engine.participation import leaves
from lemo.engine.segments import Segment
from lemo.engine.sequence import Group
from lemo.engine.weights import Weights
from lemo.engine.wrappers import parameters


class Handover:
    """Decides who may write into the gradient of the residual stream, [T, d], as it arrives from above.

    Whoever made that buffer and does not need it any more offers it when returning it from its backward pass; the next
    function below takes it over instead of copying it. What arrives there may still be something else: a hook replaced
    the tensor, autograd added another gradient to it, or nothing was offered. Such a tensor may be in use elsewhere
    and is copied. The offered tensor is held until then, so that its memory cannot meanwhile belong to another one.
    """

    def __init__(self) -> None:
        self._offered: Tensor | None = None

    def offer(self, gradient: Tensor) -> None:
        """A buffer that the caller alone holds, and will not use again."""
        self._offered = gradient

    def take(self, gradient: Tensor) -> Tensor:
        """The values of `gradient` in contiguous memory that the caller may overwrite."""
        offered, self._offered = self._offered, None
        if offered is not None and gradient.is_set_to(offered) and gradient.is_contiguous():
            return gradient.detach()
        return gradient.clone(memory_format=torch.contiguous_format)


class ParameterGradients:
    """Gradients of the trained parameters, by parameter; and which of them each piece of a layer holds.

    strict: check that a local graph reaches no trained tensor beyond the parameters named for it. weights: those of the
    layers, which may be parts of parameters outside of the layer that is worked on.
    """

    def __init__(self, params: Sequence[Tensor], strict: bool, weights: Weights) -> None:
        self.wanted = {id(p) for p in params}
        self.strict, self.weights = strict, weights
        self._found: dict[int, Tensor] = {}

    def of(self, param: Tensor) -> Tensor | None:
        return self._found.get(id(param))

    def held_by(self, modules: Sequence[nn.Module]) -> list[Tensor]:
        """The trained parameters of modules, each once, however many of the modules share it: autograd gives every
        mention the whole gradient."""
        return [p for p in parameters(*modules).values() if self.wants(p)]

    def wants(self, weight: Tensor | None) -> bool:
        return weight is not None and id(self.weights.origin(weight)) in self.wanted

    def through(
        self, segment: Segment, dy: Tensor, params: Sequence[Tensor], dstatistics: Tensor | None = None
    ) -> Tensor:
        """dh [M, d] of dy [M, d] and, if the graph has a second end, of dstatistics [M, S]; adds the gradients of
        params. Frees the graph."""
        if self.strict:
            known = {id(p) for p in params}
            ends = [end.node for end in (segment.leave, segment.statistics) if end is not None]
            for leaf in (leaf for end in ends for leaf in leaves(end, segment.enter.node)):
                if id(leaf) not in known:
                    raise RuntimeError(
                        f"lemo: a trained tensor of shape {list(leaf.shape)} takes part in an attention or MLP whose "
                        "modules do not hold it, so it would get no gradient: register it as a parameter of the "
                        "module that uses it, or train without lemo (lemo.remove)"
                    )
        dh, grads = segment.backward(dy, params, dstatistics)
        self.add(params, grads)
        return dh

    def add(self, params: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
        for p, g in zip(params, grads, strict=True):
            if p is not None and g is not None:
                g, key = g.to(p.dtype), id(self.weights.origin(p))
                self._found[key] = g if key not in self._found else self._found[key] + g

    def divide(self) -> None:
        """Divides the gradients of the layer that is worked on among processes, if they have parts of its weights. What
        no row reached here takes part with zeros: other processes may have rows."""
        for whole, part in self.weights.trained():
            if id(part) in self.wanted:
                found = self._found.get(id(part))
                self._found[id(part)] = self.weights.reduce(torch.zeros_like(whole) if found is None else found, part)

    def sum_over(self, group: Group) -> None:
        """Sums them over processes that computed the same parameters' gradients, each from other rows."""
        kinds = {(g.dtype, g.device) for g in self._found.values()}
        for kind in sorted(kinds, key=str):
            found = [(key, g) for key, g in self._found.items() if (g.dtype, g.device) == kind]
            sums = group.sum_(torch.cat([g.reshape(-1) for _, g in found])).split([g.numel() for _, g in found])
            self._found.update((key, s.view(g.shape)) for (key, g), s in zip(found, sums, strict=True))

    def add_zeros(self, modules: Sequence[nn.Module]) -> None:
        """Zero for parameters of these modules that have no gradient yet."""
        missing = [p for p in self.held_by(modules) if id(p) not in self._found]
        self.add(missing, [torch.zeros_like(p) for p in missing])


@contextmanager
def without_hooks(params: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of the parameters see the whole gradient, once, when `Stack` returns it; not the local graphs' shares."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in params if p._backward_hooks]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, before in hooks:
            registered.update(before)


def handed_out(param: Tensor, gradient: Tensor | None) -> Tensor | None:
    """What no kept row reached has no gradient, but hooks cannot take None."""
    return torch.zeros_like(param) if gradient is None and param._backward_hooks else gradient
