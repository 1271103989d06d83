"""Which draw a forward pass gets: that of its (step, micro-batch), also when an activation checkpoint recomputes it.

`torch.utils.checkpoint` around the model calls it a second time, inside the backward pass. That call must keep the
blocks that the first one kept. The two calls are tied together by the frame object that torch's checkpoint attaches
saved tensors to, which its hooks can reach both times. A call inside a backward pass that belongs to no such checkpoint
would give a wrong gradient if tokens are skipped: an error.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Draw:
    """The step and micro-batch that a pass's random choices belong to."""

    step: int
    micro_batch: int


@dataclass(eq=False)
class _Region:
    """The passes of one checkpointed region, and how many of them each recomputation (by graph task) has repeated."""

    draws: list[Draw] = field(default_factory=list)
    repeated: dict[Any, int] = field(default_factory=dict)


def _checkpoint_hooks() -> list[Mapping[str, Any]]:
    """What the active hooks of torch.utils.checkpoint hold, the innermost first."""
    autograd: Any = torch._C._autograd
    stack, found = [], []
    while (hooks := autograd._top_saved_tensors_default_hooks(False)) is not None:
        stack.append(hooks)
        autograd._pop_saved_tensors_default_hooks()
    for hooks in reversed(stack):
        autograd._push_saved_tensors_default_hooks(*hooks)
    for pack, _ in stack:
        pack = inspect.unwrap(pack)
        if getattr(pack, "__module__", None) == "torch.utils.checkpoint":
            found.append(inspect.getclosurevars(pack).nonlocals)
    return found


def under_checkpoint() -> bool:
    """Whether an activation checkpoint (not a reentrant one) surrounds this code."""
    return bool(_checkpoint_hooks())


class Draws:
    """Remembers which passes lie in which checkpointed region, as long as the region can still be recomputed."""

    def __init__(self) -> None:
        self._regions: weakref.WeakKeyDictionary[Any, _Region] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> Draws:
        return Draws()

    def next(self, new: Draw, exact: bool) -> tuple[Draw, bool]:
        """The draw of this pass, and whether it repeats an earlier pass; `new` if it does not.

        exact: the forward pass does not depend on the draw. If it does, a call inside a backward pass raises
        RuntimeError unless the pass that it repeats is known.
        """
        hooks = _checkpoint_hooks()
        earlier = None
        if torch._C._current_graph_task_id() != -1:
            earlier = self._repeated(hooks)
            if earlier is None and not exact:
                raise RuntimeError(_refusal())
        draw = new if earlier is None else earlier
        for held in hooks:
            if "frame" in held:
                self._regions.setdefault(held["frame"], _Region()).draws.append(draw)
        return draw, earlier is not None

    def _repeated(self, hooks: list[Mapping[str, Any]]) -> Draw | None:
        for held in hooks:
            if "target_frame_ref" not in held:
                continue
            region = self._regions.get(held["target_frame_ref"]())
            if region is None:
                return None
            count = region.repeated.get(held["gid"], 0)
            region.repeated[held["gid"]] = count + 1
            return region.draws[count] if count < len(region.draws) else None
        return None


def _refusal() -> str:
    node = torch._C._current_autograd_node()
    if node is not None and node.name() == "CheckpointFunctionBackward":
        return (
            "lemo: a reentrant activation checkpoint around the model ran its forward pass without gradients, and so "
            "with every token, but would skip tokens in recomputation: pass use_reentrant=False, or leave the "
            'checkpoint out and set LemoConfig(recompute="full")'
        )
    return (
        "lemo: the model is called inside a backward pass, and which forward pass this recomputes is not known (no "
        "torch.utils.checkpoint was found around both): leave the activation checkpoint around the model out and set "
        'LemoConfig(recompute="full")'
    )
