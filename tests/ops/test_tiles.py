"""The choice of tiles: exact lists, and what attention over them gives."""

from __future__ import annotations

import math

import pytest
import torch
from lemo import ops
from support import oracle
from support.cases import name_of
from support.compare import error
from support.draws import Draw
from support.tile_cases import SELECT_TILES, SelectTiles, TileScores, lists_of
from torch import Tensor


def check_select_tiles(case: SelectTiles, device: str) -> None:
    t = case.inputs(device)
    rule = (case.keys, case.density, case.mass, case.first, case.local)
    lists, covered = oracle.select_tiles(t["scores"], t.get("masses", t["scores"]), case.cu_seqlens, rule)
    got = case.run(t)
    assert lists_of(got["chosen"]) == lists
    assert torch.equal(got["covered"].cpu(), torch.tensor(covered, dtype=torch.float32))
    for prefix, expected in (("tile", lists), ("transposed", oracle.transpose_lists(lists, case.cu_seqlens))):
        offsets = torch.tensor([0, *map(len, expected)]).cumsum(0)
        assert got[f"{prefix}_offsets"].tolist() == offsets.tolist()
        name = "tiles" if prefix == "tile" else "transposed_tiles"
        assert got[name].tolist() == [n for tiles in expected for n in tiles] + [0] * 3


@pytest.mark.parametrize("case", SELECT_TILES, ids=name_of)
def test_select_and_list(case: SelectTiles) -> None:
    check_select_tiles(case, "cpu")


@pytest.mark.parametrize("case", SELECT_TILES[:8], ids=name_of)
def test_transposed_lists_are_those_of_transpose_tile_lists(case: SelectTiles) -> None:
    t = case.inputs("cpu")
    got = case.run(t)
    offsets, tiles = ops.transpose_tile_lists(got["tile_offsets"], got["tiles"], t["cu_seqlens"])
    assert torch.equal(offsets, got["transposed_offsets"]) and torch.equal(tiles, got["transposed_tiles"])


# --- rules by hand: the oracle could share a mistake ------------------------------------------------------------------


def choose(scores: list[float], **rule: float) -> tuple[list[int], float]:
    """The tiles that the last query tile of one document sees, and what they cover."""
    tiles = len(scores)
    cu_seqlens = torch.tensor([0, 128 * tiles], dtype=torch.int32)
    chosen = torch.full((tiles + 1, 1), -1, dtype=torch.int32)
    rule = {"keys": 128 * tiles, "density": 1.0, "mass": 1.0, "first": 0, "local": 0} | rule
    covered = ops.select_tiles_(chosen, torch.tensor([scores]), cu_seqlens, tiles - 1, **rule)
    assert (chosen[: tiles - 1] == -1).all() and (chosen[tiles:] == -1).all()
    return lists_of(chosen)[tiles - 1], covered.item()


HALVES = [0.0625, 0.25, 0.125, 0.25, 0.0625, 0.25]  # exact sums


@pytest.mark.parametrize(
    ("rule", "tiles"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"keys": 128}, []),  # the query tile itself is the first
        ({"keys": 129}, [3]),  # begun tiles count; of equal scores the nearest
        ({"keys": 384}, [1, 3]),
        ({"keys": 512}, [1, 2, 3]),
        ({"keys": 640}, [1, 2, 3, 4]),
        ({"density": 0.25}, [3]),  # floor(0.25 * 6 + 0.5) = 2
        ({"density": 0.24}, []),  # floor(1.94)
        ({"mass": 0.25}, []),
        ({"mass": 0.5}, [3]),
        ({"mass": 0.5000001}, [1, 3]),
        ({"mass": 0.75}, [1, 3]),
        ({"mass": 0.9375}, [1, 2, 3, 4]),
        ({"mass": 0.9375, "keys": 384}, [1, 3]),
        ({"first": 1, "mass": 0.5}, [0, 3]),  # 0.3125 are there already
        ({"first": 1, "mass": 0.3125}, [0]),
        ({"first": 1, "local": 1, "keys": 384}, [0, 4]),
        ({"first": 1, "local": 1, "keys": 512}, [0, 3, 4]),
        ({"first": 3, "local": 1, "keys": 1, "density": 0.1, "mass": 0.1}, [0, 1, 2, 4]),
        ({"first": 9}, [0, 1, 2, 3, 4]),
    ],
)
def test_limits(rule: dict[str, float], tiles: list[int]) -> None:
    assert choose(HALVES, **rule) == (tiles, sum(HALVES[n] for n in tiles) + HALVES[-1])


def test_scores_that_are_not_masses() -> None:
    """NaN ranks with -infinity, ties included; outside of [0, 1] the order counts and the sum is cut."""
    scores = [math.nan, -math.inf, -1.0, 3.0, 2.0, math.nan]
    order = [3, 4, 2, 1, 0]
    for count in range(6):
        assert choose(scores, keys=128 * (count + 1)) == (sorted(order[:count]), float(min(count, 2)))


def test_a_capacity_below_nothing() -> None:
    chosen, ends = torch.zeros(2, 1, dtype=torch.int32), torch.tensor([0, 130], dtype=torch.int32)
    with pytest.raises(ValueError, match="capacity: expected at least 0, got -1"):
        ops.list_tiles(chosen, ends, -1)


def test_density_is_that_of_a_float() -> None:
    """0.7 is 0.699999988 as a float: 5 tiles times that and 0.5 are below 4."""
    assert choose([0.1] * 5, density=0.7)[0] == [2, 3]
    assert choose([0.1] * 5, density=0.75)[0] == [1, 2, 3]


def test_bits_of_a_whole_word() -> None:
    """Bit 31 is the sign of its word."""
    case = SelectTiles((128 * 65,))
    assert case.run(case.inputs("cpu"))["chosen"][64].tolist() == [-1, -1, 0, 0]


# --- mass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probes", [1, 4, 128])
def test_masses_of_a_query_tile_add_up_to_one(probes: int) -> None:
    case = TileScores("documents", probes=probes)
    t = case.inputs("cpu", torch.float32)
    sums = case.run(t)["scores"].sum(1)
    with_tile = [slot for slot, *_ in oracle.tiles_of(t["cu_seqlens"].tolist())]
    assert (sums[with_tile] - 1).abs().max() < 1e-5 and sums.count_nonzero() == len(with_tile)


def test_as_many_probes_as_rows_give_the_mass_that_attention_gives() -> None:
    """Attention with values that say which tile a key belongs to: its outputs, averaged, are the masses."""
    rows, tiles = 512, 4
    draw = Draw("cpu", torch.float32)
    q, k = draw.normal(rows, 4, 64), draw.normal(rows, 4, 64)
    cu_seqlens = torch.tensor([0, rows], dtype=torch.int32)
    v = torch.zeros(rows, 4, 64)
    v[torch.arange(rows), :, torch.arange(rows) // 128] = 1
    out, _ = ops.attention_forward(q, k, v, cu_seqlens, None, rows, 0.125)
    heads = out[:, :, :tiles].unflatten(0, (tiles, 128)).mean(1)
    masses, peaks = ops.tile_scores(q, k, cu_seqlens, None, rows, 0.125, 128, 0, tiles, tiles, want_peaks=True)
    assert error(masses, heads.mean(1)) < 1e-6 and error(peaks, heads.amax(1)) < 1e-6
    without = ops.tile_scores(q, k, cu_seqlens, None, rows, 0.125, 128, 0, tiles, tiles)
    assert torch.equal(without[0], masses) and without[1] is None


def test_nan_in_a_row_stays_with_the_tiles_that_see_it() -> None:
    t = TileScores("aligned").inputs("cpu", torch.float32)
    t["k"][300] = math.nan  # in the first tile of the second document: slots 3 to 5
    for scores in TileScores("aligned").run(t).values():
        assert scores[:3].isfinite().all()
        assert [scores[slot, : slot - 2].isnan().all().item() for slot in (4, 5)] == [True, True]


# --- together: scores, choice, lists, attention -----------------------------------------------------------------------


def together(t: dict[str, Tensor], rows: int, **rule: float) -> tuple[Tensor, ...]:
    slots, width = rows // 128 + t["cu_seqlens"].shape[0] - 1, -(-rows // 128)
    chosen = torch.zeros(slots, -(-width // 32), dtype=torch.int32)
    rule = {"keys": 1 << 40, "density": 1.0, "mass": 1.0, "first": 0, "local": 0} | rule
    for first in range(0, slots, 2):
        arguments = (t["q"], t["k"], t["cu_seqlens"], None, rows, 0.125, 128)
        scores, _ = ops.tile_scores(*arguments, first, min(2, slots - first), width)
        ops.select_tiles_(chosen, scores, t["cu_seqlens"], first, **rule)
    return ops.list_tiles(chosen, t["cu_seqlens"], slots * width)


@pytest.mark.parametrize("packing", ["documents", "kept"])
def test_everything_chosen_is_dense_attention(packing: str) -> None:
    case = TileScores(packing)
    t = case.inputs("cpu", torch.float32)
    draw = Draw("cpu", torch.float32, 11)
    rows = t["q"].shape[0]
    v, dout = draw.normal(rows, 2, 64), draw.normal(rows, 4, 64)
    offsets, tiles, *transposed = together(t, rows)
    layout = (t["cu_seqlens"], None, rows, 0.125)
    out, lse = ops.attention_forward(t["q"], t["k"], v, *layout)
    listed = ops.attention_forward(t["q"], t["k"], v, *layout, offsets, tiles)
    assert error(listed[0], out) < 1e-6 and error(listed[1], lse) < 1e-6
    backward = (dout, t["q"], t["k"], v, out, lse, t["cu_seqlens"], None, None, None, rows, 0.125, False)
    dense, sparse = ops.attention_backward(*backward), ops.attention_backward(*backward, *transposed)
    for a, b in zip(dense[:3], sparse[:3], strict=True):
        assert error(b, a) < 1e-5


def test_the_chosen_tiles_hold_the_mass_that_was_asked_for() -> None:
    """exp(lse with lists - lse without) is the share of the softmax that a row sees."""
    case = TileScores("documents", magnitude=2.0)
    t = case.inputs("cpu", torch.float32)
    rows = t["q"].shape[0]
    offsets, tiles, *_ = together(t, rows, mass=0.7)
    assert 0 < offsets[-1] < sum(m for _, m, *_ in oracle.tiles_of(t["cu_seqlens"].tolist()))
    v, layout = torch.zeros_like(t["k"]), (t["cu_seqlens"], None, rows, 0.125)
    whole = ops.attention_forward(t["q"], t["k"], v, *layout)[1]
    seen = ops.attention_forward(t["q"], t["k"], v, *layout, offsets, tiles)[1]
    share = (seen - whole).exp().mean(0)
    for _, _, first, last in oracle.tiles_of(t["cu_seqlens"].tolist()):
        if last - first == 128:  # of which the mass is exact
            assert share[first:last].mean() >= 0.7 - 1e-5


# --- refused ---------------------------------------------------------------------------------------------------------


def test_bits_beyond_what_a_tile_sees_are_refused() -> None:
    cu_seqlens = torch.tensor([0, 300, 300, 500], dtype=torch.int32)  # slots 0 to 2, none, 4 and 5
    for slot, bit, below in ((2, 2, 2), (3, 0, 0), (5, 1, 1), (5, 31, 1)):
        chosen = torch.zeros(6, 1, dtype=torch.int32)
        chosen[slot] = 1 << bit if bit < 31 else -(1 << 31)
        with pytest.raises(ValueError, match=rf"chosen: slot {slot}: expected bits below {below}, .* got bit {bit}"):
            ops.list_tiles(chosen, cu_seqlens, 10)


def test_nothing_has_a_derivative() -> None:
    case = TileScores("aligned")
    t = case.inputs("cpu", torch.float32)
    t["q"].requires_grad_()
    scores, peaks = case.scores(t, 0, case.slots(t))
    chosen = torch.zeros(case.slots(t), 1, dtype=torch.int32)
    covered = ops.select_tiles_(chosen, scores, t["cu_seqlens"], 0, 256, 1.0, 1.0, 0, 0)
    assert not chosen.requires_grad
    for result, name in ((scores, "tile_scores"), (peaks, "tile_scores"), (covered, "select_tiles_")):
        with pytest.raises(RuntimeError, match=f"{name} has no derivative.*Detach"):
            result.sum().backward()
    assert t["q"].grad is None
