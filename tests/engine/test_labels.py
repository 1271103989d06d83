"""Answer-only labels: blocks that carry labels stay, whatever their score and the budget."""

import lemo
import lemo.engine.policies
import pytest
import torch
from support.models import VOCAB, gradients, tuned

BLOCK, TOKENS = 8, 96


@pytest.fixture
def chosen(monkeypatch):
    lists = []
    original = lemo.engine.policies.Policy.choose
    monkeypatch.setattr(
        lemo.engine.policies.Policy, "choose", lambda self, i, x: lists.append(original(self, i, x)) or lists[-1]
    )
    return lists


def answers(*spans):
    torch.manual_seed(3)
    ids = torch.randint(3, VOCAB, (1, TOKENS))
    labels = torch.full_like(ids, -100)
    for start, end in spans:
        labels[0, start:end] = ids[0, start:end]
    return {"input_ids": ids, "labels": labels}


def run(batch, policy="random", keep=0.25, **options):
    model = tuned("llama")
    phase = lemo.Phase("skip", keep=keep, policy=policy)
    lemo.apply(model, lemo.LemoConfig(block_size=BLOCK, phases=[phase], **options))
    return gradients(model, batch)


@pytest.mark.parametrize("policy", ["random", "sampled", "update_norm", "exact"])
def test_blocks_with_labels_are_kept_in_every_layer(policy, chosen):
    # The token before an answer predicts its first token, so its block counts too: token 39 in block 4.
    run(answers((40, 44), (90, 96)), policy)
    assert len(chosen) == 3
    for attention, mlp in chosen:
        assert attention is mlp
        assert {4, 5, 11} <= set(attention.blocks.tolist())
        assert attention.num_blocks == 4  # within the budget of 3 blocks where it can be: the first is forced


def test_the_list_grows_where_labels_exceed_the_budget(chosen):
    run(answers((40, 80)))
    for attention, _ in chosen:
        assert set(attention.blocks.tolist()) >= {0, 4, 5, 6, 7, 8, 9}
        assert attention.rows.tolist() == [t for b in attention.blocks.tolist() for t in range(8 * b, 8 * b + 8)]


@pytest.mark.parametrize("policy", ["random", "sampled", "update_norm"])
def test_keeping_nothing_still_keeps_the_labels(policy, chosen):
    _, got = run(answers((40, 44)), policy, keep=0.0)
    assert [kept.blocks.tolist() for kept, _ in chosen] == [[4, 5]] * 3
    assert all(bool(g.any()) for g in got.values())
    chosen.clear()
    run(answers((40, 44)), policy, keep=0.0, keep_labelled=False)
    assert chosen == [(None, None)] * 3


def test_a_list_of_its_own_for_the_mlp_keeps_the_labels(chosen):
    model = tuned("llama")
    phase = lemo.Phase("skip", keep=0.25, mlp_keep=0.0, policy="random")
    lemo.apply(model, lemo.LemoConfig(block_size=BLOCK, phases=[phase]))
    gradients(model, answers((40, 44)))
    for attention, mlp in chosen:
        assert attention.num_blocks == 3
        assert mlp.blocks.tolist() == [4, 5]


def test_off_where_most_tokens_are_labelled_unless_asked_for(chosen):
    batch = answers((0, 60))
    run(batch)
    assert all(kept.num_blocks == 3 for kept, _ in chosen)
    chosen.clear()
    run(batch, keep_labelled=True)
    assert all(set(range(8)) <= set(kept.blocks.tolist()) for kept, _ in chosen)
    chosen.clear()
    run(answers((40, 44)), keep_labelled=False)
    assert all(kept.num_blocks == 3 for kept, _ in chosen)


def test_every_answer_sends_a_gradient():
    """With the labels of one answer only, the gradient is never zero, whichever blocks the seed draws."""
    for seed in range(6):
        _, got = run(answers((50, 53)), seed=seed)
        assert all(bool(g.any()) for g in got.values())


def test_the_option_is_checked():
    with pytest.raises(ValueError, match="keep_labelled"):
        lemo.LemoConfig(keep_labelled="sometimes")
