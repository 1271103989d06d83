"""Which tokens took part in a step, and whether the others matter to anything that trains.

In mode "skip" a token that no layer kept predicts from its embedding alone. Its cross-entropy is far off, and no
gradient of it reaches a layer: unless something outside of the layers trains, norm, head and loss leave such tokens
out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lemo.engine.layout import Kept
from lemo.engine.linear import ordinary


@dataclass(eq=False)
class Participation:
    """The union of a step's kept lists, collected as they are chosen. Nothing waits for the device before `rows`."""

    everything: bool = False
    _first: Kept | None = field(default=None, repr=False)
    _mask: Tensor | None = field(default=None, repr=False)

    def add(self, kept: Kept | None) -> None:
        """A layer's list; None: it kept nothing."""
        if kept is None or self.everything or kept is self._first:
            return
        if kept.is_everything:
            self.everything, self._first, self._mask = True, None, None
        elif self._first is None:
            self._first = kept
        else:
            if self._mask is None:
                # One place more than there are tokens, for rows of -1, which a failed selection leaves behind.
                self._mask = kept.rows.new_zeros(kept.source.num_tokens + 1, dtype=torch.bool)
                self._mark(self._first)
            self._mark(kept)

    def _mark(self, kept: Kept) -> None:
        assert self._mask is not None
        self._mask.index_fill_(0, kept.rows.long(), True)  # -1 is the last place

    def rows(self) -> Tensor | None:
        """int32 [M], ascending within a document, -1 if a selection failed; None if every token took part.

        Waits for the device only if layers kept different lists.
        """
        if self.everything:
            return None
        if self._mask is not None:
            return self._mask[:-1].nonzero()[:, 0].to(torch.int32)
        # No list at all: no layer kept a token.
        return torch.empty(0, dtype=torch.int32) if self._first is None else self._first.rows


# --- what trains before the layers ------------------------------------------------------------------------------------


def may_keep_output(module: nn.Module) -> bool:
    """Whether anyone may hold what an embedding module returns: a hook (its own, or one of all modules), or the module
    itself if it is not torch's."""
    plain = ordinary(module, "torch.nn.modules.sparse.Embedding")
    return not plain or bool(torch.nn.modules.module._global_forward_hooks)


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what `module` returns, after all of its forward hooks."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def leaves(node: Any, stop: Any = None) -> Iterator[Tensor]:
    """The leaves of autograd's graph that a gradient arriving at `node` ends in, but for those behind `stop`."""
    nodes, seen = [node], {stop, None}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            yield variable
        nodes.extend(following for following, _ in node.next_functions)


def trains_before_layers(x: Tensor, embedded: list[Tensor]) -> bool:
    """Whether a parameter in front of the layers is trained through their input x [T, d].

    embedded: what the embedding module returned. Checkpoints make it (`enable_input_require_grads`), or the embeddings
    that are given, require a gradient that is never read: a tensor that is not a parameter does not count.
    """
    if not x.requires_grad:
        return False
    ends = [x] if x.grad_fn is None else leaves(x.grad_fn)
    return any(isinstance(leaf, nn.Parameter) and all(leaf is not e for e in embedded) for leaf in ends)
