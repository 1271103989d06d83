"""Mixtures of experts: the router's loss, rows that go to few experts, adapters that are refused, and the operator."""

from dataclasses import replace

import lemo
import lemo.engine.policies
import pytest
import torch
import torch.nn.functional as F
from lemo.engine.cost import PassShares, cost_ratio
from lemo.engine.experts import Stacked, clamped_swiglu, experts, route
from lemo.engine.families import UnsupportedModelError
from lemo.engine.memory import layer_shape
from support import own_layers
from support.models import assert_close, base, batch, clone, gradients, lora, tuned
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

FAMILY = "qwen3_moe"
ROUTERS = {"qwen3_moe": ("mlp.gate.weight", 2), "gpt_oss": ("mlp.router.weight", 3)}  # and how many layers have one
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 3.0}


def settings(mode="dense", recompute="none", **phase):
    return lemo.LemoConfig(block_size=8, recompute=recompute, phases=[lemo.Phase(mode, **phase)], seed=3)


def routers_give_logits():
    """transformers before 5.1 normalizes them twice in its loss."""
    router = Qwen3MoeTopKRouter(base(FAMILY).config)
    router.weight.data.normal_()
    logits = router(torch.randn(3, router.hidden_dim))[0]
    return not torch.allclose(logits.sum(-1), torch.ones(3))


@pytest.mark.parametrize("options", [{"norm_topk_prob": False}, {"num_experts_per_tok": 1}, {"decoder_sparse_step": 2}])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_kinds_of_routers(options, recompute):
    model, inputs = tuned(FAMILY, **options), batch("right")
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings(recompute=recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("family", ROUTERS)
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("trained", [False, True])
def test_the_routers_loss(family, recompute, trained):
    if family == FAMILY and not routers_give_logits():
        pytest.skip("transformers' own loss is over probabilities of probabilities")
    model, inputs = tuned(family, **ROUTED), batch("right")
    router, layers = ROUTERS[family]
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or (trained and router in name))
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings(recompute=recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
    assert sum(router in name for name in got) == layers * trained
    model.get_base_model().config.output_router_logits = False
    assert (ours - gradients(model, inputs)[0]) > 1  # the balance is about its coefficient


def test_the_routers_loss_is_over_kept_rows(chosen):
    """In mode "skip": of the router's statistics over the rows that its layer kept."""
    model, inputs = tuned(FAMILY, **ROUTED), batch("plain")
    controller = lemo.apply(model, settings("skip", keep=0.5, policy="random"))
    with_router, _ = gradients(model, inputs)
    lemo.remove(model)
    plain = clone(model)
    plain.get_base_model().config.output_router_logits = False
    seen = []
    for layer in plain.get_base_model().model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.register_forward_pre_hook(lambda m, args: seen.append(F.linear(args[0][0], m.gate.weight)))
    ids = inputs["input_ids"].flatten()
    targets = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].flatten()
    positions, document = torch.arange(37).repeat(3), torch.arange(3).repeat_interleave(37)
    m = own_layers.Model(plain, positions, document)
    with torch.no_grad():
        expected = own_layers.skip(m, ids, targets, [k.rows.long() for k in chosen])
    logits = torch.cat(seen[2:4])  # after those of the embedding's run, before those of the loss
    assert len(logits) == sum(chosen[i].num_rows for i in (0, 2))
    p = logits.softmax(-1)
    chosen = F.one_hot(p.topk(2).indices, 5).sum(1).float()
    balance = 3.0 * 5 * (p.mean(0) * chosen.mean(0)).sum()
    torch.testing.assert_close(with_router, expected + balance, rtol=1e-5, atol=0)
    assert controller.kept_ratios != [1.0] * 3


def test_the_argument_that_asks_for_router_logits():
    model, inputs = tuned(FAMILY), batch("plain")
    lemo.apply(model, settings())
    with pytest.raises(ValueError, match=r"output_router_logits=True .* set it in the model's configuration"):
        model(**inputs, output_router_logits=True)
    model.get_base_model().config.output_router_logits = True
    model(**inputs, output_router_logits=True).loss.backward()


@pytest.mark.parametrize("family", ROUTERS)
def test_adapters_of_experts_are_refused(family):
    model = lora(base(family), [], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(UnsupportedModelError, match=r"adapters of experts \(model\.layers\.0\.mlp\.experts\).*q_proj"):
        lemo.apply(model, settings())


@pytest.mark.parametrize("width", [24, 12])
@pytest.mark.parametrize("count", [2, 8])
def test_against_a_sum_over_experts(width, count):
    """Some experts have no row; widths that the kernels do not divide are computed by torch."""
    g = torch.Generator().manual_seed(count)
    h = torch.randn(9, 16, generator=g).requires_grad_()
    logits = torch.randn(9, count, generator=g).requires_grad_()
    gate_up, down = torch.randn(count, 2 * width, 16, generator=g), torch.randn(count, 16, width, generator=g)
    _, index, weights = route(logits, 2, True)
    dy = torch.randn(9, 16, generator=g)
    stacked = Stacked(gate_up.transpose(1, 2), down.transpose(1, 2))
    ours = experts(h, index, weights, stacked)
    got = torch.autograd.grad(ours, (h, logits), dy, retain_graph=True)
    gate, up = torch.einsum("md,efd->emf", h, gate_up).chunk(2, -1)
    every = torch.einsum("emf,edf->emd", F.silu(gate) * up, down)
    dense = torch.zeros(9, count).scatter(1, index, weights)
    expected = torch.einsum("me,emd->md", dense, every)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(experts(h, index, weights, stacked, want_output=False), torch.zeros(9, 16))
    for a, b in zip(got, torch.autograd.grad(expected, (h, logits), dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_clamped_gates_are_transformers_own():
    """gpt-oss's, whatever is clamped: values and gradients, in its own layout."""
    mixture = base("gpt_oss").model.layers[0].mlp.experts
    mixture.limit = 1.0
    gate = clamped_swiglu(mixture.alpha, mixture.limit)
    inner = (mixture.limit * torch.randn(7, 2 * mixture.intermediate_size)).requires_grad_()
    expected = mixture._apply_gate(inner)
    assert 0.1 < (inner[:, 1::2].abs() > mixture.limit).float().mean() < 0.9
    torch.testing.assert_close(gate.product(inner.detach()), expected.detach())
    dy = torch.randn_like(expected)
    torch.testing.assert_close(gate.gradient(dy, inner.detach()), torch.autograd.grad(expected, inner, dy)[0])


def test_the_cost_of_experts_is_that_of_the_ones_that_a_row_takes():
    """As of an MLP as wide as these together, and the router; in a model whose layers are of both kinds."""
    shape = layer_shape(base(FAMILY).config)
    assert shape.experts is not None
    wide = replace(shape, experts=None, ffn=2 * shape.experts.ffn)
    shares = PassShares("skip", "none", (0.5,), (0.25,))
    sparse, dense = (replace(s, layers=1, vocab=1) for s in (shape.at(0), wide))
    router = shape.hidden * shape.experts.count / (3 * shape.hidden)  # as so many columns of an MLP
    dense = replace(dense, ffn=dense.ffn + router)
    assert cost_ratio(sparse, [64], shares) == pytest.approx(cost_ratio(dense, [64], shares))
    both = PassShares("skip", "none", (0.5,) * 3, (0.5,) * 3)
    assert 0.25 < cost_ratio(shape, [64], both) < 0.5
