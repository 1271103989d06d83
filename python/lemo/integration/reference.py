"""Passes that are compared with a training pass see the tokens that it saw.

A preference loss compares the log-probabilities of a training pass with those of a reference (the same model without
its adapters, say). In modes "skip" and "sparse" the two only agree if both leave the same tokens and pairs of tiles out
of the same layers. So the lists of a step's passes are remembered, and `Controller.reference_pass` runs others over the
same batch with them. Lists of tiles, which may be as large as what the layers save, stay until the backward pass of
their training pass is done: a loss that compares the two has seen the reference by then.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lemo.engine.attend import Tiles
from lemo.engine.layout import Blocks, Kept, KeptPair, select
from lemo.integration.replay import Draw

_REMEMBERED = 8  # passes of one step


@dataclass(eq=False)
class Pass:
    """Kept blocks, int32 [K], of every layer's attention and MLP in one training pass; None: nothing kept. tiles: of
    the layers that attended to a part of the tiles; over: they are gone. in_graph: a CUDA graph chose, and overwrites
    its lists with those of the next pass. draw: the pass's, if others may repeat it."""

    batch: Tensor
    lengths: tuple[int, ...]
    lists: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)
    tiles: dict[int, Tiles] = field(default_factory=dict)
    draw: Draw | None = None
    over: bool = False
    in_graph: bool = False

    def add(self, kept: KeptPair) -> None:
        attention, mlp = (None if k is None else k.blocks for k in kept)
        self.lists.append((attention, attention if kept[0] is kept[1] else mlp))

    def end(self, keep_tiles: bool = False) -> None:
        """Its backward pass is done, and the tiles serve no other. keep_tiles: something else reads them."""
        self.over = bool(self.tiles)
        if not keep_tiles:
            self.tiles.clear()

    def kept(self, layer: int, blocks: Blocks) -> KeptPair:
        attention, mlp = self.lists[layer]
        first = _rebuild(attention, blocks)
        return first, first if mlp is attention else _rebuild(mlp, blocks)


def _rebuild(ids: Tensor | None, blocks: Blocks) -> Kept | None:
    if ids is None:
        return None
    if ids.shape[0] == blocks.num_blocks:
        return Kept.everything(blocks)
    chosen = torch.zeros(blocks.num_blocks, dtype=torch.float32, device=ids.device).index_fill(0, ids.long(), 1.0)
    return select(chosen, blocks, mode="threshold", threshold=0.5, always_first=0)


def _fingerprint(batch: Tensor) -> Tensor:
    """The ids, or a few channels of embeddings: these are not kept alive for a comparison."""
    return batch.detach() if batch.dim() == 2 else batch.detach()[..., :8].clone()


class Passes:
    """The training passes of the current step."""

    def __init__(self) -> None:
        self._passes: deque[Pass] = deque(maxlen=_REMEMBERED)

    def __deepcopy__(self, memo: dict[int, object]) -> Passes:
        return Passes()

    def begin(self, draw: Draw, batch: Tensor, blocks: Blocks) -> Pass:
        """batch: token ids [B, S], or embeddings [B, S, d]."""
        self._passes.append(Pass(_fingerprint(batch), tuple(blocks.lengths), draw=draw))
        return self._passes[-1]

    def of(self, draw: Draw) -> Pass | None:
        """The pass that had this draw, if it is remembered."""
        return next((earlier for earlier in self._passes if earlier.draw == draw), None)

    def clear(self) -> None:
        self._passes.clear()

    def has_shape(self, shape: tuple[int, ...]) -> bool:
        return any(tuple(p.batch.shape) == shape for p in self._passes)

    def find(self, batch: Tensor, blocks: Blocks) -> Pass:
        """The last pass over this batch (compared on the host). Raises RuntimeError if there was none."""
        batch = _fingerprint(batch)
        for earlier in reversed(self._passes):
            same = earlier.batch.shape == batch.shape and earlier.lengths == tuple(blocks.lengths)
            if same and torch.equal(earlier.batch, batch):
                if earlier.in_graph:
                    raise RuntimeError(
                        "controller.reference_pass(): the training pass over this batch ran as a CUDA graph, which "
                        "overwrites the lists that it chose: set LemoConfig(cuda_graphs=False)"
                    )
                if earlier.over:
                    raise RuntimeError(
                        "controller.reference_pass(): the training pass over this batch has had its backward pass, "
                        'and the tiles that it attended to (mode "sparse") are gone: run the reference between the '
                        "training pass and loss.backward()"
                    )
                return earlier
        raise RuntimeError(
            f"controller.reference_pass(): no training pass of this step (of its last {_REMEMBERED}) had this batch: "
            "run the training pass first, then the reference over the same tokens, mask and position_ids"
        )


def adapters_disabled(model: nn.Module) -> bool:
    """Whether PEFT's adapters are switched off, as for a reference pass of the same model."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        return False
    return any(isinstance(m, BaseTunerLayer) and m.disable_adapters for m in model.modules())
