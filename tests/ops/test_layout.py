"""Blocks and kept lists as Python sees them."""

from __future__ import annotations

import pytest
import torch
from cases import PACKINGS
from lemo.layout import Blocks, Kept, kept_per_document, select


@pytest.mark.parametrize("packing", PACKINGS)
def test_blocks_are_the_oracles_ranges(packing) -> None:
    p = PACKINGS[packing]
    blocks = p.blocks("cpu")
    ranges = [r for document in p.documents for r in document]
    assert blocks.offsets.tolist() == [a for a, _ in ranges] + [p.tokens]
    assert blocks.offsets.dtype == blocks.documents.dtype == blocks.cu_seqlens.dtype == torch.int32
    assert blocks.cu_seqlens.tolist() == p.starts
    assert blocks.blocks_per_document == tuple(len(document) for document in p.documents)
    assert (blocks.num_blocks, blocks.num_tokens) == (len(ranges), p.tokens)
    assert (blocks.num_documents, blocks.max_seqlen) == (len(p.lengths), max(p.lengths))
    assert blocks.positions.tolist() == [i for n in p.lengths for i in range(n)]


@pytest.mark.parametrize("packing", PACKINGS)
def test_everything(packing) -> None:
    p = PACKINGS[packing]
    kept = Kept.everything(p.blocks("cpu"))
    assert kept.rows.tolist() == list(range(p.tokens)) and kept.is_everything
    assert kept.cu_seqlens.tolist() == p.starts and kept.max_seqlen == max(p.lengths)
    assert kept.row_slots.tolist() == [
        slot for slot, (a, b) in enumerate(r for document in p.documents for r in document) for _ in range(a, b)
    ]
    assert (kept.num_blocks, kept.num_rows) == (len(kept.blocks), p.tokens) and (kept.weights == 1).all()


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.3, 0.34, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize(("first", "last"), [(0, 0), (1, 0), (2, 3)])
def test_the_host_counts_as_the_kernels_do(keep, first, last) -> None:
    """Sizes known without asking the device are those of the device, for every length up to 70 blocks."""
    blocks = Blocks.from_lengths(range(1, 71), 1)
    kept = select(
        torch.zeros(blocks.num_blocks), blocks, mode="budget", keep=keep, always_first=first, always_last=last
    )
    found = tuple((kept.cu_seqlens[1:] - kept.cu_seqlens[:-1]).tolist())
    assert found == kept_per_document(blocks, keep, first, last)


def test_sampling_follows_its_seed_and_its_probabilities() -> None:
    blocks = Blocks.from_lengths([256], 1)
    p = torch.linspace(0.1, 0.9, 256)
    chosen = torch.zeros(256)
    for seed in range(200):
        kept = select(p, blocks, mode="sample", keep=0.5, always_first=0, seed=seed)
        assert kept.num_blocks == 128
        torch.testing.assert_close(kept.weights, 1 / p[kept.blocks.long()])
        chosen[kept.blocks.long()] += 1
    again = select(p, blocks, mode="sample", keep=0.5, always_first=0, seed=199)
    assert torch.equal(again.blocks, kept.blocks)
    # Pareto sampling keeps the inclusion probabilities closely: the mean over 32 blocks has a deviation below 0.006.
    rate = (chosen / 200).view(8, 32).mean(1)
    torch.testing.assert_close(rate, p.view(8, 32).mean(1), rtol=0, atol=0.03)
