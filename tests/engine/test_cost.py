"""The cost of a step by counting products."""

import lemo
import pytest
from lemo.engine.cost import PassShares, cost_ratio
from lemo.engine.families.base import ModelShape
from support.models import batch, gradients, tuned

SHAPE = ModelShape(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=1000)
ATTENTION, MLP, PAIR, HEAD = 64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 128, 2 * 4 * 16, 2 * 64 * 1000


def test_counts() -> None:
    """By hand: two documents, layers that keep different shares, everything recomputed."""
    tokens, pairs = 30, 10 * 11 / 2 + 20 * 21 / 2
    dense = 2 * (3 * tokens * (ATTENTION + MLP) + 4.5 * pairs * PAIR) + tokens * HEAD
    skip = sum(
        3 * tokens * (k * ATTENTION + m * MLP) + 4.5 * pairs * k * k * PAIR for k, m in ((0.5, 0.5), (0.25, 0.75))
    )
    shares = PassShares("skip", "full", (0.5, 0.25), (0.5, 0.75))
    assert cost_ratio(SHAPE, (10, 20), shares) == pytest.approx((skip + 0.75 * tokens * HEAD) / dense)


def test_layers_that_run_again_cost_their_forward_pass_twice() -> None:
    tokens, pairs = 10, 10 * 11 / 2
    dense = 2 * (3 * tokens * (ATTENTION + MLP) + 4.5 * pairs * PAIR) + tokens * HEAD
    half = dense - tokens * HEAD  # of two layers with everything, three passes of which are forward or as large
    once_more = tokens * (ATTENTION + MLP) + pairs * PAIR
    kept = PassShares("skip", "full", (0.5, 1.0), (0.5, 1.0), again=1)
    skip = half / 2 + 3 * tokens * 0.5 * (ATTENTION + MLP) + 4.5 * pairs * 0.25 * PAIR + tokens * HEAD
    skip += tokens * 0.5 * (ATTENTION + MLP) + pairs * 0.25 * PAIR
    assert cost_ratio(SHAPE, (10,), kept) == pytest.approx(skip / (dense + once_more))


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_the_dense_step_is_1_and_others_are_in_between(recompute) -> None:
    def ratio(mode: str, kept: float, **options: object) -> float:
        shares = PassShares(mode, recompute, (kept,) * 2, (kept,) * 2, **options)
        return cost_ratio(SHAPE, (400,), shares)

    assert ratio("dense", 1.0) == ratio("skip", 1.0) == ratio("sparse", 1.0, density=(1.0, 1.0)) == 1.0
    assert ratio("skip", 0.5) < ratio("backward", 0.5) < 1.0
    assert ratio("sparse", 1.0, density=(0.25, 0.25)) < 1.0


def test_a_report_has_it() -> None:
    model = tuned("llama")
    controller = lemo.apply(model, lemo.LemoConfig(block_size=8, phases=[lemo.Phase("skip", policy="random")]))
    assert controller.report()["cost_ratio"] is None
    gradients(model, batch("right"))
    assert 0.2 < controller.report()["cost_ratio"] < 0.9
