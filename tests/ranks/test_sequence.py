"""One sequence in several processes: loss and gradients are those of one process with the whole batch."""

from __future__ import annotations

import lemo
import pytest
from lemo.engine.families.base import ModelShape
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


def test_what_is_refused_is_named(ranks):
    for result in ranks(2, "support.sequence_jobs.all_cases"):
        refused = result["refused"]
        assert "were given different batches" in refused["other batches"]
        assert "Call the model with labels" in refused["no labels"]
        assert "a batch of 1 blocks cannot be divided among 2 processes" in refused["one block"]
        assert 'policy "exact" needs the queries and keys of all tokens' in refused["exact"]
        assert 'tile_policy "predictors" reads tiles of tokens that several' in refused["predicted tiles"]
        assert "return_logits=True" in refused["logits"]
        assert refused["budget"] == refused["offload"]
        assert "memory_budget, offload and recompute_layers plan without" in refused["budget"]


@pytest.mark.parametrize("name", jobs.DATA_PARALLEL)
def test_two_groups_of_two_with_data_parallelism(ranks, name):
    losses, expected = jobs.data_parallel_alone(jobs.DATA_PARALLEL[name])
    for rank, result in enumerate(ranks(4, "support.sequence_jobs.some_cases")):
        loss, ours = result["data parallel"][name]
        assert loss == pytest.approx(losses[rank // 2], rel=1e-5)
        assert_close(ours, expected, 2e-5)


def test_heads_that_cannot_be_divided_are_an_error():
    from lemo.engine.sequence import Group

    shape = ModelShape(layers=1, hidden=64, heads=12, kv_heads=4, head_dim=8, ffn=8, vocab=9)
    for n in (1, 2, 4, 12):
        Group(None, 0, n).check_heads(shape)
    for n in (3, 5, 6, 8):
        with pytest.raises(ValueError, match=f"12 heads and 4 key/value heads, which {n} processes cannot divide"):
            Group(None, 0, n).check_heads(shape)


def test_tokens_are_cut_between_blocks_into_even_parts():
    from lemo.engine.layout import Blocks
    from lemo.engine.sequence import Group, Share

    shares = [Share(Group(None, rank, 3), Blocks.from_lengths([20, 3, 40], 8)) for rank in range(3)]
    assert [(s.tokens.start, s.tokens.stop) for s in shares] == [(0, 20), (20, 39), (39, 63)]
    assert [s.own.lengths for s in shares] == [(20,), (3, 16), (24,)]
    assert [s.own.num_blocks for s in shares] == [3, 3, 3]
