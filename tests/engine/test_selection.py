"""Lists that nothing a layer computes decides, selected one layer before the host reads their sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lemo
import pytest
import torch
from lemo.engine import policies
from lemo.engine.layout import Blocks, select, start
from lemo.engine.policies import Policy, Random, StepContext, make_policy
from support.models import batch, gradients, tuned

LAYERS, BLOCK = 4, 8
WEIGHTED = lemo.Phase("backward", policy="random", weighted=True)
TWO_LISTS = lemo.Phase("skip", policy="random", keep=0.5, mlp_keep=0.25)
# Documents of whole blocks, and others.
WHOLE, RAGGED = (64, 32), (61, 35)


def begun(phase: lemo.Phase, lengths: tuple[int, ...] = RAGGED, shared: bool = False, **context: Any) -> Policy:
    policy = make_policy("random", {"shared": shared})
    options = {"layers": range(LAYERS), **context}
    blocks = Blocks.from_lengths(lengths, BLOCK)
    policy.begin(StepContext(blocks, phase, 9, 1, 0, lambda *_: None, lambda _: 1.0, **options))
    return policy


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The selections that are started, by what their errors would begin with."""
    found: list[str] = []

    def started(*args: Any, **how: Any) -> Any:
        found.append(how["chosen_by"].removesuffix(", policy 'random'"))
        return start(*args, **how)

    monkeypatch.setattr(policies, "start", started)
    return found


def starts(policy: Policy, events: list[str], layers: range | list[int] = range(LAYERS)) -> list[list[str]]:
    """What the choice of every layer starts."""
    found = []
    for i in layers:
        events.clear()
        policy.choose(i, torch.zeros(96, 4))
        found.append(list(events))
    return found


ONE_AHEAD = [["layer 0", "layer 1"], ["layer 2"], ["layer 3"], []]


@pytest.mark.parametrize(
    ("phase", "lengths"),
    [(WEIGHTED, WHOLE), (WEIGHTED, RAGGED), (lemo.Phase("skip"), RAGGED)],
    ids=["weighted", "weighted-ragged", "ragged"],
)
def test_the_next_layers_list_is_selected_with_a_layers(
    phase: lemo.Phase, lengths: tuple[int, ...], events: list[str]
) -> None:
    assert starts(begun(phase, lengths), events) == ONE_AHEAD


def test_both_lists_of_a_layer_are() -> None:
    """And are the same as if each was selected by itself."""
    ahead, alone = begun(TWO_LISTS), begun(TWO_LISTS, layers=())
    assert isinstance(ahead, Random)
    for i in range(LAYERS):
        pairs = [policy.choose(i, torch.zeros(96, 4)) for policy in (ahead, alone)]
        assert set(ahead._started) == ({i + 1} if i + 1 < LAYERS else set()) and not alone._started
        for one, other in zip(*pairs, strict=True):
            assert one is not None and other is not None
            assert torch.equal(one.rows, other.rows) and one.chosen_by == f"layer {i}, policy 'random'"
        assert pairs[0][0] is not pairs[0][1]


def test_only_layers_that_eliminate_have_lists(events: list[str]) -> None:
    assert starts(begun(WEIGHTED, layers=[1, 3]), events, [1, 3]) == [["layer 1", "layer 3"], []]


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(lambda: begun(lemo.Phase("skip"), WHOLE), id="sizes known"),
        pytest.param(lambda: begun(WEIGHTED, layers=()), id="layers unknown"),
        pytest.param(lambda: begun(lemo.Phase("skip"), required=torch.arange(13) == 5), id="labels"),
    ],
)
def test_each_list_is_selected_in_its_turn(policy: Any, events: list[str]) -> None:
    assert starts(policy(), events) == [[f"layer {i}"] for i in range(LAYERS)]


def test_one_list_for_all_layers_is_selected_once(events: list[str]) -> None:
    assert starts(begun(lemo.Phase("skip"), shared=True), events) == [["layer 0"], [], [], []]


@pytest.mark.parametrize("fault", [2, 0])
def test_a_fault_is_reported_at_its_layer(fault: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 2 is selected with layer 1, which has none."""
    original = Random.scores

    def scores(self: Random, layer: int, x: torch.Tensor) -> torch.Tensor:
        p = original(self, layer, x).clone()
        p[3] = torch.nan if layer == fault else p[3]
        return p

    monkeypatch.setattr(Random, "scores", scores)
    policy = begun(WEIGHTED)
    for i in range(fault):
        policy.choose(i, torch.zeros(96, 4))
    with pytest.raises(FloatingPointError, match=rf"layer {fault}, policy 'random': .*got nan for block 3"):
        policy.choose(fault, torch.zeros(96, 4))
    policy.begin(policy.context)  # another pass knows nothing of it
    assert not policy._started


def test_sizes_are_read_once_they_have_arrived() -> None:
    """As from a GPU, and so is a fault."""
    blocks = Blocks.from_lengths((16, 16), BLOCK)
    started = start(torch.full((4,), 0.5), blocks, mode="poisson", seed=1, chosen_by="layer 5")
    assert started.info is not None
    arriving, expected = torch.full_like(started.info, -7), started.finish()

    class Event:
        def __init__(self, info: torch.Tensor) -> None:
            self.info = info

        def synchronize(self) -> None:
            arriving.copy_(self.info)

    ours: Any = replace(started, info=arriving, arrived=Event(started.info))
    assert torch.equal(ours.finish().rows, expected.rows)
    fault = torch.tensor([0, 0, 0, 3], dtype=torch.int32)
    ours = replace(started, info=arriving, arrived=Event(fault))
    with pytest.raises(FloatingPointError, match="layer 5: scores: block 2 is not finite"):
        ours.finish()


def test_an_empty_draw_is_none() -> None:
    """Layer after layer, as without the layer ahead."""
    policy = begun(lemo.Phase("backward", policy="random", keep=0.1, weighted=True), (16,))
    drawn = [policy.choose(i, torch.zeros(16, 4))[0] for i in range(LAYERS)]
    assert not policy._started
    p = policy.scores(0, torch.zeros(16, 4))
    for i, kept in enumerate(drawn):
        alone = select(p, policy.context.blocks, mode="poisson", always_first=0, seed=policy.seed(i))
        assert alone.blocks.tolist() == ([] if kept is None else kept.blocks.tolist())
    assert None in drawn


@pytest.mark.parametrize("options", [{}, {"layers": [1, 2]}, {"offload": True}, {"recompute_layers": 2}], ids=str)
@pytest.mark.parametrize("phase", [WEIGHTED, TWO_LISTS], ids=["weighted", "two lists"])
def test_steps_are_the_same_bit_for_bit(phase: lemo.Phase, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for ahead in (True, False):
        if not ahead:
            monkeypatch.setattr(Policy, "_following", lambda self, layer: None)
        config = lemo.LemoConfig(block_size=BLOCK, phases=[phase], seed=3, recompute="attention", **options)
        lemo.apply(model := tuned("llama", layers=LAYERS), config)
        found.append(gradients(model, batch("packed")))
    (loss, grads), (other, theirs) = found
    assert torch.equal(loss, other) and all(torch.equal(theirs[n], g) for n, g in grads.items())
