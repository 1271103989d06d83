"""Where the weights of layers are while nothing works on them, and how their gradients get there.

Usually every process has all weights. With FSDP2 (`torch.distributed.fsdp.fully_shard`, on every layer) it has a part
of each: a layer is gathered while it is worked on, the next one meanwhile, and the gradients of what trains in it are
divided among the processes again, as means over them. Layers run without their modules' `forward`, so FSDP's own hooks
do not see them; only its public methods are used here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from lemo.engine.wrappers import sharded, sharded_tensor
from lemo.ops._autograd import first_order


class Weights:
    """The weights of a model whose layers are here.

    scale: factor on the means of gradients over the processes that have parts of a weight. divided: whether gradients
    of a layer are those of all processes once the layer is done. fleeting: whether weights outside of the layers were
    gathered for a while, so that nothing may be saved of them for the backward pass.
    """

    divided = False

    def __init__(self, layers: Sequence[Any], scale: float = 1.0) -> None:
        self.layers, self.scale, self.fleeting = layers, scale, False
        # By id of a gathered parameter: itself, so that the id stays its own, and the part of it that trains here.
        self._origins: dict[int, tuple[Tensor, Tensor]] = {}

    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """Layer i with its whole weights."""
        yield self.layers[i]

    def origin(self, parameter: Tensor) -> Tensor:
        """What trains here: the part of a gathered parameter, or the parameter itself."""
        found = self._origins.get(id(parameter))
        return parameter if found is None else found[1]

    def trained(self) -> list[tuple[Tensor, Tensor]]:
        """(whole, part) of every parameter that trains in the layer that is worked on, if the two differ."""
        return []

    def reduce(self, gradient: Tensor, part: Any) -> Tensor:
        """The gradient of the part that is here, from that of the whole parameter in every process."""
        from torch.distributed.tensor import DTensor, Partial

        mesh = part.device_mesh
        summed = DTensor.from_local(gradient.to(part.dtype), mesh, [Partial()] * mesh.ndim, run_check=False)
        return summed.redistribute(placements=part.placements) * (self.scale / mesh.size())

    @contextmanager
    def outside(self, *modules: nn.Module | None) -> Iterator[None]:
        """Modules outside of the layers with their whole weights."""
        # FSDP itself has gathered what belongs to the module that was called.
        away = next((m for m in modules if m is not None and sharded(m) and _apart(m)), None)
        if away is None:
            yield
            return
        self.fleeting = True
        with self._gathered(away), self.outside(*(m for m in modules if m is not away)):
            yield

    def use(self, parameter: Tensor) -> Tensor:
        """A parameter of `outside` modules, so that its gradient reaches what trains."""
        part = self.origin(parameter)
        return parameter if part is parameter else _FromParts.apply(part, parameter, self)

    @contextmanager
    def _gathered(self, module: Any, coming: Any = None) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """`trained` of a module, which has its whole weights inside. coming: the handle of gathering them, if that has
        begun."""
        parts = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if coming is None:
            module.unshard()
        else:
            coming.wait()
        whole = dict(module.named_parameters())
        pairs = [(whole[name], part) for name, part in parts.items()]
        self._origins.update((id(w), (w, part)) for w, part in pairs)
        try:
            yield pairs
        finally:
            module.reshard()


class ShardedWeights(Weights):
    """FSDP2 divides the weights of layers: each is gathered while it is worked on, and the next one meanwhile."""

    divided = True

    def __init__(self, layers: Sequence[Any], scale: float = 1.0) -> None:
        super().__init__(layers, scale)
        self._coming: dict[int, Any] = {}
        self._last: int | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        following = i + (1 if self._last is None or i > self._last else -1)
        self._last = i
        with self._gathered(self.layers[i], self._coming.pop(i, None)) as self._pairs:
            if 0 <= following < len(self.layers):
                self._coming[following] = self.layers[following].unshard(async_op=True)
            yield self.layers[i]

    def trained(self) -> list[tuple[Tensor, Tensor]]:
        return self._pairs


class AliasedWeights(Weights):
    """While a layer is worked on, what trains in it are other leaves with the same memory.

    Autograd waits for the stream on which a leaf was first used, which is usually CUDA's legacy stream, for as long as
    any graph with that leaf lives: an earlier step's loss is enough. A stream that records a graph must not be waited
    for there. These leaves are first used while the graph is recorded.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers)
        self._aliases: dict[int, nn.Parameter] = {}

    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        replaced = [
            (module._parameters, name, p)
            for module in self.layers[i].modules()
            for name, p in module._parameters.items()
            if p is not None and p.requires_grad
        ]
        for held, name, p in replaced:
            held[name] = self._alias(p)
        try:
            yield self.layers[i]
        finally:
            for held, name, p in replaced:
                held[name] = p

    def _alias(self, p: nn.Parameter) -> nn.Parameter:
        if id(p) not in self._aliases:
            alias = self._aliases[id(p)] = nn.Parameter(p.detach())
            self._origins[id(alias)] = alias, p
        return self._aliases[id(p)]


def _apart(module: nn.Module) -> bool:
    return any(sharded_tensor(p) for p in module.parameters(recurse=False))


class _FromParts(Function):
    """A gathered parameter, as a function of the part of it that trains here. (FSDP would not see its gradient: the
    module it belongs to is not called.)"""

    @staticmethod
    def forward(ctx: Any, part: Tensor, whole: Tensor, weights: Weights) -> Tensor:
        ctx.settings = part, weights
        return whole.detach()

    @staticmethod
    @first_order("a parameter in several processes")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        part, weights = ctx.settings
        return weights.reduce(dy, part), None, None


def of_layers(layers: Sequence[nn.Module], sequence: int = 1) -> Weights:
    """sequence: processes that share a batch, whose gradients are summed where others' are averaged."""
    kind = ShardedWeights if any(sharded(layer) for layer in layers) else Weights
    return kind(layers, float(sequence))
