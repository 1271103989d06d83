"""Packed batches that the cases run on: documents of blocks, and which blocks are kept."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from lemo.engine.layout import Blocks
from support import oracle
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Documents cut into blocks, and which of them are kept."""

    lengths: tuple[int, ...]
    block: int
    keep: str  # "all" | "none" | "some" | "last" | "gap": some, and none of the second document

    @functools.cached_property
    def documents(self) -> list[list[tuple[int, int]]]:
        return oracle.ranges(list(self.lengths), self.block)

    @functools.cached_property
    def kept(self) -> list[int]:
        ids = range(sum(len(document) for document in self.documents))
        chosen = {"all": ids, "none": (), "last": ids[-1:], "some": [b for b in ids if oracle.hash_uniform(5, b) < 0.5]}
        if self.keep == "gap":
            first = len(self.documents[0])
            without = range(first, first + len(self.documents[1]))
            return [b for b in chosen["some"] if b not in without]
        return list(chosen[self.keep])

    @functools.cached_property
    def layout(self) -> dict[str, list[int]]:
        return oracle.layout_of(self.kept, self.documents)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def starts(self) -> list[int]:
        """First token of every document, and the end."""
        return [0, *itertools.accumulate(self.lengths)]

    def blocks(self, device: str) -> Blocks:
        return Blocks.from_lengths(self.lengths, self.block, device)

    def tensor(self, name: str, device: str) -> Tensor:
        return torch.tensor(self.layout[name], dtype=torch.int32, device=device)


PACKINGS = {
    "one_block": Packing((16,), 16, "all"),
    "one_token": Packing((1,), 16, "all"),
    "shorter_than_block": Packing((5,), 64, "all"),
    "ragged": Packing((150,), 64, "last"),
    "keep_all": Packing((128,), 32, "all"),
    "keep_none": Packing((96,), 32, "none"),
    "documents": Packing((70, 1, 33, 64), 16, "some"),
    "batch": Packing((96, 96, 96), 32, "some"),
    "block_128": Packing((700,), 128, "some"),
    "long": Packing((389, 200), 64, "some"),
}
# Of attention alone: blocks of 64 and 128, longer than the tiles of its kernels.
ATTENTION_PACKINGS = {
    "block_64": Packing((64,), 64, "all"),
    "ragged_64": Packing((300,), 64, "some"),
    "ragged_128": Packing((523,), 128, "all"),
    "gap_64": Packing((330, 64, 1, 200), 64, "gap"),
    "gap_128": Packing((700, 130, 5, 400), 128, "gap"),
    "all_64": Packing((192, 320), 64, "all"),
}
# Queries and keys of different sizes: the documents of each. A tile of the kernels has 64, 128 or 192 queries and 64 or
# 128 keys; what matters is where a document's nk - nq lies within these.
SPLIT_PACKINGS = {
    "one_query": (Packing((1,), 64, "all"), Packing((517,), 64, "all")),
    "last_chunk": (Packing((40,), 64, "all"), Packing((300,), 64, "all")),
    "aligned_chunk": (Packing((256,), 64, "all"), Packing((640,), 64, "all")),
    "chunks": (Packing((200, 130, 64), 64, "all"), Packing((263, 449, 511), 64, "all")),
    "more_queries": (Packing((300, 70, 140), 64, "all"), Packing((170, 5, 0), 64, "all")),
    "empty_sides": (Packing((0, 300, 0, 129), 64, "all"), Packing((200, 0, 0, 131), 64, "all")),
    "kept_of_both": (Packing((330, 64, 1, 200), 64, "gap"), Packing((700, 300, 5, 400), 128, "some")),
    "equal_after_all": (Packing((150, 33), 64, "all"), Packing((150, 33), 64, "all")),
}
# Documents of several tiles of 128 packed rows, whole ones and others; "kept" leaves out rows, and a whole document.
TILE_PACKINGS = {
    "documents": Packing((700, 0, 1, 130, 300), 64, "all"),
    "kept": Packing((900, 330, 40, 800), 64, "gap"),
    "aligned": Packing((256, 384), 128, "all"),
    "one_row": Packing((1,), 64, "all"),
    "none": Packing((200, 100), 64, "none"),
}
