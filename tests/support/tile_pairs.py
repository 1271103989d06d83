"""Which pairs of rows lists of tiles name."""

import itertools

import torch
from lemo.engine.attend import PackedRows
from lemo.engine.tiles import TILE


def pairs_of(rows: PackedRows, tiles) -> torch.Tensor:
    """bool [M, M]: whether row i may see row j, causality within a tile aside."""
    cu = rows.cu_seqlens.tolist()
    seen = torch.zeros(cu[-1], cu[-1], dtype=torch.bool)
    offsets, listed = tiles.offsets.tolist(), tiles.tiles.tolist()
    for d, (a, b) in enumerate(itertools.pairwise(cu)):
        for m in range(-(-(b - a) // TILE)):
            slot = a // TILE + d + m
            own = slice(a + m * TILE, min(a + (m + 1) * TILE, b))
            for n in [m, *listed[offsets[slot] : offsets[slot + 1]]]:
                seen[own, a + n * TILE : min(a + (n + 1) * TILE, b)] = True
    return seen
