"""What a family may bring that Llama and OPT do not have: auxiliary losses, norm offsets, soft-capped logits."""

import itertools
import types

import lemo
import lemo.engine.policies
import lemo.engine.step
import pytest
import torch
from lemo.engine.families import UnsupportedModelError
from lemo.engine.layout import select
from support import reference
from support.models import assert_close, batch, clone, gradients, reference_gradients
from support.pairs import pairs
from support.toy import Reference, balance, toy
from torch import nn

__all__ = ["toy"]
BLOCK = 8


MLP_ROWS = (8192, 16)  # the whole, pieces


@pytest.fixture
def mlp_rows(request, monkeypatch):
    monkeypatch.setattr(lemo.engine.step, "MLP_ROWS", request.param)


def settings(recompute="none", block=BLOCK, **phase):
    options = {"mode": "skip", "keep": 0.5, "policy": "random", **phase}
    return lemo.LemoConfig(block_size=block, recompute=recompute, phases=[lemo.Phase(**options)], seed=3)


def packed(inputs):
    """Packed ids and shifted targets of a padded batch, and its reference model's arguments."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:][mask]
    document = torch.arange(mask.shape[0])[:, None].expand(mask.shape)[mask]
    return inputs["input_ids"][mask], targets, torch.arange(mask.shape[1]).expand(mask.shape)[mask], document


@pytest.mark.parametrize(
    ("recompute", "keeps", "mlp_rows"),
    pairs(["none", "attention", "full"], [(0.5, None), (0.5, 0.25), (0.5, 1.0), (1.0, None)], MLP_ROWS),
    indirect=["mlp_rows"],
)
def test_skip(toy, recompute, keeps, mlp_rows, chosen):
    """Value and every gradient, the router's included, with the balance over the rows that the MLPs computed."""
    model, inputs = toy(), batch("right")
    plain = clone(model)
    keep, mlp_keep = keeps
    lemo.apply(model, settings(recompute, keep=keep, mlp_keep=mlp_keep))
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed(inputs)
    every, drawn = torch.arange(len(ids)), iter(chosen)
    lists = []
    for _ in range(3):
        attention = every if keep == 1 else next(drawn).rows.long()
        mlp = attention if mlp_keep is None else every if mlp_keep == 1 else next(drawn).rows.long()
        lists.append((attention, mlp))
    m = Reference(plain, positions, document)
    expected_loss = reference.skip(m, ids, targets, lists, everyone=True)  # the last norm trains
    assert [len(layer.mlp.seen[0]) for layer in m.decoder.layers] == [len(mlp) for _, mlp in lists]
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-5, atol=0)
    expected = reference_gradients(plain, expected_loss)
    assert sum("router" in name for name in expected) == 3
    assert_close(got, expected)


@pytest.mark.parametrize("mlp_rows", MLP_ROWS, indirect=True)
@pytest.mark.parametrize("weighted", [False, True])
def test_backward(toy, weighted, mlp_rows, chosen):
    """The balance is over all rows; its gradient reaches the kept ones, weighted like everything else."""
    model, inputs = toy(), batch("right")
    plain = clone(model)
    lemo.apply(model, settings(mode="backward", weighted=weighted))
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed(inputs)
    weights = [k.weights[k.row_slots.long()] for k in chosen] if weighted else None
    sizes = chosen[0].source.offsets[1:] - chosen[0].source.offsets[:-1]
    block = torch.repeat_interleave(torch.arange(chosen[0].source.num_blocks), sizes.long())

    class Weighted(Reference):
        def sums(self):
            """Every layer's MLP saw all rows without a graph, and then the kept ones."""
            found = []
            for i, layer in enumerate(self.decoder.layers):
                whole, kept = layer.mlp.seen
                w = torch.ones(len(kept)) if weights is None else weights[i]
                found.append(whole.sum(0) + (w[:, None] * (kept - kept.detach())).sum(0))
            return torch.stack(found)

    m = Weighted(plain, positions, document)
    expected_loss = reference.backward(m, ids, targets, [k.rows.long() for k in chosen], weights, block)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected_loss))


def test_the_expected_gradient_of_a_weighted_draw_is_the_dense_one(toy, monkeypatch):
    """Summed over every draw of two layers and two blocks."""
    model = toy(layers=2)
    ids = torch.randint(3, 80, (1, 8), generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": ids, "labels": ids}
    lemo.apply(model, settings(block=4, mode="dense", keep=None, policy=None))
    _, expected = gradients(model, inputs)
    lemo.remove(model)
    lemo.apply(model, settings("attention", block=4, mode="backward", weighted=True))
    plan: list[tuple[bool, ...]] = []

    def start(scores, blocks, **_):
        drawn = torch.tensor(plan.pop(0))
        if not drawn.any():
            return types.SimpleNamespace(finish=lambda: types.SimpleNamespace(num_blocks=0))
        kept = select(drawn.float(), blocks, mode="threshold", threshold=0.5, always_first=0)
        object.__setattr__(kept, "weights", torch.full((kept.blocks.shape[0],), 2.0))
        return types.SimpleNamespace(finish=lambda: kept)

    monkeypatch.setattr(lemo.engine.policies, "start", start)
    mean = {name: torch.zeros_like(g) for name, g in expected.items()}
    for first, second in itertools.product(itertools.product([False, True], repeat=2), repeat=2):
        plan[:] = [first, second]
        for name, g in gradients(model, inputs)[1].items():
            mean[name] += g / 16
    assert_close(mean, expected, 2e-5)


def test_layers_without_a_row_have_sums_of_zero(toy):
    model, inputs = toy(), batch("plain")
    lemo.apply(model, settings(keep=0.5, mlp_keep=0.0))
    loss, got = gradients(model, inputs)
    assert loss.isfinite() and got
    assert not any("router" in name for name in got)


def test_an_auxiliary_loss_that_is_switched_off(toy):
    model, inputs = toy(), batch("plain")
    lemo.apply(model, settings(keep=1.0))
    with_router, _ = gradients(model, inputs)
    model.get_base_model().config.router = False
    loss, _ = gradients(model, inputs)
    assert loss < with_router - 1  # the balance is about its coefficient, 3
    assert model(input_ids=inputs["input_ids"]).logits.requires_grad  # nothing is left out of another loss then


def test_a_loss_that_would_lack_the_auxiliary_one_is_refused(toy):
    model, inputs = toy(), batch("plain")
    lemo.apply(model, settings(keep=1.0))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM adds an auxiliary loss.*pass labels"):
        model(input_ids=inputs["input_ids"])


@pytest.mark.parametrize("return_logits", [False, True])
def test_soft_capped_logits(toy, return_logits):
    model, inputs = toy(router=False), batch("plain")
    plain = clone(model)
    config = settings(keep=1.0)
    config.return_logits = return_logits
    lemo.apply(model, config)
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed(inputs)
    m, every = Reference(plain, positions, document), torch.arange(len(ids))
    expected = reference.skip(m, ids, targets, [(every, every)] * 3)
    expected = expected - balance(m.sums())  # which the reference's loss holds
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected), 2e-5)


# --- trained parameters that no part of a layer uses ------------------------------------------------------------------

EXTRA = {
    "in an MLP": ("model.layers.1.mlp", "gain"),
    "in an attention": ("model.layers.1.self_attn", "gain"),
    "in a layer": ("model.layers.1", "gain"),
    "in a norm": ("model.layers.1.input_layernorm", "gain"),
    "in the last norm": ("model.norm", "gain"),
    "in the rotary embedding": ("model.rotary_emb", "gain"),
    "in the decoder": ("model", "gain"),
}


@pytest.mark.parametrize("where", EXTRA)
def test_a_trained_parameter_that_the_family_does_not_know_is_refused(toy, where):
    path, name = EXTRA[where]
    model = toy()
    module = model.get_base_model().get_submodule(path)
    setattr(module, name, nn.Parameter(torch.ones(())))
    with pytest.raises(
        UnsupportedModelError, match=rf"does not support {path}\.{name}: the parameter trains.*no gradient"
    ):
        lemo.apply(model, settings())
    getattr(module, name).requires_grad_(False)
    lemo.apply(model, settings())
    gradients(model, batch("plain"))
    getattr(module, name).requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match=rf"{path}\.{name}"):
        model(**batch("plain"))
