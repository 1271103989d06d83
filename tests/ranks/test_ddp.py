"""DistributedDataParallel and transformers' Trainer over it: what one process computes by accumulation."""

from __future__ import annotations

import lemo
import pytest
import torch
from support import ddp_jobs
from support.models import assert_close, tuned


def alone(case: dict, count: int, passes: int = 1) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses and mean gradients of all ranks' documents in this process, drawn as the ranks draw."""
    model = tuned("llama")
    controller = lemo.apply(model, ddp_jobs.config(case["phase"], **case.get("options", {})))
    losses: list[list[float]] = []
    for rank in range(count):
        controller.data_rank = rank
        losses.append([])
        controller.seek(1)
        for i in range(passes):
            loss = model(**case.get("batch", ddp_jobs.documents)((rank + 2 * i) % 4)).loss / passes
            (loss / count).backward()
            losses[-1].append(loss.item())
    return losses, ddp_jobs.gradients(model)


@pytest.mark.parametrize("name", [*ddp_jobs.CASES, "no_sync"])
def test_two_ranks_are_two_accumulated_passes(ranks, name):
    case, passes = ddp_jobs.CASES.get(name, {"phase": ddp_jobs.SKIP}), 2 if name == "no_sync" else 1
    found = [result[name] for result in ranks(2, "support.ddp_jobs.cases")]
    losses, expected = alone(case, 2, passes)
    assert [f[0] for f in found] == [pytest.approx(loss, rel=1e-5) for loss in losses]
    assert_close(found[0][1], found[1][1], 1e-7)
    ours = found[0][1]
    if name == "nothing kept in one":  # alone, what no pass reached has no gradient; averaged, it is zero
        assert all(not g.any() for n, g in ours.items() if n not in expected)
        ours = {n: g for n, g in ours.items() if n in expected}
    assert_close(ours, expected, 1e-5)


def test_four_ranks(ranks):
    found = ranks(4, "support.ddp_jobs.skip")
    _, expected = alone(ddp_jobs.CASES["skip"], 4)
    for result in found:
        assert_close(result[1], expected, 1e-5)


def test_ranks_may_run_out_of_batches_inside_join(ranks):
    """The one that ran out takes the others' steps."""
    first, second = (result["uneven"] for result in ranks(2, "support.ddp_jobs.cases"))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-6, atol=1e-7)


def test_the_trainer_keeps_ranks_in_step(ranks):
    first, second = ranks(2, "support.ddp_jobs.trainer")
    assert first["phase"] == second["phase"] == 1 and first["step"] == second["step"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), name
