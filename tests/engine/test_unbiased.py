"""Weighted mode "backward": the expected gradient is the dense one, exactly, by summing over every possible draw."""

import dataclasses
import itertools
from types import SimpleNamespace

import lemo
import lemo.engine.policies
import pytest
import torch
from lemo.engine.layout import Blocks, Kept, select
from lemo.engine.policies import StepContext, probabilities
from lemo.training.settings import parse_schedule
from support.models import LAYERS, LINEARS, VOCAB, base, gradients, lora

BLOCK = 4


class Draws:
    """Stands in for `start`: layer after layer the subsets it is given, and the probability that they are drawn."""

    def __init__(self) -> None:
        self.plan: list[tuple[bool, ...]] = []
        self.probability = 1.0

    def __call__(self, scores: torch.Tensor, blocks: Blocks, *, mode: str, **_: object) -> SimpleNamespace:
        assert mode == "poisson"
        drawn = torch.tensor(self.plan.pop(0))
        self.probability *= float(torch.where(drawn, scores.double(), 1 - scores.double()).prod())
        if not drawn.any():
            nothing = dataclasses.replace(Kept.everything(blocks), num_blocks=0)
            return SimpleNamespace(finish=lambda: nothing)
        kept = select(drawn.float(), blocks, mode="threshold", threshold=0.5, always_first=0)
        weighted = dataclasses.replace(kept, weights=1 / scores[kept.blocks.long()])
        return SimpleNamespace(finish=lambda: weighted)


def inputs(lengths):
    torch.manual_seed(5)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": positions, "use_cache": False}


@pytest.mark.parametrize(
    ("family", "lengths", "layers", "keep", "policy", "options", "recompute"),
    [
        # The subsets of every layer are combined with those of every other.
        *((family, [8], 3, 0.5, "random", {}, "attention") for family in LAYERS),
        *((family, [11], 2, 0.4, "sampled", {"source": "exact"}, "none") for family in LAYERS),
        ("llama", [7, 2], 2, 0.5, "random", {}, "none"),
        *((family, [10], 2, 0.5, "random", {}, "full") for family in LAYERS),
        # Documents of one and two blocks, where forced blocks would use up the budget.
        ("opt", [4, 8], 2, 0.5, "random", {}, "none"),
        ("opt", [5], 2, 0.3, "random", {}, "none"),
        ("llama", [16], 1, 0.9, "random", {}, "none"),
    ],
)
def test_the_expected_gradient_is_the_dense_one(family, lengths, layers, keep, policy, options, recompute, monkeypatch):
    model, batch = lora(base(family, layers), LINEARS[family]).train(), inputs(lengths)
    lemo.apply(model, lemo.LemoConfig(block_size=BLOCK, phases=[lemo.Phase("dense")]))
    _, expected = gradients(model, batch)
    lemo.remove(model)
    phase = lemo.Phase("backward", keep=keep, weighted=True, policy=policy, policy_options=options)
    lemo.apply(model, lemo.LemoConfig(block_size=BLOCK, phases=[phase], recompute=recompute))
    draws = Draws()
    monkeypatch.setattr(lemo.engine.policies, "start", draws)
    blocks = Blocks.from_lengths(lengths, BLOCK).num_blocks
    mean = {name: torch.zeros_like(g, dtype=torch.float64) for name, g in expected.items()}
    total = 0.0
    for plan in itertools.product(itertools.product([False, True], repeat=blocks), repeat=layers):
        draws.plan, draws.probability = list(plan), 1.0
        _, got = gradients(model, batch)
        assert set(got) == set(expected)  # zeros, not nothing, where nothing was drawn
        total += draws.probability
        for name, g in got.items():
            mean[name] += draws.probability * g.double()
    assert total == pytest.approx(1.0, abs=1e-6)
    for name, g in expected.items():
        error = (mean[name] - g).norm() / g.norm()
        assert error < 2e-5, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("floor", [0.3, 1.0])
def test_weighted_probabilities_spend_the_budget_and_leave_no_block_out(first, keep, floor):
    blocks = Blocks.from_lengths(range(1, 40), 1)
    phase = lemo.Phase("backward", keep=keep, weighted=True, policy="sampled")
    context = StepContext(blocks, phase, 0, first, 0, lambda *_: None, lambda _: 1.0)
    scores = torch.rand(blocks.num_blocks, generator=torch.Generator().manual_seed(0))
    p = probabilities(scores, context, keep, floor=floor)
    per_document = p.double().split(list(blocks.blocks_per_document))
    for n, document in enumerate(per_document, 1):
        torch.testing.assert_close(float(document.sum()), keep * n, rtol=1e-3, atol=2e-3 * n)
        assert float(document.min()) >= 0.49 * floor * keep
        if 2 * min(first, n) <= keep * n:  # forced blocks are certain where they leave half of the budget to others
            assert bool((document[: min(first, n)] == 1).all())


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_score_that_is_not_finite_is_reported_not_averaged(number, weighted):
    blocks = Blocks.from_lengths([40], 4)
    phase = lemo.Phase("backward", weighted=weighted, policy="sampled")
    context = StepContext(blocks, phase, 0, 1, 0, lambda *_: None, lambda _: 1.0)
    scores = torch.arange(1.0, 11.0)
    scores[4] = number
    p = probabilities(scores, context, 0.5, floor=0.1)
    assert p.isfinite().tolist() == [i != 4 for i in range(10)]
    others = p[[1, 2, 3, 5, 6, 7, 8, 9]]
    assert bool((others[1:] > others[:-1]).all())
    policy = lemo.engine.policies.make_policy("sampled", {})
    policy.begin(context)
    policy.source.scores = lambda layer, x: scores  # type: ignore[attr-defined]
    with pytest.raises(FloatingPointError, match=r"layer 7, policy 'sampled'.*block 4"):
        policy.choose(7, torch.zeros(40, 4))


def test_weights_that_would_not_hold_are_refused():
    phase = {"mode": "backward", "weighted": True, "policy": "random"}
    with pytest.raises(ValueError, match=r"keep must be above 0"):
        lemo.Phase(keep=0.0, **phase)
    with pytest.raises(ValueError, match="separate draw in every layer"):
        lemo.Phase(policy_options={"shared": True}, **phase)
    with pytest.raises(ValueError, match=r"phase 'backward:0.5:random:shared:weighted'.*separate draw"):
        parse_schedule("backward:0.5:random:shared:weighted")
    with pytest.raises(ValueError, match="weighted"):
        lemo.Phase("backward", weighted=True, policy="update_norm")
