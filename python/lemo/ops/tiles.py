"""The choice of key tiles for two-dimensional sparsity: attention mass of tiles, the choice, and its lists.

M packed rows of D documents (``cu_seqlens`` int32 [D + 1]) in tiles and slots as ``attention_forward`` has them: tile i
of document d is its packed rows [128 i, 128 i + 128) and has the slot cu_seqlens[d] // 128 + d + i, of S = M // 128 + D
slots. Scores exist for a strip of slots at a time, so that memory stays linear in M but for one bit per pair of tiles.
Nothing is synchronized, and nothing has a derivative: asking for one raises RuntimeError.
Errors: ValueError naming the argument, what was expected and what was given; nothing is written then.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lemo.ops._operator import Size, need, operator


@operator("scores peaks", derivative="error")
def tile_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    max_seqlen: Size,
    scale: float,
    probes: int,
    first_slot: Size,
    slots: Size,
    width: Size,
    want_peaks: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention mass of key tiles of the query tiles in slots [first_slot, first_slot + slots).

    Returns (scores, peaks), float32 [slots, width]; peaks is None unless ``want_peaks``.

    q [R, Hq, D], k [R, Hk, D], rows and max_seqlen as in ``attention_forward``; width: the tiles of max_seqlen rows, or
    more. scores[s, n] is the softmax of the query tile over all keys before it, summed over the keys of tile n and
    averaged over heads and ``probes`` rows (1 to 128) spread over the tile: 128 give the exact mass of a whole tile.
    The masses of a query tile, its own included, add up to 1. peaks[s, n] is the largest mass that any head has there,
    by which tiles are ranked better. Tiles above the query tile have 0, as have slots without a tile. Soft-caps,
    windows and sinks that the layer may have are not considered.
    """
    new = functools.partial(q.new_empty, dtype=torch.float32)
    return new(slots, width), new(slots, width) if want_peaks else None


@operator("covered", writes="chosen", derivative="error")
def select_tiles_(
    chosen: Tensor,
    scores: Tensor,
    cu_seqlens: Tensor,
    first_slot: Size,
    keys: Size,
    density: float,
    mass: float,
    first: int,
    local: int,
    masses: Tensor | None = None,
) -> Tensor:
    """In place: the rows of ``chosen`` (int32 [S, B]) that belong to the C slots of scores (float32 [C, W]).

    Bit n % 32 of chosen[s, n // 32] is set if the query tile of slot s attends to tile n below its own. Its own tile,
    the ``first`` tiles of the document and the ``local`` tiles before it are always seen; others follow by descending
    score (ties: the nearest first; NaN last) until there are min(ceil(keys / 128), floor(density (m + 1) + 1/2)) for
    tile m of a document, or their masses, cut to [0, 1], add up to ``mass`` (from 1 on: no limit). masses: float32
    [C, W]; None: the scores.

    Returns covered, float32 [C]: that sum, of what is always seen too; 0 in slots without a tile.
    """
    need("scores", scores, "C W")
    return scores.new_empty(scores.shape[0], dtype=torch.float32)


@operator("tile_offsets tiles transposed_offsets transposed_tiles", derivative="error")
def list_tiles(chosen: Tensor, cu_seqlens: Tensor, capacity: Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists for ``attention_forward``, and transposed for ``attention_backward``, from what ``select_tiles_`` chose.

    Returns (tile_offsets int32 [S + 1], tiles int32 [capacity], transposed_offsets, transposed_tiles), the latter two
    as ``transpose_tile_lists`` makes them. capacity: at least the bits that are set, which the CPU checks; on CUDA
    lists are cut there. Rows of ``chosen`` in slots without a tile must be 0. Entries behind the last list are 0.
    """
    need("chosen", chosen, "S B")
    if isinstance(capacity, int) and capacity < 0:
        raise ValueError(f"capacity: expected at least 0, got {capacity}")
    new, ends = functools.partial(chosen.new_empty, dtype=torch.int32), chosen.shape[0] + 1
    return new(ends), new(capacity), new(ends), new(capacity)
