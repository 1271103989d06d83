"""Attention mass of key tiles, true and predicted, and what a choice of tiles covers (mode `sparse`, see tiles.h).

A tile is 128 rows of a document. Everything here works on a strip of query tiles at a time, so that nothing of size
tiles x tiles is needed in a long document. Of a document with N tiles, a strip of Q query tiles with numbers m [Q] has
arrays [Q, N]; entries above m are 0 or not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lemo import ops
from lemo.engine.layout import Blocks
from lemo.engine.tiles import FIRST_TILES, TILE

ALL_ROWS = TILE  # as many probes as rows: the exact mass
STRIP = 16  # query tiles at a time
LOCAL = 1  # tiles before a query tile that count as chosen, as by default in mode `sparse`
FORCED = 1 + FIRST_TILES + LOCAL  # tiles that a query tile attends to whatever their scores


def query_strips(tiles: int, at_most: int) -> list[tuple[int, int]]:
    """(first, count) of the strips that stand for a document's query tiles: all of them, or about ``at_most``, evenly
    spread, so that the memory of a long document's masses is linear in its length."""
    if tiles <= at_most:
        return [(first, min(STRIP, tiles - first)) for first in range(0, tiles, STRIP)]
    count = max(1, at_most // STRIP)
    between = tiles - count * STRIP  # left out before the strips: a document's first tiles see little to choose from
    return [(between * (i + 1) // count + i * STRIP, STRIP) for i in range(count)]


def numbers(strips: Sequence[tuple[int, int]], device: torch.device | None = None) -> Tensor:
    """int64 [Q]: the query tiles of all strips."""
    return torch.cat([torch.arange(first, first + count, device=device) for first, count in strips])


def tile_mass(q: Tensor, k: Tensor, scale: float, probes: int, strips: Sequence[tuple[int, int]]) -> Tensor:
    """float32 [Q, N]: mass of every key tile for the query tiles of the strips, one document.

    q [T, Hq, D], k [T, Hk, D]; probes: rows looked at per query tile, 128 for the exact mass.
    """
    tokens = q.shape[0]
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=q.device)
    where = (ends, None, tokens, scale, probes)
    return torch.cat([ops.tile_scores(q, k, *where, first, count, -(-tokens // TILE))[0] for first, count in strips])


def pooled_mass(q: Tensor, k: Tensor, scale: float, m: Tensor) -> Tensor:
    """float32 [Q, N]: softmax over key tiles of mean query by mean key, averaged over heads. One document."""
    tiles = -(-q.shape[0] // TILE)

    def means(x: Tensor) -> Tensor:
        sums = x.new_zeros(tiles, *x.shape[1:], dtype=torch.float32)
        tile = torch.arange(x.shape[0], device=x.device) // TILE
        sums.index_add_(0, tile, x.float())
        return sums / torch.bincount(tile)[:, None, None]

    keys = means(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = torch.einsum("mhd,nhd->hmn", means(q)[m], keys) * scale
    return logits.masked_fill(_later(m, tiles), -torch.inf).softmax(-1).mean(0)


def _later(m: Tensor, tiles: int) -> Tensor:
    return torch.arange(tiles, device=m.device) > m[:, None]


def free_tiles(m: Tensor, tiles: int) -> Tensor:
    """bool [Q, N]: key tiles that have to compete, neither the query tile itself, the first nor the one before."""
    n = torch.arange(tiles, device=m.device)
    return (n >= FIRST_TILES) & (n < m[:, None] - LOCAL)


def choose(scores: Tensor, m: Tensor, density: float) -> Tensor:
    """bool [Q, N]: the tiles that ``select_tiles`` chooses with local = 1, the query tile itself included.

    Ties go to the nearest tile.
    """
    tiles = scores.shape[1]
    later, free = _later(m, tiles), free_tiles(m, tiles)
    ranked = scores.double().masked_fill(~free, torch.inf).masked_fill(later, -torch.inf)
    order = ranked.flip(1).sort(dim=1, descending=True, stable=True).indices  # flipped: ties to the nearest
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(tiles, device=m.device).expand_as(order)).flip(1)
    budget = (density * (m + 1).double() + 0.5).floor().long()
    budget = torch.maximum(budget, (~free & ~later).sum(1))
    return rank < budget[:, None]


# --- predicted --------------------------------------------------------------------------------------------------------


def distance_knots(tiles: int) -> int:
    """Entries of a distance table for documents of up to ``tiles`` tiles."""
    return max(1, math.ceil(math.log2(max(tiles, 2)))) + 2


def distance_logits(table: Tensor, m: Tensor, tiles: int) -> Tensor:
    """float32 [Q, N]: what the place of a key tile adds to its logit.

    table: float32 [P]. The last entry belongs to the document's first tile, where attention sinks lie. The others are
    knots at distances 2^i - 1 (0, 1, 3, 7, ...) of a piecewise linear function of log2(distance + 1), whose last piece
    also serves documents longer than those of the calibration: attention then falls as a power of the distance.
    """
    n = torch.arange(tiles, device=m.device)
    far = torch.log2((m[:, None] - n).clamp(min=0).float() + 1)
    low = far.floor().long().clamp(max=table.shape[0] - 3)
    share = far - low
    return table[low] * (1 - share) + table[low + 1] * share + table[-1] * (n == 0)


@dataclass(frozen=True, eq=False)
class TileStrips:
    """Predicted mass of one layer's tiles, from the block vectors of its input.

    queries, keys: float32 [nb, c]; table: see ``distance_logits``; blocks: of 128 tokens.
    """

    queries: Tensor
    keys: Tensor
    table: Tensor
    blocks: Blocks

    def __call__(self, first_slot: int, slots: int, width: int) -> Tensor:
        """float32 [slots, width]: mass(m, n) for the query tiles with slots from ``first_slot`` on, as
        `lemo.ops.tile_scores` gives it: 0 if n > m and in slots without a tile. Nothing waits for the device."""
        blocks = self.blocks
        longest = max(blocks.blocks_per_document)
        if width < longest:
            raise ValueError(f"width: expected at least the {longest} tiles of the longest document, got {width}")
        if first_slot < 0 or slots < 1:
            raise ValueError(f"first_slot, slots: expected at least 0 and 1, got {first_slot} and {slots}")
        firsts = blocks.documents.long()
        # Tile i of document d has the slot cu_seqlens[d] / 128 + d + i.
        starts = blocks.cu_seqlens[:-1].long() // TILE + torch.arange(blocks.num_documents, device=blocks.device)
        slot = torch.arange(first_slot, first_slot + slots, device=blocks.device)
        document = torch.bucketize(slot, starts, right=True) - 1
        m = slot - starts[document]
        inside = m < (firsts[1:] - firsts[:-1])[document]
        m = torch.where(inside, m, -1)
        first = firsts[document]
        n = torch.arange(width, device=blocks.device)
        products = self.queries[(first + m).clamp(min=0)] @ self.keys.T  # every document's keys; then this one's
        logits = products.gather(1, (first[:, None] + n).clamp(max=blocks.num_blocks - 1))
        logits = logits + distance_logits(self.table, m, width)
        seen = n <= m[:, None]
        return logits.masked_fill(~seen, torch.finfo(logits.dtype).min).softmax(-1) * seen
