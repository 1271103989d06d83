"""Blocks and kept lists as Python sees them."""

from __future__ import annotations

import pytest
import torch
from lemo.engine.layout import Blocks, Kept, kept_per_document, select
from lemo.engine.policies import mix_seed
from support.cases import PACKINGS


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


@pytest.mark.parametrize("mode", ["sample", "poisson"])
def test_sampling_follows_its_seed_and_its_probabilities(mode) -> None:
    blocks = Blocks.from_lengths([256], 1)
    p = torch.linspace(0.1, 0.9, 256)
    chosen = torch.zeros(256)
    for seed in range(200):
        kept = select(p, blocks, mode=mode, keep=0.5, always_first=0, seed=seed)
        if mode == "sample":
            assert kept.num_blocks == 128 and bool((kept.weights == 1).all())
        else:
            torch.testing.assert_close(kept.weights, 1 / p[kept.blocks.long()])
        chosen[kept.blocks.long()] += 1
    again = select(p, blocks, mode=mode, keep=0.5, always_first=0, seed=199)
    assert torch.equal(again.blocks, kept.blocks)
    # The mean over 32 blocks has a deviation below 0.006 (Pareto sampling follows p only approximately, but closely).
    rate = (chosen / 200).view(8, 32).mean(1)
    torch.testing.assert_close(rate, p.view(8, 32).mean(1), rtol=0, atol=0.03)


def test_poisson_sampling_has_the_probabilities_of_blocks_and_of_pairs() -> None:
    blocks, draws = Blocks.from_lengths([5, 3], 1), 20_000
    p = torch.tensor([0.1, 0.3, 0.5, 0.7, 1.0, 0.05, 0.9, 0.4])
    drawn = torch.zeros(draws, 8, dtype=torch.float64)
    for i in range(draws):
        # The seeds of consecutive steps, as training draws them.
        kept = select(p, blocks, mode="poisson", always_first=0, seed=mix_seed(mix_seed(0, i, 0), 0))
        drawn[i, kept.blocks.long()] = 1.0
    expected = torch.outer(p.double(), p.double()).fill_diagonal_(0.0) + torch.diag(p.double())
    found = drawn.t() @ drawn / draws
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert bool(((found - expected).abs() <= 4.5 * deviation + 1e-9).all())


def test_poisson_sampling_may_keep_nothing() -> None:
    kept = select(torch.full((4,), 1e-6), Blocks.from_lengths([4], 1), mode="poisson", always_first=0)
    assert (kept.num_blocks, kept.num_rows, kept.cu_seqlens.tolist()) == (0, 0, [0, 0])
