"""One sequence in several processes: loss and gradients are those of one process with the whole batch."""

from __future__ import annotations

import lemo
import pytest
from support import sequence_jobs as jobs
from support.models import assert_close


def same(found: dict, case: dict, tolerance: float = 2e-5) -> None:
    alone = jobs.run(case, None)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found["kept"] == alone["kept"] and found["mlp_kept"] == alone["mlp_kept"]
    assert found["density"] == pytest.approx(alone["density"])
    assert found["loss_tokens"] == alone["loss_tokens"]
    assert_close(found["gradients"], alone["gradients"], tolerance)


@pytest.mark.parametrize("name", jobs.CASES)
def test_two_processes(ranks, name):
    for result in ranks(2, "support.sequence_jobs.all_cases"):
        same(result[name], jobs.CASES[name])


@pytest.mark.parametrize("name", jobs.FOUR)
def test_four_processes_with_two_key_heads(ranks, name):
    for result in ranks(4, "support.sequence_jobs.some_cases"):
        same(result[name], jobs.CASES[name])


def test_a_process_may_have_no_row_of_a_list(ranks):
    case = {"phase": lemo.Phase("skip", keep=0.1, policy="random"), "batch": jobs.few}
    for result in ranks(4, "support.sequence_jobs.some_cases"):
        same(result["few"], case)
