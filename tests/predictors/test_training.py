"""Calibration on a tiny model: it learns, prunes, repeats itself, and its report is what the run-time operators do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lemo import ops
from lemo.engine.layout import Blocks
from lemo.predictors import calibrate, evaluate_recall, format_report
from lemo.predictors.fit import fit_outputs, refit_outputs
from lemo.predictors.network import PredictorNetwork, informativeness, visible_queries
from lemo.predictors.prune import Activity, choose_units, prune
from lemo.predictors.teacher import Teacher, documents
from lemo.predictors.thresholds import search_thresholds
from lemo.predictors.train import score_loss
from support import models, own_layers
from support.tiny import BLOCK, HIDDEN, LAYERS, build

SETTINGS = {"block_size": BLOCK, "steps": 100, "rank": 16, "features": 8, "progress": False, "max_documents": 32}


@pytest.fixture(scope="module")
def calibrated(model, texts):
    return calibrate(model, texts[:32], **SETTINGS)


def test_training_beats_chance_and_position(model, texts, calibrated):
    report = evaluate_recall(model, calibrated, texts[32:], keep=0.5)
    g = torch.Generator().manual_seed(9)
    random = [PredictorNetwork(HIDDEN, 16, 8, generator=g).export() for _ in range(LAYERS)]
    untrained = dataclasses.replace(calibrated, layers=random)
    before = evaluate_recall(model, untrained, texts[32:], keep=0.5)
    assert report["mean"]["recall"] > before["mean"]["recall"] + 0.1
    assert report["mean"]["recall"] > report["mean"]["position_recall"] + 0.25
    assert report["mean"]["recall"] > 0.85
    assert len(report["layers"]) == LAYERS
    assert format_report(calibrated.report).count("\n") == LAYERS + 1


def test_training_lowers_the_loss_of_the_closed_form(model, texts):
    loss = calibrate(model, texts[:32], **{**SETTINGS, "remove": 0.0}).report["loss"]
    assert loss["last"] < 0.8 * loss["first"]


def test_calibration_is_repeatable_and_leaves_the_model_alone(model, texts, calibrated):
    weights = {n: p.clone() for n, p in model.state_dict().items()}
    again = calibrate(model, texts[:32], **SETTINGS)
    for ours, theirs in zip(again.layers, calibrated.layers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert again.thresholds == calibrated.thresholds
    assert all(torch.equal(weights[n], p) for n, p in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_pruning_makes_networks_smaller(calibrated):
    parameters = calibrated.report["parameters"]
    assert sum(parameters["after_pruning"]) < sum(parameters["before_pruning"])
    assert all(w.shape[0] % 8 == 0 for layer in calibrated.layers for w in layer)
    assert calibrated.num_parameters == sum(parameters["after_pruning"])


def test_thresholds_keep_the_target_on_new_text(model, texts, calibrated):
    report = evaluate_recall(model, calibrated, texts[32:], keep=0.5)
    assert report["mean"]["threshold_kept"] == pytest.approx(0.5, abs=0.12)
    assert sum(calibrated.keep) / LAYERS == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_teacher_scores_match_the_full_matrix(family):
    """Against queries, keys, scale, soft-cap and window as transformers' own layers give them to attention."""
    model = build(1, family) if family in models.LAYERS else models.base(family, initializer_range=0.02).eval()
    ids = torch.randint(0, 64, (3 * BLOCK + 3,), generator=torch.Generator().manual_seed(0))
    teacher, seen = Teacher(model, BLOCK, False), {}
    teacher.read(ids, lambda i, x, exact, blocks: seen.update({i: (x.clone(), exact)}))
    every = torch.arange(len(ids))
    with torch.no_grad():
        hidden = model(ids[None], output_hidden_states=True).hidden_states
        reference = own_layers.Model(model, every, torch.zeros_like(every))
        reference.embed(ids)
        for i, (x, exact) in seen.items():
            torch.testing.assert_close(x, hidden[i][0], atol=1e-6, rtol=1e-5)
            s = _scores(reference, i, x, every).relu().mean(0).tril()
            n = len(exact)
            full = torch.zeros(n * BLOCK, n * BLOCK)
            full[: len(ids), : len(ids)] = s
            expected = full.view(n, BLOCK, n, BLOCK).amax((1, 3)).sum(0)
            torch.testing.assert_close(exact, expected, atol=1e-4, rtol=1e-4)


def _scores(reference, layer, x, every):
    """[Hq, T, T] before the softmax, 0 for what the layer's window hides."""
    caught = []

    def attend(q, k, v, options):
        s = q @ k.transpose(1, 2) * options.scaling
        s = s if options.softcap is None else options.softcap * torch.tanh(s / options.softcap)
        caught.append(s if options.window is None else s.triu(1 - options.window))
        return v

    reference.layer(layer, x, every, attend)
    return caught[0]


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("normalize", [False, True])
def test_module_equals_the_operator(norm, pool, normalize):
    g = torch.Generator().manual_seed(5)
    network = PredictorNetwork(HIDDEN, 10, 5, norm=norm, pool=pool, normalize=normalize, generator=g)
    blocks = Blocks.from_lengths([3 * BLOCK + 2, BLOCK, 5], BLOCK)
    x = torch.randn(blocks.num_tokens, HIDDEN, generator=g) + 0.5
    scores, queries, keys = ops.predict(
        x, *network.export(), blocks.offsets, blocks.documents, BLOCK, norm, pool, network.eps, normalize
    )
    torch.testing.assert_close(network.scores(x, blocks).detach(), scores, atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(network(x, blocks), (queries, keys), strict=True):
        torch.testing.assert_close(ours.detach(), theirs[:, :5], atol=1e-5, rtol=1e-4)
        assert not theirs[:, 5:].any()


def test_closed_form_start_fits_what_pooled_activations_determine():
    g = torch.Generator().manual_seed(8)
    network = PredictorNetwork(HIDDEN, 16, 4, generator=g)
    blocks = Blocks.from_lengths([12 * BLOCK, 9 * BLOCK], BLOCK)
    pooled = {side: torch.rand(blocks.num_blocks, 16, generator=g) for side in "qk"}
    for p in pooled.values():
        p[:, 0] = 1.0  # a constant is within reach of the queries
    count = visible_queries(blocks)
    exact = count * (pooled["k"] @ torch.rand(16, generator=g))
    fit_outputs(network, pooled, exact, blocks)
    with torch.no_grad():
        network.wq3[1:] = 0  # type: ignore[operator]
        y = {side: pooled[side] @ getattr(network, f"w{side}3").T for side in "qk"}
    torch.testing.assert_close(informativeness(y["q"], y["k"], blocks, False), exact, rtol=0.03, atol=0.03)


def _network_that_fires(g):
    network = PredictorNetwork(HIDDEN, 16, 4, generator=g)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    blocks = Blocks.from_lengths([4 * BLOCK], BLOCK)
    x = torch.randn(blocks.num_tokens, HIDDEN, generator=g)
    with torch.no_grad():  # half of the hidden units never fire
        for side in "qk":
            getattr(network, f"w{side}1")[8:] = 0
            getattr(network, f"w{side}2")[1::2] = 0
    exact = torch.rand(blocks.num_blocks, generator=g) + 0.5
    score_loss(network.scores(x, blocks), exact, blocks).backward()
    optimizer.step()
    with torch.no_grad():
        for side in "qk":
            getattr(network, f"w{side}1")[8:] = 0
            getattr(network, f"w{side}2")[1::2] = 0
    return network, optimizer, blocks, x, exact


def test_refit_brings_back_what_pruning_changed():
    g = torch.Generator().manual_seed(6)
    network = PredictorNetwork(HIDDEN, 24, 4, generator=g)
    blocks = Blocks.from_lengths([20 * BLOCK], BLOCK)
    z = network.apply_norm(torch.randn(blocks.num_tokens, HIDDEN, generator=g))

    def pooled():
        return {side: network.pool_block(network.hidden(z, side)[1], blocks).detach() for side in "qk"}

    def vectors():
        return {side: p @ getattr(network, f"w{side}3").detach().T for side, p in pooled().items()}

    before = vectors()
    activity = Activity()
    for side in "qk":
        activity.observe(side, *network.hidden(z, side))
    prune(network, torch.optim.Adam(network.parameters()), choose_units([activity], 0.3)[0])
    pruned = vectors()
    refit_outputs(network, pooled(), before, blocks)
    for side, after in vectors().items():
        assert (after - before[side]).norm() < 0.5 * (pruned[side] - before[side]).norm()


def test_pruning_units_that_never_fire_keeps_the_function_and_the_optimizer_state():
    network, optimizer, blocks, x, exact = _network_that_fires(torch.Generator().manual_seed(1))
    before = network.scores(x, blocks).detach()
    states = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in network.named_parameters()}
    activity = Activity()
    for side in "qk":
        activity.observe(side, *network.hidden(network.apply_norm(x), side))
    (kept,) = choose_units([activity], 0.4)
    assert kept["q", 1].tolist() == list(range(8))
    assert kept["q", 2].tolist() == list(range(0, 16, 2))
    prune(network, optimizer, kept)
    assert network.wq1.shape == (8, HIDDEN) and network.wq2.shape == (8, 8) and network.wq3.shape == (4, 8)
    torch.testing.assert_close(network.scores(x, blocks).detach(), before)
    state = optimizer.state[network.wq2]
    assert torch.equal(state["exp_avg"], states["wq2"]["exp_avg"][::2, :8])
    assert torch.equal(state["exp_avg_sq"], states["wq2"]["exp_avg_sq"][::2, :8])
    assert state["step"] == states["wq2"]["step"]
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in network.parameters()}
    was = network.wq1.detach().clone()
    optimizer.zero_grad()
    score_loss(network.scores(x, blocks), exact, blocks).backward()
    optimizer.step()
    assert not torch.equal(network.wq1.detach(), was)


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8])
def test_thresholds_meet_the_target_and_prefer_layers_that_need_more(keep):
    g = torch.Generator().manual_seed(2)
    flat = 1 + 0.05 * torch.rand(400, generator=g)  # every block informs alike
    steep = torch.cat([torch.full((60,), 10.0), torch.full((340,), 0.1)])[torch.randperm(400, generator=g)]
    steep = steep * (1 + 0.05 * torch.rand(400, generator=g))
    forced = torch.zeros(400, dtype=torch.bool)
    forced[::20] = True
    thresholds, kept = search_thresholds([flat, steep], [flat, steep], [forced, forced], keep)
    assert sum(kept) / 2 == pytest.approx(keep, abs=0.02)
    for scores, threshold, share in zip((flat, steep), thresholds, kept, strict=True):
        assert ((scores >= threshold) | forced).float().mean().item() == pytest.approx(share)
    if keep == 0.5:
        assert kept[1] < kept[0]


def test_thresholds_do_not_depend_on_the_scale_of_scores():
    g = torch.Generator().manual_seed(4)
    p, e, f = torch.randn(300, generator=g), torch.rand(300, generator=g), torch.zeros(300, dtype=torch.bool)
    one, kept = search_thresholds([p], [e], [f], 0.4)
    big, kept_big = search_thresholds([1000 * p + 5], [7 * e], [f], 0.4)
    assert kept == kept_big
    assert big[0] == pytest.approx(1000 * one[0] + 5, rel=1e-6)


def test_thresholds_meet_the_target_in_spite_of_outliers():
    g = torch.Generator().manual_seed(7)
    p = [torch.randn(192, generator=g) * 1e-3 for _ in range(4)]
    for scores in p[:3]:
        scores[5] = -1e4
    e = [torch.rand(192, generator=g) for _ in p]
    forced = [torch.zeros(192, dtype=torch.bool)] * 4
    thresholds, kept = search_thresholds(p, e, forced, 0.5)
    assert sum(kept) / 4 == pytest.approx(0.5, abs=0.02)
    for scores, threshold, share in zip(p, thresholds, kept, strict=True):
        assert (scores >= threshold).float().mean().item() == pytest.approx(share)


def test_documents_are_cut_out_of_batches():
    ids = torch.arange(40)
    batch = {
        "input_ids": torch.stack([ids, ids]),
        "attention_mask": (torch.arange(40) < torch.tensor([[40], [30]])).long(),
        "position_ids": torch.cat([torch.arange(25), torch.arange(15)])[None].expand(2, -1),
    }
    pieces = [p.tolist() for p in documents([batch], 20, BLOCK)]
    assert pieces == [list(range(20)), list(range(25, 40)), list(range(20))]
    assert [len(p) for p in documents([ids.tolist()], None, BLOCK)] == [40]
    assert not list(documents([ids[:BLOCK]], None, BLOCK))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"keep": 0.0}, "keep"),
        ({"steps": 0}, "steps"),
        ({"remove": 1.0}, "remove"),
        ({"context": BLOCK}, "context"),
        ({"max_documents": 1}, "max_documents"),
        ({"pool": "sum"}, "pool"),
    ],
)
def test_bad_arguments(model, texts, change, word):
    with pytest.raises(ValueError, match=f"^{word}: expected"):
        calibrate(model, texts, **{**SETTINGS, **change})


def test_too_little_text(model, texts):
    with pytest.raises(ValueError, match="at least 2 documents"):
        calibrate(model, texts[:1], **SETTINGS)


def test_buffer_is_bounded(model, texts):
    predictors = calibrate(model, texts, **{**SETTINGS, "steps": 8, "buffer_bytes": 1})
    assert predictors.num_layers == LAYERS
