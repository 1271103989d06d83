"""What a step saves between its forward and its backward pass: kept lists, and a record of every layer.

What a record holds is up to `LemoConfig.recompute`; `lemo.engine.memory.saved_bytes` is the exact formula.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from lemo.engine.attend import PackedRows, TileChoice, WholeRows
from lemo.engine.config import Part
from lemo.engine.layout import Kept
from lemo.engine.randomness import Generators
from lemo.engine.segments import Segment


def _own(x: Tensor) -> Tensor:
    """x, or a copy of it if x is a window into a larger buffer that would be kept alive."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


@dataclass(frozen=True, eq=False)
class SavedList(PackedRows):
    """A kept list as it is saved: what the backward pass reads of it, in tensors that own exactly their memory.

    rows: int32 [M], token behind every packed row.
    """

    rows: Tensor = field(kw_only=True)

    @property
    def count(self) -> int:
        return self.rows.shape[0]

    @classmethod
    def of(cls, kept: Kept, weighted: bool) -> SavedList:
        whole = None if kept.whole is None else _whole(kept.whole, kept.counts, weighted)
        if kept.is_everything:
            # All layers of a step share it, so there is nothing to copy.
            weights, slots = (kept.weights, kept.row_slots) if weighted else (None, None)
            return cls(kept.cu_seqlens, kept.max_seqlen, None, weights, slots, whole, rows=kept.rows)
        rows = _own(kept.rows)
        weights, slots = (_own(kept.weights), _own(kept.row_slots)) if weighted else (None, None)
        return cls(_own(kept.cu_seqlens), kept.max_seqlen, rows, weights, slots, whole, rows=rows)


def _whole(kept: Kept, counts: tuple[int, ...], weighted: bool) -> WholeRows:
    weights, slots = (_own(kept.weights), _own(kept.row_slots)) if weighted else (None, None)
    places = None if kept.is_everything else _own(kept.rows)
    return WholeRows(_own(kept.cu_seqlens), kept.max_seqlen, places, weights, slots, counts=counts)


@dataclass(eq=False)
class Record:
    """What a layer, or its attention or MLP alone, keeps for its backward pass. M: the rows of its list.

    x_kept [M, d]: the rows as they entered; x_mlp [M, d]: their sum with what attention added, if the MLP follows; both
    are inputs of norms of a pre-norm layer. x_out [M, d]: of a post-norm layer, the sum whose norm its rows left with.
    out [M, Hq, D], lse [Hq, M]: of attention. attention, mlp: local graphs. generators: states at the start of the
    layer if it may draw.
    """

    layer: int
    part: Part
    saved_list: SavedList
    x_kept: Tensor
    x_mlp: Tensor | None = None
    x_out: Tensor | None = None
    out: Tensor | None = None
    lse: Tensor | None = None
    attention: Segment | None = None
    mlp: Segment | None = None
    generators: Generators | None = None
    tiles: TileChoice | None = None

    @property
    def graphs(self) -> list[Segment]:
        return [graph for graph in (self.attention, self.mlp) if graph is not None]


@dataclass(eq=False)
class Stream:
    """The residual stream [T, d] before a layer, from which that layer and those after it run again. x_kept: the
    stream, under the name that rows have in a record; everything else that records have is never there."""

    layer: int
    x_kept: Tensor
    x_mlp: None = None
    x_out: None = None
    out: None = None
    lse: None = None
    graphs: tuple[Segment, ...] = ()


class Records:
    """The records of one step. All go through `put` and `pop`: override these to keep saved rows elsewhere meanwhile,
    and `send` to copy them there.

    Layers are put in ascending order and popped in descending order, a layer's own records last in, first out. With
    segments of layers that run again (`Step.segments`), streams are put and popped likewise: all records of a segment
    are put after its stream was popped, and popped before the stream of the segment before it is.
    """

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._streams: list[Stream] = []

    def put_stream(self, stream: Stream) -> None:
        """Called before the first layer of a segment that runs again. The stream is the records' own."""
        self._streams.append(stream)

    def pop_stream(self) -> Tensor:
        """Removes and returns the last stream; the caller may overwrite it."""
        return self._streams.pop().x_kept

    def put(self, record: Record) -> None:
        """Called once the record of a layer (or of its attention or MLP, if their lists differ) is complete, which may
        be taken apart at once."""
        self._records.append(record)

    def send(self) -> None:
        """Called when a layer has its lists and nothing of it has been queued yet; and before its MLP, if that has
        another list than its attention. What was put last may be copied elsewhere from now on. Not before: the host
        reads the lists' sizes, and what it reads from a device arrives behind all copies that were started earlier."""

    def pop(self, layer: int) -> Record | None:
        """Removes and returns the last record of this layer; None if it has no more."""
        return self._records.pop() if self._records and self._records[-1].layer == layer else None

    def moves(self, layer: int) -> bool:
        """Whether what this layer saves is to lie elsewhere meanwhile, so that its graphs need a `Held`."""
        return False

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    @property
    def layers(self) -> set[int]:
        """Layers that have a record."""
        return {record.layer for record in self._records}
