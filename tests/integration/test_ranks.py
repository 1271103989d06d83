"""Several processes: what each draws for its own data, and what is the same in all of them."""

import lemo
import pytest
import torch
from support.models import batch, gradients, tuned

PHASES = [lemo.Phase("skip", keep=0.5, policy="random"), lemo.Phase("dense", share=0.5)]


def choices(steps=2, phases=PHASES[:1], change=None):
    """The kept blocks of every layer, in `steps` steps of two micro-batches; and the phase of every step."""
    model = tuned("llama")
    controller = lemo.apply(model, lemo.LemoConfig(block_size=8, phases=phases, seed=7))
    controller.total_steps = 6
    if change is not None:
        change(controller)
    policy = controller._policies[0]
    assert policy is not None
    lists, original = [], policy.choose

    def choose(layer, x):
        pair = original(layer, x)
        lists.append(tuple(pair[0].blocks.tolist()))
        return pair

    policy.choose = choose
    reached = []
    for _ in range(steps):
        for _ in range(2):
            gradients(model, batch("right"))
        reached.append(controller.report()["phase"])
        controller.step()
    return lists, reached


@pytest.fixture
def rank(monkeypatch):
    """Sets the rank of this process in a group of four."""

    def be(number):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: number)

    return be


def test_every_process_draws_for_its_own_data(rank):
    alone, _ = choices()
    found = []
    for number in range(4):
        rank(number)
        found.append(choices()[0])
    assert found[0] == alone  # the first draws what a single process draws
    for i in range(4):
        for j in range(i):
            same = sum(a == b for a, b in zip(found[i], found[j], strict=True))
            assert same < len(alone) / 2
    rank(2)
    assert choices()[0] == found[2]


def test_a_shared_draw_is_one_for_all_layers_of_each_process(rank):
    phase = lemo.Phase("skip", keep=0.5, policy="random", policy_options={"shared": True})
    found = []
    for number in range(2):
        rank(number)
        lists, _ = choices(phases=[phase])
        assert all(len(set(lists[i : i + 3])) == 1 for i in range(0, len(lists), 3))
        found.append(lists[::3])
    assert found[0] != found[1]


def test_processes_are_in_the_same_phase(rank):
    found = []
    for number in range(2):
        rank(number)
        found.append(choices(steps=6, phases=PHASES)[1])
    assert found[0] == found[1] == [0, 0, 0, 0, 1, 1]


def test_processes_that_share_a_batch_draw_the_same(rank):
    """As with tensor parallelism: they set one data_rank."""
    found = []
    for number in (2, 3):
        rank(number)
        found.append(choices(change=lambda c: setattr(c, "data_rank", 1))[0])
    rank(1)
    assert found[0] == found[1] == choices()[0]


def test_a_recomputation_repeats_the_draw_of_its_own_process(rank):
    model, inputs = tuned("llama"), batch("right")
    rank(3)
    controller = lemo.apply(model, lemo.LemoConfig(block_size=8, phases=PHASES[:1], seed=7))
    _, expected = gradients(model, inputs)
    controller.seek(0)
    loss = torch.utils.checkpoint.checkpoint(lambda **given: model(**given).loss, use_reentrant=False, **inputs)
    model.zero_grad()
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, expected[name], rtol=1e-5, atol=1e-7)
