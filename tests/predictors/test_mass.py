"""Predictors of attention mass: teacher, choice, training on a pattern that only content explains, folder, strips."""

from __future__ import annotations

import copy
import dataclasses
import json

import lemo
import pytest
import torch
from lemo import ops
from lemo.engine.layout import Blocks
from lemo.engine.tiles import TILE
from lemo.predictors import CalibrationError, PredictorSet, calibrate, evaluate_coverage, format_coverage
from lemo.predictors.mass import MassTeacher, fit_table, mass_loss
from lemo.predictors.tiles import (
    TileStrips,
    choose,
    distance_knots,
    distance_logits,
    numbers,
    pooled_mass,
    query_strips,
    tile_mass,
)
from support.tiny import HIDDEN, LAYERS, build

TILES = 12
SETTINGS = {"target": "mass", "steps": 60, "rank": 16, "features": 8, "progress": False, "max_documents": 16}


@pytest.fixture(scope="module")
def long_model():
    model = build()
    model.config.max_position_embeddings = TILES * TILE
    return model


@pytest.fixture(scope="module")
def long_texts() -> list[torch.Tensor]:
    """A third of the tiles are drawn from the vocabulary that attention looks at, wherever they lie."""
    g = torch.Generator().manual_seed(4)
    documents = []
    for _ in range(20):
        upper = (torch.rand(TILES, generator=g) < 0.33).long().repeat_interleave(TILE)
        documents.append(torch.randint(0, 32, (TILES * TILE,), generator=g) + 32 * upper)
    return documents


@pytest.fixture(scope="module")
def calibrated(long_model, long_texts) -> PredictorSet:
    return calibrate(long_model, long_texts[:16], **SETTINGS)


def row_of(report, name):
    return torch.tensor([layer[name] for layer in report["layers"]])


def test_training_finds_tiles_that_only_content_tells_apart(long_model, long_texts, calibrated):
    new = evaluate_coverage(long_model, calibrated, long_texts[16:])
    exact, ours, recent = (row_of(new, name) for name in ("exact", "predictors", "recent"))
    assert (ours <= exact + 1e-6).all()
    at = new["densities"].index(0.5)
    # What is left between the nearest tiles and the best choice is mostly found, in every layer.
    assert ((exact - recent)[:, at] > 0.03).all()
    assert ((ours - recent)[:, at] > 0.7 * (exact - recent)[:, at]).all()
    loss = calibrated.report["loss"]
    assert loss["last"] < 0.6 * loss["first"]
    # Predicted masses are shares: what the choice is expected to cover is about what it covers.
    assert (row_of(new, "predicted") - ours).abs().max() < 0.05


def test_untrained_networks_find_nothing(long_model, long_texts, calibrated):
    swapped = [dataclasses.replace(w, wk3=torch.zeros_like(w.wk3)) for w in calibrated.layers]
    blind = dataclasses.replace(calibrated, layers=swapped, distances=torch.zeros_like(calibrated.distances))
    new = evaluate_coverage(long_model, blind, long_texts[16:18], (0.5,))
    trained = evaluate_coverage(long_model, calibrated, long_texts[16:18], (0.5,))
    assert trained["mean"]["predictors"][0] > new["mean"]["predictors"][0] + 0.02


def test_report_and_progress(long_model, long_texts, calibrated):
    steps = []
    report = evaluate_coverage(long_model, calibrated, long_texts[16:18], (0.5, 1.0), progress=lambda: steps.append(1))
    assert len(steps) == 2 * LAYERS and report["documents"] == 2
    for name in ("exact", "predictors", "probe 2", "probe 4", "pooled", "recent", "random"):
        assert report["mean"][name][1] == pytest.approx(1.0, abs=1e-4)
        assert 0 < report["mean"][name][0] <= report["mean"]["exact"][0] + 1e-6
    assert report["mean"]["probe 4"][0] > report["mean"]["random"][0]
    text = format_coverage(report)
    assert text.count("\n") == LAYERS + 4 and "probe 2" in text and "mass at density 0.5" in text
    assert text.endswith("density 1: every tile is attended to, whatever its score")
    assert 0 < report["competing"][0] < 1 == report["competing"][1]
    old = {name: value for name, value in report.items() if name != "competing"}  # as earlier versions wrote it
    assert "mass at density 1" in format_coverage(old)
    json.dumps(calibrated.report)
    with pytest.raises(ValueError, match="densities"):
        evaluate_coverage(long_model, calibrated, long_texts[16:17], (0.0,))
    with pytest.raises(ValueError, match="at least one document"):
        evaluate_coverage(long_model, calibrated, [])


def test_calibration_is_repeatable(long_model, long_texts):
    few = {**SETTINGS, "steps": 6, "max_documents": 4}
    first, second = (calibrate(long_model, long_texts[:4], **few) for _ in range(2))
    assert torch.equal(first.distances, second.distances)
    for a, b in zip(first.layers, second.layers, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- teacher and choice -----------------------------------------------------------------------------------------------


def test_teacher_is_the_softmax_of_the_model(long_model):
    ids = torch.randint(0, 64, (5 * TILE + 17,), generator=torch.Generator().manual_seed(0))
    teacher, seen = MassTeacher(long_model, TILE), {}
    teacher.read(ids, lambda i, x, mass, blocks: seen.update({i: mass}))
    long_model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = long_model(ids[None], output_attentions=True).attentions
    for i, mass in seen.items():
        p = torch.nn.functional.pad(attention[i][0].mean(0), (0, TILE - 17, 0, TILE - 17))
        expected = p.unflatten(0, (6, TILE)).unflatten(2, (6, TILE)).sum((1, 3))
        torch.testing.assert_close(mass[:5], expected[:5] / TILE, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mass.sum(1), torch.ones(6), atol=1e-5, rtol=1e-5)


def test_long_documents_are_sampled_in_strips():
    assert query_strips(40, 256) == [(0, 16), (16, 16), (32, 8)]
    for tiles in (257, 1000, 8192):
        strips = query_strips(tiles, 256)
        m = numbers(strips)
        assert len(m.unique()) == len(m) <= 256 and int(m[-1]) == tiles - 1
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(20 * TILE, 2, 8, generator=g), torch.randn(20 * TILE, 1, 8, generator=g)
    strips = query_strips(20, 18)
    whole = tile_mass(q, k, 0.3, 4, [(0, 20)])
    assert torch.equal(tile_mass(q, k, 0.3, 4, strips), whole[numbers(strips)])


def test_pooled_mass_is_a_softmax_of_means():
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(3 * TILE + 5, 4, 8, generator=g), torch.randn(3 * TILE + 5, 2, 8, generator=g)
    mass = pooled_mass(q, k, 0.3, torch.tensor([1, 3]))
    means = [torch.stack([t.mean(0) for t in x.split(TILE)]) for x in (q, k.repeat_interleave(2, 1))]
    logits = torch.einsum("mhd,nhd->hmn", *means) * 0.3
    assert mass.shape == (2, 4) and not mass[0, 2:].any()
    torch.testing.assert_close(mass[0, :2], logits[:, 1, :2].softmax(-1).mean(0))
    torch.testing.assert_close(mass[1], logits[:, 3].softmax(-1).mean(0))


@pytest.mark.parametrize("density", [0.125, 0.3, 0.5, 1.0])
def test_choice_is_that_of_the_operator(density):
    g = torch.Generator().manual_seed(2)
    scores = torch.randint(0, 6, (40, 40), generator=g).float() / 200  # with ties
    m = torch.arange(40)
    chosen = torch.zeros(41, 2, dtype=torch.int32)
    ends = torch.tensor([0, 40 * TILE], dtype=torch.int32)
    ops.select_tiles_(chosen, scores, ends, 0, 2**40, density, 1.0, 1, 1)
    bits = (chosen[:40, :, None] >> torch.arange(32) & 1).flatten(1)[:, :40].bool()
    assert torch.equal(choose(scores, m, density), bits | torch.eye(40, dtype=torch.bool))


# --- loss and distance ------------------------------------------------------------------------------------------------


def test_loss_is_zero_for_the_mass_itself_and_ignores_what_is_later():
    g = torch.Generator().manual_seed(3)
    m = torch.arange(10)
    later = m > m[:, None]
    logits = torch.randn(10, 10, generator=g)
    mass = logits.masked_fill(later, -torch.inf).softmax(-1)
    assert mass_loss(logits + torch.randn(10, 1, generator=g), mass, m) == pytest.approx(0.0, abs=1e-5)
    assert torch.equal(mass_loss(logits.masked_fill(later, 99.0), mass, m), mass_loss(logits, mass, m))
    assert mass_loss(logits.flip(1), mass, m) > 0.1


def test_distance_table():
    table = torch.tensor([5.0, 4.0, 2.0, 1.0, 10.0])  # distances 0, 1, 3, 7; the first tile
    logits = distance_logits(table, torch.tensor([0, 9]), 10)
    assert logits[0, 0] == 15.0
    # Linear in log2(distance + 1) between knots and beyond the last one: distances 9 to 0, the last knot being at 7.
    log = torch.log2(torch.tensor([10.0, 9.0, 7.0, 6.0, 5.0, 3.0])).tolist()
    expected = [14.0 - log[0], 4.0 - log[1], 1.0, *(4.0 - x for x in log[2:5]), 2.0, 6.0 - 2.0 * log[5], 4.0, 5.0]
    assert logits[1].tolist() == pytest.approx(expected, abs=1e-6)
    assert distance_knots(16) == 6 and distance_knots(2) == 3


def test_the_table_alone_explains_masses_that_only_distance_decides():
    m = torch.arange(16)
    later = m > m[:, None]
    true = torch.tensor([3.0, 1.0, 0.5, -1.0, -2.0, 1.5])
    mass = distance_logits(true, m, 16).masked_fill(later, -torch.inf).softmax(-1)
    table = torch.nn.Parameter(torch.zeros(6))
    fit_table(table, [mass, mass])
    assert mass_loss(distance_logits(table, m, 16), mass, m) < 1e-3


# --- strips -----------------------------------------------------------------------------------------------------------


def predicted_alone(predictors, x):
    """[N, N] of one document, straight from the definition."""
    blocks = Blocks.from_lengths([x.shape[0]], TILE)
    w = predictors.layers[1]
    _, q, k = ops.predict(
        x, *w, blocks.offsets, blocks.documents, TILE, predictors.norm, predictors.pool, predictors.eps, False
    )
    m = torch.arange(blocks.num_blocks)
    logits = q @ k.T + distance_logits(predictors.distances[1], m, blocks.num_blocks)
    return logits.masked_fill(m > m[:, None], -torch.inf).softmax(-1)


def test_strips_of_several_documents(calibrated):
    lengths = [3 * TILE + 5, 1, 2 * TILE, 7 * TILE - 1]
    x = torch.randn(sum(lengths), HIDDEN, generator=torch.Generator().manual_seed(6))
    blocks = Blocks.from_lengths(lengths, TILE)
    strip = calibrated.tile_scores(1, x, blocks)
    slots = sum(lengths) // TILE + len(lengths)
    whole = strip(0, slots, 9)
    assert whole.shape == (slots, 9) and whole.dtype == torch.float32
    filled = torch.zeros(slots, dtype=torch.bool)
    for d, piece in enumerate(x.split(lengths)):
        expected = predicted_alone(calibrated, piece)
        first = int(blocks.cu_seqlens[d]) // TILE + d
        tiles = expected.shape[0]
        torch.testing.assert_close(whole[first : first + tiles, :tiles], expected, atol=1e-6, rtol=1e-5)
        assert not whole[first : first + tiles, tiles:].any()
        filled[first : first + tiles] = True
    assert not whole[~filled].any() and not filled.all()
    parts = torch.cat([strip(first, min(4, slots - first), 9) for first in range(0, slots, 4)])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    # The same slots as the operator that measures the mass.
    q = torch.randn(sum(lengths), 2, 8)
    mass = ops.tile_scores(q, q[:, :1], blocks.cu_seqlens, None, blocks.max_seqlen, 0.3, 2, 0, slots, 9)[0]
    assert torch.equal(mass.sum(1) > 0.5, whole.sum(1) > 0.5)


def test_networks_run_once_for_all_strips(calibrated, monkeypatch):
    calls, predict = [], ops.predict
    monkeypatch.setattr(ops, "predict", lambda *a: calls.append(1) or predict(*a))
    strip = calibrated.tile_scores(0, torch.randn(6 * TILE, HIDDEN), Blocks.from_lengths([6 * TILE], TILE))
    assert isinstance(strip, TileStrips)
    for first in range(6):
        strip(first, 1, 6)
    assert len(calls) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_strips_on_a_gpu_are_those_of_the_cpu_and_wait_for_nothing():
    g = torch.Generator().manual_seed(7)
    lengths = [3 * TILE + 5, 1, 2 * TILE, 7 * TILE - 1]
    blocks = Blocks.from_lengths(lengths, TILE)
    vectors = [torch.randn(blocks.num_blocks, 8, generator=g) for _ in "qk"]
    table = torch.randn(6, generator=g)
    expected = TileStrips(*vectors, table, blocks)(0, 14, 9)
    on_gpu = TileStrips(*(v.cuda() for v in vectors), table.cuda(), Blocks.from_lengths(lengths, TILE, "cuda"))
    on_gpu(0, 1, 9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.cat([on_gpu(first, 7, 9) for first in (0, 7)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), expected, atol=1e-3, rtol=1e-2)


def test_strips_refuse_what_does_not_fit(calibrated):
    x, blocks = torch.randn(6 * TILE, HIDDEN), Blocks.from_lengths([6 * TILE], TILE)
    with pytest.raises(ValueError, match="blocks of 64"):
        calibrated.tile_scores(0, x, Blocks.from_lengths([6 * TILE], 64))
    with pytest.raises(ValueError, match="768 rows"):
        calibrated.tile_scores(0, x[1:], blocks)
    with pytest.raises(ValueError, match="at least the 6 tiles"):
        calibrated.tile_scores(0, x, blocks)(0, 2, 5)
    with pytest.raises(ValueError, match="first_slot"):
        calibrated.tile_scores(0, x, blocks)(-1, 2, 6)


# --- folder and settings ----------------------------------------------------------------------------------------------


def test_folder_round_trip(tmp_path, long_model, calibrated):
    calibrated.save(tmp_path / "c")
    loaded = PredictorSet.load(tmp_path / "c", model=long_model)
    assert loaded.target == "mass" and loaded.block_size == TILE and loaded.report == calibrated.report
    assert torch.equal(loaded.distances, calibrated.distances)
    x, blocks = torch.randn(6 * TILE, HIDDEN), Blocks.from_lengths([6 * TILE], TILE)
    for i in range(LAYERS):
        assert torch.equal(loaded.tile_scores(i, x, blocks)(0, 7, 6), calibrated.tile_scores(i, x, blocks)(0, 7, 6))
    placed = loaded.to(dtype=torch.bfloat16)
    assert placed.distances.dtype == torch.float32 and placed.layers[0].wq1.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "size"}, "unknown target 'size'"),
        ({"target": None}, "unknown target None"),
        ({"block_size": 64}, "expected 128"),
        ({"distances": [[1.0, 2.0, 3.0]]}, "distances"),
        ({"distances": [[1.0, 2.0, "x"]] * LAYERS}, "distances"),
        ({"target": "importance"}, "digest"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, calibrated, change, message):
    calibrated.save(tmp_path / "c")
    path = tmp_path / "c" / "lemo_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CalibrationError, match=message):
        PredictorSet.load(tmp_path / "c")


def test_predictors_of_the_other_target_are_refused(calibrated):
    x = torch.randn(6 * TILE, HIDDEN)
    blocks = Blocks.from_lengths([6 * TILE], TILE)
    with pytest.raises(CalibrationError, match=r"choice of key tiles.*needs --target importance"):
        calibrated.scores(0, x, blocks)
    other = dataclasses.replace(calibrated, target="importance", distances=None)
    with pytest.raises(CalibrationError, match=r"choice of blocks.*lemo calibrate --target mass"):
        other.tile_scores(0, x, blocks)
    with pytest.raises(ValueError, match="distances: expected a row"):
        dataclasses.replace(calibrated, distances=None)
    with pytest.raises(ValueError, match="tiles of 128 tokens, got 64"):
        dataclasses.replace(calibrated, block_size=64)


def test_mode_sparse_chooses_by_the_folder(tmp_path, monkeypatch, long_model, long_texts, calibrated):
    calibrated.save(tmp_path / "tiles")
    dataclasses.replace(calibrated, target="importance", distances=None).save(tmp_path / "blocks")
    model = copy.deepcopy(long_model)
    phase = lemo.Phase("sparse", density=0.5, tile_policy="predictors")
    settings = {"phases": [phase], "calibration": tmp_path / "blocks", "block_size": 128}
    with pytest.raises(CalibrationError, match=r'blocks was made for.*tile_policy "predictors".*--target mass'):
        lemo.apply(model, lemo.LemoConfig(**settings))
    settings = {"phases": [lemo.Phase("skip")], "calibration": tmp_path / "tiles"}
    with pytest.raises(CalibrationError, match=r"tiles was made for.*policy 'sampled' in mode 'skip'.*importance"):
        lemo.apply(model, lemo.LemoConfig(**settings))
    settings = {"phases": [lemo.Phase("sparse", density=0.5)], "calibration": tmp_path / "tiles"}
    with pytest.raises(ValueError, match=r"calibration is .*tiles, but no phase uses its predictors.*--target mass"):
        lemo.apply(model, lemo.LemoConfig(**settings))
    settings = {"phases": [phase], "calibration": tmp_path / "tiles"}
    controller = lemo.apply(model, lemo.LemoConfig(**settings))
    controller.total_steps = 1
    model.train()
    ids = long_texts[16][None]
    made, from_lengths = [], Blocks.from_lengths
    monkeypatch.setattr(Blocks, "from_lengths", lambda *a, **k: made.append(a[1]) or from_lengths(*a, **k))
    model(input_ids=ids, labels=ids).loss.backward()
    assert made.count(TILE) == 1  # reading lengths waits for a GPU: once, not in every layer
    assert controller.report()["density"] == pytest.approx([0.5] * LAYERS, abs=0.15)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.layers.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "size"}, "target: expected importance or mass"),
        ({"block_size": 64}, "tiles of 128"),
        ({"normalize": True}, "normalize"),
        ({"probes": 0}, "probes"),
        ({"probes": 129}, "probes"),
        ({"context": 4 * TILE}, "more than 512"),
    ],
)
def test_settings_out_of_range(long_model, long_texts, change, message):
    with pytest.raises(ValueError, match=message):
        calibrate(long_model, long_texts, **{**SETTINGS, **change})


def test_short_documents_are_not_enough(long_model, long_texts):
    with pytest.raises(ValueError, match="2 documents longer than 512 tokens"):
        calibrate(long_model, [t[:500] for t in long_texts], **SETTINGS)
