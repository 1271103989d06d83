"""Mode "sparse": against its definition in plain torch, with the lists that were chosen; and what it composes with."""

import inspect
import itertools
import math
import re
import weakref

import lemo
import pytest
import torch
from lemo.engine import tiles as engine_tiles
from lemo.engine.attend import PackedRows
from lemo.engine.config import _TILE, TILE_OPTIONS
from lemo.engine.tiles import TILE, LayerRows, TileChooser, budget, make_tile_policy
from support import reference
from support.models import LAYERS, LINEARS, assert_close, base, clone, gradients, lora, reference_gradients, tuned
from support.pairs import pairs
from support.tile_pairs import pairs_of
from torch.utils.checkpoint import checkpoint

LENGTHS = (640, 129, 431)  # tiles of 128: whole, one row more, a part


def batch(kind="packed"):
    """ids and labels of three documents, packed or padded; padding is ignored by the reference."""
    torch.manual_seed(2)
    if kind == "packed":
        ids = torch.randint(3, 80, (1, sum(LENGTHS)))
        labels = ids.clone()
        labels[:, ::7] = -100
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        return {"input_ids": ids, "labels": labels, "position_ids": positions, "use_cache": False}
    ids = torch.randint(3, 80, (3, max(LENGTHS)))
    labels, mask = ids.clone(), torch.ones(ids.shape, dtype=torch.long)
    for row, n in enumerate(LENGTHS):
        gone = slice(n, None) if kind == "right" else slice(0, ids.shape[1] - n)
        mask[row, gone], labels[row, gone] = 0, -100
        if kind == "left":
            labels[row, ids.shape[1] - n] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def long(family):
    """What a tiny model of the family needs for documents of these lengths."""
    return {"max_position_embeddings": 1024}


def packed(family, inputs):
    """Packed ids, shifted targets, positions and documents of every token."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:][mask]
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    return inputs["input_ids"][mask], targets, torch.cat([torch.arange(n) for n in LENGTHS]), document


def config(recompute="none", **phase):
    options = {"mode": "sparse", "density": 0.5, **phase}
    return lemo.LemoConfig(block_size=8, recompute=recompute, phases=[lemo.Phase(**options)], seed=3)


@pytest.fixture
def chosen(monkeypatch):
    """The rows and the lists of every choice."""
    found = []
    original = TileChooser._choose

    def record(self, layer):
        found.append((layer, original(self, layer)))
        return found[-1][1]

    monkeypatch.setattr(TileChooser, "_choose", record)
    return found


class Sparse(reference.Model):
    """A model whose layers see the chosen tiles only; choices by layer, None: all tiles."""

    def __init__(self, model, positions, document, choices):
        super().__init__(model, positions, document)
        self.choices = iter(choices)

    def attention(self, layer, x, rows):
        choice = next(self.choices)
        mask = self.visible(rows, rows)
        if choice is not None:
            mask = mask & pairs_of(choice[0].rows, choice[1])
        q, k, v = self.qkv(layer, x, rows)
        return self.out_proj(layer, torch.einsum("hij,jhd->ihd", self.scores(layer, q, k, mask).softmax(-1), v))


def everything(ids):
    return [(torch.arange(len(ids)),) * 2] * 3


@pytest.mark.parametrize(
    ("family", "recompute", "kind"), pairs(LAYERS, ["none", "attention", "full"], ["packed", "right", "left"])
)
def test_sparse(family, recompute, kind, chosen):
    inputs = batch(kind)
    model = lora(base(family, **long(family)), LINEARS[family]).train()
    plain = clone(model)
    controller = lemo.apply(model, config(recompute))
    loss, got = gradients(model, inputs)
    assert len(chosen) == 3  # once per layer, whatever is recomputed
    ids, targets, positions, document = packed(family, inputs)
    expected = reference.skip(Sparse(plain, positions, document, chosen), ids, targets, everything(ids))
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected))
    report = controller.report()
    assert report["loss_tokens"] == (targets != -100).sum() and report["policy"] is None
    assert report["kept"] == [1.0] * 3
    assert all(0.5 < d < 1 and d < c < 1 for d, c in zip(report["density"], report["covered"], strict=True))


@pytest.mark.parametrize(
    ("family", "recompute", "limits"),
    pairs(
        LAYERS,
        ["none", "attention", "full"],
        [{"density": None, "keys": 256}, {"density": None, "mass": 0.6}, {"density": 0.9, "mass": 0.5, "local": 0}],
    ),
)
def test_limits_and_kept_tokens(family, recompute, limits, chosen):
    """Lists among the tokens that are kept, other ones in every layer."""
    inputs = batch()
    model = lora(base(family, **long(family)), LINEARS[family]).train()
    plain = clone(model)
    controller = lemo.apply(model, config(recompute, keep=0.75, policy="random", **limits))
    kept = []
    lists = controller._policies[0]._finish
    controller._policies[0]._finish = lambda *args: kept.append(lists(*args)) or kept[-1]
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed(family, inputs)
    rows = [(k.rows.long(), k.rows.long()) for k in kept]
    assert len({tuple(r.tolist()) for r, _ in rows}) == 3
    expected = reference.skip(Sparse(plain, positions, document, chosen), ids, targets, rows)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected))
    report = controller.report()
    assert report["policy"] == "random" and all(0.6 < k < 0.9 for k in report["kept"])
    assert all(0 < d < 1 for d in report["density"])


def test_everything_within_the_limits_is_dense_training(chosen):
    inputs = batch()
    model = tuned("llama", max_position_embeddings=1024)
    plain = clone(model)
    controller = lemo.apply(model, config(density=None, keys=640))
    loss, got = gradients(model, inputs)
    assert not chosen
    assert controller.report()["density"] == controller.report()["covered"] == [1.0] * 3
    lemo.apply(plain, lemo.LemoConfig(block_size=8, phases=[lemo.Phase("dense")]))
    expected_loss, expected = gradients(plain, inputs)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(got[n], expected[n]) for n in expected)


def test_layers_that_do_not_eliminate(chosen):
    inputs = batch()
    model = tuned("llama", max_position_embeddings=1024)
    plain = clone(model)
    settings = config()
    settings.layers = [1]
    controller = lemo.apply(model, settings)
    loss, got = gradients(model, inputs)
    assert [layer.layer for layer, _ in chosen] == [1]
    ids, targets, positions, document = packed("llama", inputs)
    expected = reference.skip(
        Sparse(plain, positions, document, [None, chosen[0], None]), ids, targets, everything(ids)
    )
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected))
    assert controller.report()["density"][0] == controller.report()["density"][2] == 1.0


def test_gradient_accumulation_and_repeatability():
    """Lists follow from queries and keys: the same batch has the same ones, and gradients add up."""
    model, inputs = tuned("llama", max_position_embeddings=1024), batch()
    lemo.apply(model, config())
    model.zero_grad()
    for _ in range(2):
        model(**inputs).loss.backward()
    total = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    _, one = gradients(model, inputs)
    _, two = gradients(model, inputs)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert_close(total, {n: 2 * one[n] for n in one})


def test_a_step_of_several_phases():
    """The exact phase after a sparse one is dense training."""
    model, inputs = tuned("llama", max_position_embeddings=1024), batch()
    plain = clone(model)
    phases = [lemo.Phase("sparse", density=0.4), lemo.Phase("dense")]
    controller = lemo.apply(model, lemo.LemoConfig(block_size=8, phases=phases))
    controller.total_steps = 2
    sparse_loss, _ = gradients(model, inputs)
    controller.step()
    loss, _ = gradients(model, inputs)
    assert controller.report()["density"] == []
    lemo.apply(plain, lemo.LemoConfig(block_size=8, phases=[lemo.Phase("dense")]))
    assert torch.equal(loss, gradients(plain, inputs)[0]) and not torch.equal(loss, sparse_loss)


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ({"density": 0.5, "local": 3}, r"limits \(density=0.5, local=3\) .* documents of more than 640 tokens"),
        (
            {"density": None, "keys": 640},
            r"limits \(keys=640, local=1\) .* documents of more than 640 tokens .* use mode \"dense\"",
        ),
        ({"density": 0.3, "keep": 0.25}, r"more than 384 tokens in a layer, .* use mode \"skip\""),
        ({"density": 1.0}, r"limits \(density=1, local=1\) leave nothing out of any document"),
    ],
    ids=str,
)
def test_a_sparse_phase_that_leaves_nothing_out_is_said_once(phase, said, caplog):
    model, inputs = tuned("llama", max_position_embeddings=1024), batch()
    controller = lemo.apply(model, config(**phase))
    for _ in range(2):
        gradients(model, inputs)
        controller.step()
    (message,) = (r.getMessage() for r in caplog.records if r.name.startswith("lemo"))
    assert re.search(said, message) and set(controller.report()["density"]) == {1.0}


def test_a_sparse_phase_of_sliding_windows_says_so(caplog):
    model = tuned("mistral", max_position_embeddings=1024, sliding_window=64)
    lemo.apply(model, config())
    gradients(model, batch())
    assert "every layer has a sliding window" in caplog.text


def test_a_short_batch_after_longer_ones_says_nothing(caplog):
    model, inputs = tuned("llama", max_position_embeddings=1024), batch()
    lemo.apply(model, config())
    for stop in (None, 200):
        gradients(model, {k: v if k == "use_cache" else v[:, :stop] for k, v in inputs.items()})
    assert caplog.text == ""


def test_a_reference_pass_sees_the_same_tiles():
    model, inputs = tuned("llama", max_position_embeddings=1024), batch()
    controller = lemo.apply(model, config())
    logits = {}
    model.zero_grad()
    loss = model(**inputs).loss.detach()
    with controller.reference_pass():
        logits["same"] = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    again = torch.nn.functional.cross_entropy(logits["same"].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=0)
    with torch.no_grad():
        exact = model(**inputs).loss
    assert (exact - loss).abs() > 1e-4


@pytest.mark.parametrize("outer", [False, True], ids=["", "in an activation checkpoint"])
def test_lists_of_tiles_end_with_their_backward_pass(outer, chosen):
    model, inputs = tuned("llama", max_position_embeddings=1024), batch()
    controller = lemo.apply(model, config("full"))
    start = torch.zeros((), requires_grad=True)

    def run(scale):
        return model(**inputs).loss * scale.exp()

    loss = checkpoint(run, start, use_reentrant=False) if outer else run(start)
    lists = [weakref.ref(tiles.tiles) for _, tiles in chosen]
    chosen.clear()
    with controller.reference_pass():
        model(**inputs)  # they wait for it
    loss.backward()
    chosen.clear()
    assert len(lists) >= 3 and all(held() is None for held in lists)
    with pytest.raises(RuntimeError, match=r"between the training pass and loss.backward\(\)"):
        with controller.reference_pass():
            model(**inputs)


@pytest.mark.parametrize("policy", ["probe", "recent"])
def test_strips(policy, monkeypatch):
    """Lists do not depend on how many query tiles are scored at a time, and follow their limits."""
    torch.manual_seed(0)
    q, k = torch.randn(1200, 4, 8), torch.randn(1200, 2, 8)
    rows = PackedRows(torch.tensor([0, 0, 900, 1200], dtype=torch.int32), 900)
    phase = lemo.Phase("sparse", density=0.6, keys=640, local=2, tile_policy=policy)
    found = []
    for size in (1, 1 << 12, 1 << 30):
        monkeypatch.setattr(engine_tiles, "STRIP_BYTES", size)
        chooser = TileChooser(make_tile_policy(policy, {}, None), phase, 1)
        found.append(chooser.choose(LayerRows(0, q, q, k, rows, 0.3)))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0].tensors, other.tensors, strict=True))
    offsets, tiles = found[0].offsets.tolist(), found[0].tiles.tolist()
    for d, (a, b) in enumerate(itertools.pairwise(rows.cu_seqlens.tolist())):
        for m in range(-(-(b - a) // TILE)):
            slot = a // TILE + d + m
            listed = tiles[offsets[slot] : offsets[slot + 1]]
            limit = max(4, min(640 // TILE, math.floor(0.6 * (m + 1) + 0.5)))  # four are always there
            assert len(listed) + 1 == budget(m, phase) == min(m + 1, limit)
            assert {n for n in (0, m - 1, m - 2) if 0 <= n < m} <= set(listed)
            if policy == "recent":
                assert sorted({0, *range(m - len(listed) + 1, m)} if listed else []) == listed


def probed(options, tokens=1000):
    """What probing ranks one document by, and its masses."""
    generator = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(1000, heads, 8, generator=generator) for heads in (4, 2))
    layer = LayerRows(0, q, q, k, PackedRows(torch.tensor([0, 1000], dtype=torch.int32), tokens), 0.3)
    return make_tile_policy("probe", options, None).scorer(layer)(0, 8, 8)


@pytest.mark.parametrize(
    ("tokens", "rows"), [(1000, 3), (1001, 2), (2000, 2), (2001, 1), (10**6, 1)], ids=lambda n: str(n)
)
def test_the_longer_a_document_the_fewer_rows_are_probed(tokens, rows, monkeypatch):
    monkeypatch.setattr(engine_tiles, "PROBED_ROWS", ((1000, 3), (2000, 2)))
    monkeypatch.setattr("lemo.ops.tile_scores", lambda *args: (args[6], None))
    assert probed({"rank": "mean"}, tokens) == (rows, None)
    assert probed({"rank": "mean", "rows": 7}, tokens) == (7, None)


def test_probed_tiles_are_ranked_by_the_head_that_needs_them_most():
    peaks, masses = probed({"rows": 4})
    means, nothing = probed({"rows": 4, "rank": "mean"})
    assert nothing is None and torch.equal(means, masses)
    assert (peaks >= masses).all() and (peaks > masses).any() and masses[7].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("rank", "limits", "listed", "share"),
    [
        ("peak", {"density": 0.5}, [0, 1], 0.25),
        ("mean", {"density": 0.5}, [0, 2], 0.39),
        ("peak", {"mass": 0.6}, [0, 1, 2], 0.64),  # of the largest masses, tile 1 would be enough
        ("mean", {"mass": 0.6}, [0, 2, 3], 0.75),
    ],
)
def test_the_rank_chooses_and_the_mass_limits(rank, limits, listed, share):
    """One head of four looks at tile 1 alone; three look at tile 2, and a little less at tile 3."""
    q, k = torch.zeros(6 * TILE, 4, 8), torch.zeros(6 * TILE, 4, 8)
    q[:, :, 0] = 30.0
    k[TILE : 2 * TILE, 0, 0] = 1.0
    k[2 * TILE : 3 * TILE, 1:, 0] = 1.0
    k[3 * TILE : 4 * TILE, 1:, 0] = 1.0 + math.log(0.36 / 0.39) / 30
    rows = PackedRows(torch.tensor([0, 6 * TILE], dtype=torch.int32), 6 * TILE)
    phase = lemo.Phase("sparse", local=0, tile_options={"rank": rank}, **limits)
    chooser = TileChooser(make_tile_policy("probe", phase.tile_options, None), phase, 1)
    tiles = chooser.choose(LayerRows(0, q, q, k, rows, 1.0))
    assert tiles.tiles[tiles.offsets[5] : tiles.offsets[6]].tolist() == listed
    assert chooser.chosen[0].covered[5] == pytest.approx(share, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0}, "Phase.density must be a number above 0"),
        ({"density": 1.5}, "Phase.density"),
        ({"keys": 0}, "Phase.keys must be an integer of at least 1"),
        ({"keys": 8192.0}, "Phase.keys"),
        ({"keys": 127}, "Phase.keys must be at least one tile of 128 tokens"),
        ({"keys": 2**70}, "Phase.keys must be at most"),
        ({"local": 2**31}, "Phase.local must be at most"),
        ({"density": 1e-50}, "Phase.density must be a number above 0 in float32"),
        ({"mass": 1e-50}, "Phase.mass must be a number above 0 in float32"),
        ({"policy": "random"}, "Phase.policy chooses the blocks that a layer keeps, and mode 'sparse' with keep=1"),
        ({"policy_options": {"shared": True}}, "Phase.policy_options chooses the blocks"),
        ({"mode": "dense", "policy": "random"}, "Phase.policy chooses the blocks"),
        ({"tile_options": {"row": 4}}, "Phase.tile_options: tile_policy 'probe' has no option row; it has rows, rank"),
        ({"tile_policy": "recent", "tile_options": {"rows": 2}}, "'recent' has no option rows; it has none"),
        ({"mass": 0.0}, "Phase.mass"),
        ({"mass": 0.9, "tile_policy": "recent"}, "Phase.mass needs a tile_policy that estimates attention"),
        ({"local": -1}, "Phase.local must be an integer of at least 0"),
        ({"tile_policy": "best"}, "Phase.tile_policy must be one of probe, recent, predictors; got 'best'"),
        ({"tile_options": 3}, "Phase.tile_options must be a dictionary"),
        ({"keep": 0.0}, "Phase.keep must be above 0"),
        ({"mode": "skip", "density": 0.5}, 'Phase.density needs mode "sparse"'),
        ({"mode": "dense", "keys": 64}, 'Phase.keys needs mode "sparse"'),
        ({"mode": "backward", "local": 2}, 'Phase.local needs mode "sparse"'),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        lemo.Phase(**{"mode": "sparse", **settings})


def test_bad_options():
    model = tuned("llama")
    with pytest.raises(ValueError, match="rows must be an integer from 1 to 128, or None; got 0"):
        lemo.apply(model, config(tile_options={"rows": 0}))
    with pytest.raises(ValueError, match="rank must be one of peak, mean; got 'max'"):
        lemo.apply(model, config(tile_options={"rank": "max"}))
    with pytest.raises(ValueError, match=r'tile_policy "predictors" needs LemoConfig\.calibration'):
        config(tile_policy="predictors")


def test_options_that_are_checked_are_those_of_the_policies():
    for name, cls in engine_tiles._CLASSES.items():
        parameters = list(inspect.signature(cls.__init__).parameters)[2:]  # after self and predictors
        assert TILE_OPTIONS[name] == tuple(parameters)
    assert engine_tiles.TILE == _TILE


def test_tokens_are_left_out_by_a_policy_that_a_calibration_of_tiles_can_serve():
    phase = lemo.Phase("sparse", keep=0.5, tile_policy="predictors")
    assert lemo.LemoConfig(phases=[phase], calibration="tiles").policy(phase) == ("update_norm", {})
    assert lemo.LemoConfig(phases=[lemo.Phase("sparse", keep=0.5)], calibration="blocks").policy(
        lemo.Phase("sparse", keep=0.5)
    ) == ("sampled", {"shared": True})


def test_settings_round_trip():
    phase = lemo.Phase("sparse", keys=8192, mass=0.95, local=3, keep=0.5, tile_options={"rows": 4})
    assert lemo.Phase(**phase.to_dict()) == phase and phase.density is None
    assert lemo.Phase("sparse").density == 0.25 and lemo.Phase("sparse").keep == 1.0
    assert (phase.skips, phase.exact, lemo.Phase("sparse").skips, lemo.Phase("sparse").exact) == (
        True,
        False,
        False,
        False,
    )
