"""Layers whose attention has a window, a soft-cap and sinks: every mode against its definition, and transformers' own
window."""

import lemo
import pytest
import torch
from engine.test_modes import blocks_of
from engine.test_sparse import batch as long_batch
from engine.test_step import Chunks
from lemo import ops
from lemo.engine.attend import Attention, PackedRows
from lemo.engine.families.base import AttentionOptions
from lemo.engine.families.llama import Llama
from lemo.engine.packing import pack
from support import reference
from support.models import LINEARS, assert_close, base, batch, clone, gradients, lora, packed, reference_gradients

BLOCK, WINDOW, SOFTCAP = 4, 10, 2.0
RECOMPUTE = ["none", "attention", "full"]


def options(layer) -> AttentionOptions:
    """Layers take turns: a window and sinks, a soft-cap alone, everything."""
    a = layer.self_attn
    window, softcap, sinks = ((WINDOW, 0.0, a.sinks), (None, SOFTCAP, None), (WINDOW, SOFTCAP, a.sinks))[
        a.layer_idx % 3
    ]
    return AttentionOptions(float(a.scaling), window, softcap, sinks)


class Reference(reference.Model):
    def options(self, layer) -> AttentionOptions:
        return options(layer)


@pytest.fixture
def model(monkeypatch):
    """A Llama with trained sinks."""
    monkeypatch.setattr(Llama, "attention_options", lambda self, layer: options(layer))
    found = lora(base("llama", max_position_embeddings=1024), LINEARS["llama"]).train()
    torch.manual_seed(3)
    for i in (0, 2):
        attention = found.get_base_model().model.layers[i].self_attn
        attention.sinks = torch.nn.Parameter(torch.randn(4))
    found.get_base_model().model.layers[1].self_attn.sinks = None
    return found


def config(recompute, **phase):
    return lemo.LemoConfig(block_size=BLOCK, recompute=recompute, phases=[lemo.Phase(**phase)], seed=3)


def compared(model, inputs, settings, expected_loss):
    """Runs a step; expected_loss(reference model, ids, targets) afterwards, when lists are known."""
    plain = clone(model)
    controller = lemo.apply(model, settings)
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed("llama", inputs)
    expected = expected_loss(Reference(plain, positions, document), ids, targets)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    wanted = reference_gradients(plain, expected)
    assert {n for n in wanted if n.endswith("sinks")} == {n for n, _ in model.named_parameters() if n.endswith("sinks")}
    assert all(wanted[n].norm() > 1e-4 for n in wanted if n.endswith("sinks"))
    assert_close(got, wanted)
    return controller


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("policy", ["random", "exact"])
@pytest.mark.parametrize("kind", ["right", "packed"])
def test_skip(model, recompute, policy, kind, chosen):
    def expected(m, ids, targets):
        assert all(k.num_rows < k.source.num_tokens for k in chosen)
        return reference.skip(m, ids, targets, [(k.rows.long(), k.rows.long()) for k in chosen])

    compared(model, batch(kind), config(recompute, mode="skip", keep=0.5, policy=policy), expected)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_dense(model, recompute):
    def expected(m, ids, targets):
        return reference.skip(m, ids, targets, [(torch.arange(len(ids)),) * 2] * 3)

    compared(model, batch("packed"), config(recompute, mode="dense"), expected)


@pytest.mark.parametrize("kind", ["left", "packed"])
@pytest.mark.parametrize("weighted", [False, True])
def test_backward(model, weighted, kind, chosen):
    def expected(m, ids, targets):
        rows = [k.rows.long() for k in chosen]
        weights = [k.weights[k.row_slots.long()] for k in chosen] if weighted else None
        return reference.backward(m, ids, targets, rows, weights, blocks_of(chosen[0]))

    compared(
        model, batch(kind), config("none", mode="backward", keep=0.5, policy="random", weighted=weighted), expected
    )


@pytest.mark.parametrize("mode", ["skip", "backward"])
def test_chunks_of_queries(model, mode, monkeypatch):
    settings = config("attention", mode=mode, keep=0.5, policy="random")
    lemo.apply(model, settings)
    whole = gradients(model, batch("packed"))
    lemo.remove(model)
    monkeypatch.setattr("lemo.integration.training_pass.Attention", Chunks)
    lemo.apply(model, settings)
    loss, got = gradients(model, batch("packed"))
    torch.testing.assert_close(loss, whole[0], rtol=1e-5, atol=0)
    assert_close(got, whole[1])


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_sparse_chooses_no_tiles_for_a_window(model, recompute):
    """With everything chosen elsewhere the step is dense; with less, layers with a window still are."""
    inputs = long_batch("packed")
    lemo.apply(model, config(recompute, mode="dense"))
    dense = gradients(model, inputs)
    lemo.remove(model)
    sparse = {"mode": "sparse", "tile_policy": "probe"}
    controller = lemo.apply(model, config(recompute, **sparse, density=1.0, mass=0.999999))
    loss, got = gradients(model, inputs)
    torch.testing.assert_close(loss, dense[0], rtol=1e-4, atol=0)
    assert_close(got, dense[1], 1e-2)
    lemo.remove(model)
    controller = lemo.apply(model, config(recompute, **sparse, density=0.5))
    gradients(model, inputs)
    report = controller.report()
    assert report["density"][0] == report["density"][2] == 1.0 > report["density"][1]
    assert report["covered"][0] == report["covered"][2] == 1.0 > report["covered"][1]


@pytest.mark.parametrize("phase", [{"mode": "dense"}, {"mode": "skip", "keep": 1.0}])
@pytest.mark.parametrize("kind", ["right", "left", "packed", "holes"])
def test_a_window_is_that_of_transformers(phase, kind):
    """Which counts places in the batch, padding between the tokens of a document included."""
    window = 7
    model = lora(base("mistral", sliding_window=window, attn_implementation="eager"), LINEARS["mistral"]).train()
    inputs = batch("right" if kind == "holes" else kind)
    if kind == "holes":
        inputs["attention_mask"][:, 4:9] = 0
        inputs["labels"][:, 3:10] = -100
    theirs = gradients(model, inputs)
    wide = clone(model)
    wide.get_base_model().config.sliding_window = None
    assert abs(wide(**inputs).loss - theirs[0]) > 1e-3  # the window matters
    lemo.apply(model, config("none", **phase))
    ours = gradients(model, inputs)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert_close(ours[1], theirs[1])


def test_gaps_are_tokens_left_out_within_a_document():
    def gaps(*rows):
        mask = torch.tensor(rows)
        return pack(Llama(), tuple(mask.shape), mask.device, 4, mask, None, {}).gaps

    assert gaps([0, 1, 1], [1, 1, 0]) is None
    assert gaps([0, 1, 1], [1, 0, 1]).tolist() == [1, 2, 3, 5]


def test_an_unknown_distance_is_an_error():
    attention = Attention(Llama(), None)
    q = torch.zeros(3, 2, 8)
    queries, keys = (PackedRows(torch.tensor([0, n], dtype=torch.int32), n) for n in (3, 5))
    with pytest.raises(ValueError, match="table_rows: expected the tokens of queries and of keys with a window"):
        attention.attend(q, q.new_zeros(5, 2, 8), q.new_zeros(5, 2, 8), queries, keys, AttentionOptions(1.0, window=4))


def test_exact_scores_know_the_window(model, chosen):
    """A layer's exact scores, recomputed: what lies outside every window does not count."""
    seen = []
    original = ops.block_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "block_scores", lambda *a, **k: seen.append(k) or original(*a, **k))
        lemo.apply(model, config("none", mode="skip", keep=0.5, policy="exact"))
        gradients(model, batch("packed"))
    assert seen == [
        {"window": WINDOW, "softcap": 0.0},
        {"window": 0, "softcap": SOFTCAP},
        {"window": WINDOW, "softcap": SOFTCAP},
    ]
