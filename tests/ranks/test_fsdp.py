"""FSDP2 over the layers: what one process computes by accumulation, with a part of the weights in each."""

from __future__ import annotations

import lemo
import pytest
import torch
from support import fsdp_jobs as jobs
from support.ddp_jobs import config, documents
from support.models import assert_close


def alone(case: dict, passes: int = 1) -> tuple[list[list[float]], dict[str, torch.Tensor]]:
    """Losses and mean gradients of both ranks' documents in this process, drawn as the ranks draw."""
    model = jobs.build(case.get("family", "llama"), case.get("trains", False))
    controller = lemo.apply(model, config(case["phase"], **case.get("options", {})))
    losses: list[list[float]] = []
    for rank in range(2):
        controller.data_rank = rank
        losses.append([])
        controller.seek(1)
        for i in range(passes):
            loss = model(**case.get("batch", documents)((rank + 2 * i) % 4)).loss / passes
            (loss / 2).backward()
            losses[-1].append(loss.item())
    return losses, jobs.gradients(model)


@pytest.mark.parametrize("name", [*jobs.CASES, "accumulated"])
def test_two_ranks_are_two_accumulated_passes(ranks, name):
    found = [result[name] for result in ranks(2, "support.fsdp_jobs.cases")]
    losses, expected = alone(jobs.CASES.get(name, jobs.CASES["dense"]), 2 if name == "accumulated" else 1)
    assert [f[0] for f in found] == [pytest.approx(loss, rel=1e-5) for loss in losses]
    for _, ours in found:
        # Alone, what no pass reached has no gradient; averaged, it is zero.
        assert all(not g.any() for n, g in ours.items() if n not in expected)
        assert_close({n: g for n, g in ours.items() if n in expected}, expected, 1e-5)


def test_weights_are_gathered_in_the_policys_dtype(ranks):
    _, expected = alone({"phase": lemo.Phase("dense")})
    for result in ranks(2, "support.fsdp_jobs.cases"):
        _, ours, dtypes = result["precision"]
        assert dtypes == {torch.float64}
        assert_close(ours, expected, 1e-5)


def test_what_is_refused_is_named(ranks):
    refused = ranks(2, "support.fsdp_jobs.cases")[0]["refused"]
    assert "layer that fully_shard was not called on" in refused["model alone"]
    assert "on modules inside the layer as well" in refused["inside"]
    assert "(ignored_params), although it trains" in refused["ignored"]
    assert "memory_budget, offload and recompute_layers with FSDP2" in refused["budget"]


@pytest.mark.parametrize("name", ["accelerated", "by PEFT"])
def test_models_divided_by_accelerate(ranks, name):
    losses, expected = alone({"phase": jobs.SKIP})
    for rank, result in enumerate(ranks(2, "support.fsdp_jobs.cases")):
        found, ours, notes = result[name]
        assert found == pytest.approx(losses[rank], rel=1e-5)
        assert_close(ours, expected, 1e-5)
        assert [n for n in notes if "whole model" in n] == notes and len(notes) == (name == "by PEFT")
