"""One training forward pass and its backward pass: what all layers share, and the seams through which they reach it.

- `Step.layer` surrounds all work on one layer, in either direction: the place to gather or prefetch its weights.
- `Step.attention` is the only way to the attention operators (`lemo.engine.attend`).
- `Step.records` holds what is saved in between (`lemo.engine.records`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lemo.engine.attend import Attention, PackedRows, TileChoice
from lemo.engine.config import Mode, Recompute
from lemo.engine.families.base import Family
from lemo.engine.gradients import Handover
from lemo.engine.layout import Blocks, Kept, KeptPair, raise_on_faults
from lemo.engine.participation import Participation
from lemo.engine.randomness import Generators
from lemo.engine.records import Records, SavedList
from lemo.engine.row_statistics import RowStatistics
from lemo.engine.segments import Held, address
from lemo.engine.sequence import Share
from lemo.engine.weights import Weights, of_layers

# Rows the MLP works on at a time if its activations are not kept: bounds the largest transient of a step.
MLP_ROWS = 8192
# From so many bytes of a layer's rows on, its norm's output is made once more in the backward pass and not kept during
# attention: another pass over the rows for as much memory.
SEPARATE_BYTES = 1 << 30


class Autocast(NamedTuple):
    """Autocast as the layers need it, whatever the caller of forward or backward has switched on."""

    device: str
    dtype: torch.dtype
    enabled: bool

    def __call__(self) -> torch.autocast:
        # Without a cache: weights cast while gradients are off would have none when they are recomputed.
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)


@dataclass(eq=False)
class LayerRun:
    """How a layer runs in a forward pass, and the same way if it runs again.

    attention, mlp: its lists, one object if it has one; tiles: the choice of its attention. saves: what its record
    holds; None: there is no record, since the layer runs again. again: it does so now, and is not observed any more.
    last: of a segment that runs again, so that nothing reads the stream after it. generators: their states before it
    runs, if it begins a segment that runs again and may draw.
    """

    attention: SavedList | None
    mlp: SavedList | None
    saves: Recompute | None
    tiles: TileChoice | None = None
    again: bool = False
    last: bool = False
    generators: Generators | None = None

    @property
    def graphs(self) -> bool:
        """Whether the record holds local graphs."""
        return self.saves == "none"


@dataclass(eq=False)
class Step:
    """What the layers of one forward pass share, until its backward pass is done.

    choose(i, x): kept lists of layer i for its input x [T, d], called once per layer. weighted: gradients are weighted
    by 1/p. random: whether layers draw random numbers; None: they may. observe: gets (i, norms float32 [M], kept) if
    the policy wants to know how much a layer added. borrowed: x belongs to someone else and is copied before it is
    updated. general: some modules are called as they are; what their graphs reach is then checked. tiles(i, x, rows):
    the choice of attention's tiles in layer i for its input x [M, d] and those rows; None: every tile in every layer.
    share: what this process holds of a sequence that several share; blocks and x are then its own. recompute: of all
    layers, or of each. segments: how many layers each segment has, in order; the layers of all but the last save the
    stream before the segment, and run again from it in the backward pass. Empty: no layer runs again.
    """

    family: Family
    layers: Sequence[nn.Module]
    blocks: Blocks
    attention: Attention
    mode: Mode
    recompute: Recompute | Sequence[Recompute]
    choose: Callable[[int, Tensor], KeptPair]
    autocast: Autocast
    weighted: bool = False
    random: bool | None = None
    observe: Callable[[int, Tensor, Kept], None] | None = None
    tiles: Callable[[int, Tensor, SavedList], TileChoice] | None = None
    borrowed: bool = True
    general: bool = True
    segments: Sequence[int] = ()
    share: Share | None = None
    when_done: Callable[[], None] | None = None
    records: Records = field(default_factory=Records)
    weights: Weights = field(init=False)
    statistics: RowStatistics = field(default_factory=RowStatistics)
    handover: Handover = field(default_factory=Handover)
    # The tokens that any layer kept.
    participation: Participation = field(default_factory=Participation)
    # Lists whose selection may have failed; only the device knows until the backward pass asks.
    unchecked: list[Kept] = field(default_factory=list)
    # By layer: how those ran that run again.
    runs: dict[int, LayerRun] = field(default_factory=dict)
    _last_saved: tuple[Kept, SavedList] | None = None

    def __post_init__(self) -> None:
        self.weights = of_layers(self.layers, 1 if self.share is None else self.share.group.size)

    def outside(self, parameter: Tensor | None) -> Tensor | None:
        """A parameter outside of the layers, so that its gradient is that of all processes."""
        if parameter is None or not parameter.requires_grad:
            return parameter
        used = self.weights.use(parameter)
        return used if self.share is None or used is not parameter else self.share.everywhere(parameter)

    @contextmanager
    def layer(self, i: int) -> Iterator[nn.Module]:
        """Layer i, while it is worked on. Every layer is entered once in a forward pass, in order, also if it keeps
        nothing; and once in the backward pass, in reverse order, before which those of a segment that runs again are
        entered in order."""
        with self.weights.layer(i) as layer:
            yield layer

    @property
    def everything(self) -> PackedRows:
        """All tokens."""
        if self.share is not None:
            return self.share.everything
        return PackedRows(self.blocks.cu_seqlens, self.blocks.max_seqlen)

    @property
    def layer_segments(self) -> list[range]:
        """The layers of each segment."""
        ends = list(itertools.accumulate(self.segments or (len(self.layers),)))
        return [range(end - size, end) for end, size in zip(ends, self.segments or ends, strict=True)]

    @property
    def working(self) -> set[int]:
        """Layers that have rows to work on, in the backward pass too."""
        return self.records.layers | {i for i, run in self.runs.items() if run.attention or run.mlp}

    def held(self, i: int, layer: nn.Module, saved: SavedList) -> Held | None:
        """What takes the saved tensors of one of the layer's graphs; None if they stay where they are."""
        if not self.records.moves(i):
            return None
        lists = (t for t in (saved.rows, saved.cu_seqlens, saved.weights, saved.slots) if t is not None)
        stay = (*layer.parameters(), *layer.buffers(), *(self.attention.tables or ()), *lists)
        return Held(frozenset(address(t) for t in stay if type(t) in (Tensor, nn.Parameter)))

    def recompute_of(self, i: int) -> Recompute:
        """What layer i saves (mode "backward" saves with "full" what it saves with "attention")."""
        return self.recompute if isinstance(self.recompute, str) else self.recompute[i]

    def saved_list(self, kept: Kept) -> SavedList:
        """`kept` as it is saved. Successive layers that share a list share its tensors."""
        if self._last_saved is None or self._last_saved[0] is not kept:
            self._last_saved = (kept, SavedList.of(kept, self.weighted))
        return self._last_saved[1]

    def forget_lists(self) -> None:
        """Drops the last list once all layers have theirs."""
        self._last_saved = None

    def check_later(self, kept: Kept | None) -> None:
        if kept is not None and kept.info is not None and not any(k is kept for k in self.unchecked):
            self.unchecked.append(kept)

    def raise_on_fault(self) -> None:
        """Raises FloatingPointError if a selection of this step failed. Waits for the device if any is unchecked."""
        raise_on_faults(self.unchecked)

    def chunks(self, rows: int) -> Iterator[slice]:
        """Slices of `rows` rows, for an MLP whose activations are not kept."""
        # What is known to draw does so once for all rows, as without lemo. (Pieces replay in order, so any would do.)
        size = max(1, rows if self.random else MLP_ROWS)
        # No rows, as a process may have of a list that others have rows of, are one empty slice.
        for start in range(0, max(1, rows), size):
            yield slice(start, min(start + size, rows))
