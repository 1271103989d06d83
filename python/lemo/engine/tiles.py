"""Mode "sparse": which key tiles each query tile of a layer attends to, and the lists that attention reads.

Rows are cut into tiles of 128, document by document, as the kernels cut them (`cpp/include/lemo/attention.h`). A query
tile always attends to itself, the document's first tile and the `Phase.local` tiles before it; a tile policy scores the
others, and the best follow until a limit of the phase is reached (`cpp/include/lemo/tiles.h`). One list serves all
heads of a layer: lists per key/value head hold 0.1 to 0.2 points more attention (docs/notebook.md) and cost as many
times more to make and to save.

Scores are made for a strip of query tiles at a time, so that memory does not grow with the square of the context. They
know nothing of a layer's soft-cap and sinks, which attention over the chosen tiles has; layers with a window choose
none (`lemo.engine.attend`), and reports have 1 for what they attend to.

To add a policy: derive from `TilePolicy`, set `name`, implement `scorer`, and enter the class in `_CLASSES` and its
name in `lemo.engine.config.TilePolicyName`.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from lemo import _native, ops
from lemo.engine.attend import PackedRows, Tiles
from lemo.engine.config import Phase, TilePolicyName
from lemo.engine.layout import Blocks
from lemo.engine.sequence import Share

TILE = _native.constant("LEMO_TILE_ROWS")
# Tiles at the start of a document that every query tile attends to: attention sinks are there.
FIRST_TILES = 1
# (tokens of the longest document, probed rows of each query tile), and one row beyond. Probing may take 2 % of
# a step. For the step of the 8B shape with 8K keys per query on an H200, two rows took 0.5 % at 64K tokens and 2.2 % at
# 256K (docs/notebook.md): their cost grows with rows x tokens^2, the step with tokens. From these two measurements the
# table allows 2 % up to 32K, and 1 % beyond, where steps are long; no entry has been timed itself.
PROBED_ROWS = ((16 << 10, 32), (32 << 10, 16), (64 << 10, 4), (128 << 10, 2))
# Scores of a strip of query tiles, and what is needed to make them, in bytes.
STRIP_BYTES = 64 << 20

_TILE_COUNTS = range(1, 1 << 24)  # of a document: more than 2 G tokens

# Of the query tiles with slots first, first + 1, ...: (first, slots, width) -> float32 [slots, width].
MassScorer = Callable[[int, int, int], Tensor]
# The same -> scores that rank, and the masses that limits and reports add up (None: the scores themselves).
Scorer = Callable[[int, int, int], tuple[Tensor, Tensor | None]]

Rank = Literal["peak", "mean"]
RANKS: tuple[Rank, ...] = get_args(Rank)


@dataclass(frozen=True, eq=False)
class LayerRows:
    """What a tile policy sees of a layer. x [M, d]: its input, of the rows that it works on; q [M, Hq, D], k
    [M, Hk, D]: its queries and keys, position embedding applied, and the scale of their products."""

    layer: int
    x: Tensor
    q: Tensor
    k: Tensor
    rows: PackedRows
    scale: float


class TileScorer(Protocol):
    """Calibrated scores of tiles, as `lemo.predictors.PredictorSet` has them."""

    def tile_scores(self, layer: int, x: Tensor, blocks: Blocks) -> MassScorer:
        """For a layer with input x [M, d] in tiles `blocks`. The networks run once, not once per strip."""
        ...

    def to(self, *, device: torch.device, dtype: torch.dtype) -> TileScorer: ...


class TilePolicy(ABC):
    """Scores key tiles for query tiles, layer after layer."""

    name: TilePolicyName
    # Whether there are masses: shares of attention, which limits and reports may add up.
    estimates: bool = True
    # Whether masses are means over the heads of q and k, and scores these or the largest of any head.
    reads_heads: bool = False

    def __init__(self, predictors: TileScorer | None = None) -> None:
        """Policies are made with the run's predictors, which most ignore, and their options as keyword arguments."""
        super().__init__()

    @abstractmethod
    def scorer(self, layer: LayerRows) -> Scorer:
        """Makes the scores of strips of the layer's query tiles, higher = chosen first."""

    def row_bytes(self, layer: LayerRows) -> int:
        """What scoring one query tile takes per key tile, in bytes."""
        return 4


class Probe(TilePolicy):
    """Attention of a few rows of each query tile, evenly spaced, exact over all earlier keys. Nothing is trained.

    Options: `rows`, of 128, each 1/128 of the query-key products of dense attention; None: as many as PROBED_ROWS has.
    `rank`, by what tiles are ranked: "peak", the largest mass of any head, or "mean", the mass itself. A choice by the
    mean holds more attention and loses more of the model's predictions (docs/notebook.md). Limits and reports add up
    masses with either.
    """

    name = "probe"
    reads_heads = True

    def __init__(self, predictors: TileScorer | None = None, *, rows: int | None = None, rank: Rank = "peak") -> None:
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or not 1 <= rows <= TILE):
            raise ValueError(f"tile_options: rows must be an integer from 1 to {TILE}, or None; got {rows!r}")
        if rank not in RANKS:
            raise ValueError(f"tile_options: rank must be one of {', '.join(RANKS)}; got {rank!r}")
        self.rows, self.rank = rows, rank

    def _rows(self, layer: LayerRows) -> int:
        if self.rows is not None:
            return self.rows
        return next((rows for tokens, rows in PROBED_ROWS if layer.rows.max_seqlen <= tokens), 1)

    def scorer(self, layer: LayerRows) -> Scorer:
        where = (layer.rows.cu_seqlens, None, layer.rows.max_seqlen, layer.scale, self._rows(layer))

        def scores(first: int, slots: int, width: int) -> tuple[Tensor, Tensor | None]:
            masses, peaks = ops.tile_scores(layer.q, layer.k, *where, first, slots, width, self.rank == "peak")
            return (masses, None) if peaks is None else (peaks, masses)

        return scores

    def row_bytes(self, layer: LayerRows) -> int:
        return 4 * self._rows(layer) * layer.q.shape[1]


class Recent(TilePolicy):
    """The nearest tiles: sliding windows with the document's first tile as a sink. Costs nothing, sees nothing."""

    name = "recent"
    estimates = False

    def scorer(self, layer: LayerRows) -> Scorer:
        def scores(first: int, slots: int, width: int) -> tuple[Tensor, Tensor | None]:
            return torch.arange(width, device=layer.q.device, dtype=torch.float32).expand(slots, width), None

        return scores


class PredictedTiles(TilePolicy):
    """Small networks that read the layer's input, trained on attention mass (`lemo calibrate --target mass`)."""

    name = "predictors"

    def __init__(self, predictors: TileScorer | None = None) -> None:
        if predictors is None:
            raise ValueError(
                'tile_policy "predictors" needs LemoConfig.calibration: a folder written by `lemo calibrate --target '
                "mass`"
            )
        self.predictors: TileScorer = predictors
        self._placed: tuple[torch.device, torch.dtype] | None = None
        self._cut: tuple[Tensor, Blocks] | None = None

    def scorer(self, layer: LayerRows) -> Scorer:
        place = (layer.x.device, layer.x.dtype)
        if self._placed != place:
            self.predictors, self._placed = self.predictors.to(device=place[0], dtype=place[1]), place
        predicted = self.predictors.tile_scores(layer.layer, layer.x, self._tiles(layer.rows))
        return lambda *strip: (predicted(*strip), None)

    def _tiles(self, rows: PackedRows) -> Blocks:
        """Tiles as blocks. Waits for the device once per list of rows, which layers without a kept list share."""
        if self._cut is None or self._cut[0] is not rows.cu_seqlens:
            ends = rows.cu_seqlens.tolist()
            lengths = (b - a for a, b in itertools.pairwise(ends))
            self._cut = rows.cu_seqlens, Blocks.from_lengths(lengths, TILE, rows.cu_seqlens.device)
        return self._cut[1]


_CLASSES: dict[str, type[TilePolicy]] = {c.name: c for c in (Probe, Recent, PredictedTiles)}


def make_tile_policy(name: TilePolicyName, options: Mapping[str, Any], predictors: TileScorer | None) -> TilePolicy:
    """A tile policy by name. Raises ValueError for options that it does not have."""
    try:
        return _CLASSES[name](predictors, **options)
    except TypeError as error:
        raise ValueError(f"tile_options of tile_policy {name!r}: {error}") from None


# --- budgets ----------------------------------------------------------------------------------------------------------


def budget(tile: int, phase: Phase) -> int:
    """Tiles that query tile `tile` (from 0) of a document attends to, itself included, if no share of its attention is
    the limit; as the kernels count."""
    limit = tile + 1
    if phase.keys is not None:
        limit = min(limit, -(-phase.keys // TILE))
    if phase.density is not None:
        limit = min(limit, math.floor(ctypes.c_float(phase.density).value * (tile + 1) + 0.5))
    return max(limit, forced(tile, phase))


def forced(tile: int, phase: Phase) -> int:
    """Tiles that query tile `tile` of a document attends to in any case, itself included."""
    return min(tile + 1, 1 + FIRST_TILES + phase.local)


def lists_of(lengths: Sequence[int], phase: Phase) -> tuple[int, int]:
    """Slots, and the entries that the lists of documents of these lengths have at most."""
    entries = sum(_entries(-(-n // TILE), phase.density, phase.keys, phase.local) for n in lengths)
    return sum(lengths) // TILE + len(lengths), entries


@functools.lru_cache(maxsize=256)
def _entries(tiles: int, density: float | None, keys: int | None, local: int) -> int:
    phase = Phase("sparse", density=1.0 if density is None and keys is None else density, keys=keys, local=local)
    return sum(budget(m, phase) - 1 for m in range(tiles))


def chooses(rows: PackedRows, phase: Phase) -> bool:
    """Whether any query tile of these rows leaves a tile out."""
    return leaves_out(rows.max_seqlen, phase)


def leaves_out(longest: int, phase: Phase) -> bool:
    """Whether any query tile leaves a tile out, if the longest document has so many rows."""
    last = -(-longest // TILE) - 1
    if last < 0:
        return False
    return budget(last, phase) < last + 1 or ((phase.mass or 1.0) < 1.0 and forced(last, phase) < last + 1)


def longest_complete(phase: Phase) -> int | None:
    """Tokens of the longest document of which no query tile leaves a tile out; None: no document is too long."""
    tiles = bisect.bisect_left(_TILE_COUNTS, True, key=lambda tiles: leaves_out(tiles * TILE, phase))
    return None if tiles == len(_TILE_COUNTS) else (_TILE_COUNTS[tiles] - 1) * TILE


def capacity(rows: int, documents: int, longest: int, phase: Phase) -> int:
    """Entries that the lists of so many rows may have, without asking the device how long its documents are."""
    if documents == 1:
        entries = lists_of((rows,), phase)[1]
    else:
        entries = (rows // TILE + documents) * (budget(-(-longest // TILE) - 1, phase) - 1)
    return max(1, entries)


# --- the choice of a step ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Chosen:
    """What was chosen for one layer, on the device. covered: float32 [S], share of its attention that a query tile's
    tiles hold as the policy estimates it, 0 in slots without a tile; listed: int32 [], entries of the lists;
    cu_seqlens: int32 [D + 1], of the rows that were tiled."""

    covered: Tensor
    listed: Tensor
    cu_seqlens: Tensor

    def density(self) -> float:
        tiles = -(-self.cu_seqlens.diff().long() // TILE)
        pairs = int((tiles * (tiles + 1) // 2).sum())
        return (int(self.listed) + int(tiles.sum())) / pairs

    def mean_covered(self) -> float:
        tiles = -(-self.cu_seqlens.diff().long() // TILE)
        return float(self.covered.double().sum() / tiles.sum())


class TileChooser:
    """The tile lists of one pass, chosen layer by layer.

    num_layers: of the model. layers: those that eliminate, None: all. earlier: lists of an earlier pass, by layer,
    that are repeated; remembered: gets the lists, so that other passes can repeat them. share: if several processes
    share the rows, each having its own heads of q and k. chosen: by layer, for reports.
    """

    def __init__(
        self,
        policy: TilePolicy,
        phase: Phase,
        num_layers: int,
        layers: frozenset[int] | None = None,
        earlier: Mapping[int, Tiles] | None = None,
        remembered: dict[int, Tiles] | None = None,
        share: Share | None = None,
    ) -> None:
        self.policy, self.phase, self.num_layers, self.layers = policy, phase, num_layers, layers
        self.earlier, self.remembered, self.share = earlier, remembered, share
        self.chosen: dict[int, Chosen] = {}

    def report(self) -> tuple[list[float], list[float | None]]:
        """By layer: the share of the pairs of tiles, and the share of attention that they hold as the policy estimates
        it (None: it does not); 1 if everything is attended to. Reads from the device."""
        densities: list[float] = []
        covered: list[float | None] = []
        for i in range(self.num_layers):
            chosen = self.chosen.get(i)
            densities.append(1.0 if chosen is None else chosen.density())
            covered.append(1.0 if chosen is None else chosen.mean_covered() if self.policy.estimates else None)
        return densities, covered

    @torch.no_grad()
    def choose(self, layer: LayerRows) -> Tiles | None:
        """The layer's lists; None: every tile sees all that causality allows."""
        if self.earlier is not None:
            return self.earlier.get(layer.layer)
        if (self.layers is not None and layer.layer not in self.layers) or not chooses(layer.rows, self.phase):
            return None
        tiles = self._choose(layer)
        if self.remembered is not None:
            self.remembered[layer.layer] = tiles
        return tiles

    def _choose(self, layer: LayerRows) -> Tiles:
        phase, rows, device = self.phase, layer.rows, layer.q.device
        slots = layer.q.shape[0] // TILE + rows.cu_seqlens.shape[0] - 1
        width = -(-rows.max_seqlen // TILE)
        chosen = torch.empty(slots, -(-width // 32), dtype=torch.int32, device=device)
        limits = (phase.keys or 2**62, phase.density or 1.0, phase.mass or 1.0, FIRST_TILES, phase.local)
        scorer = self._scorer(layer)
        strips = -(-slots * width * self.policy.row_bytes(layer) // STRIP_BYTES)
        strip = -(-slots // min(strips, slots))  # all of about one size: a short one costs as many launches
        covered = []
        for first in range(0, slots, strip):
            scores, masses = scorer(first, min(strip, slots - first), width)
            covered.append(ops.select_tiles_(chosen, scores, rows.cu_seqlens, first, *limits, masses))
        lists = ops.list_tiles(chosen, rows.cu_seqlens, self._capacity(slots, layer))
        listed = lists[0][-1]
        if phase.mass is not None:
            # Only the device knows how many: its answer is waited for, once, or the layer would save room for all.
            exact = int(listed)
            lists = (lists[0], lists[1][:exact].clone(), lists[2], lists[3][:exact].clone())
        self.chosen[layer.layer] = Chosen(torch.cat(covered), listed, rows.cu_seqlens)
        return Tiles(*lists)

    def _scorer(self, layer: LayerRows) -> Scorer:
        """Scores over all heads, the same in all processes that share the rows."""
        own, share = self.policy.scorer(layer), self.share
        if share is None or not self.policy.reads_heads:
            return own

        def scores(first: int, slots: int, width: int) -> tuple[Tensor, Tensor | None]:
            ranks, masses = own(first, slots, width)
            if masses is None:
                return share.mean_over_heads(ranks), None
            return share.largest_of_heads(ranks), share.mean_over_heads(masses)

        return scores

    def _capacity(self, slots: int, layer: LayerRows) -> int:
        """Entries that the lists may have, without asking the device."""
        documents = layer.rows.cu_seqlens.shape[0] - 1
        return capacity(layer.q.shape[0], documents, layer.rows.max_seqlen, self.phase)
