"""Segments of layers that run again from the stream before them: equal results, lists replayed, bytes as planned.

And what the backward pass of a long layer does in pieces, so that a segment fits.
"""

import sys

import lemo
import lemo.engine.backward
import lemo.engine.memory
import lemo.engine.step
import pytest
import torch
from lemo.engine import budget
from lemo.engine.budget import LayerLists, ListSize, Needs
from lemo.engine.memory import LayerShape
from lemo.engine.records import Records
from lemo.engine.tiles import TileChooser
from support.models import ATTENTION, base, batch, gradients, lora, tuned
from support.peak import peak_bytes

LAYERS, BLOCK = 5, 8
PHASES = {
    "dense": {"mode": "dense"},
    "skip": {"policy": "update_norm"},
    "two-lists": {"policy": "random", "mlp_keep": 0.25},
    "nothing-for-attention": {"policy": "random", "keep": 0.0, "mlp_keep": 0.5},
    "weighted": {"mode": "backward", "weighted": True},
}


def settings(phase="skip", **options):
    return lemo.LemoConfig(block_size=BLOCK, phases=[lemo.Phase(**PHASES[phase])], seed=3, **options)


def equal(one, other):
    (loss, grads), (theirs, others) = one, other
    assert torch.equal(loss, theirs)
    assert grads.keys() == others.keys() and all(torch.equal(others[n], g) for n, g in grads.items())


# --- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("recompute", ["full", "attention", "none"])
def test_results_are_those_without(phase, recompute):
    """Bit for bit, of packed documents, also with rows and streams in host memory."""
    inputs, found = batch("packed"), []
    moved = {} if recompute == "none" and phase != "weighted" else {"offload": True}
    ways = [{}, {"recompute_layers": 2, **moved}]
    if recompute == "full":
        ways += [{"recompute_layers": 3, "offload": 2}, {"recompute_layers": True}]
    for way in ways:
        controller = lemo.apply(model := tuned("llama", layers=LAYERS), settings(phase, recompute=recompute, **way))
        found.append(gradients(model, inputs))
        if way:
            assert sum(controller.report()["memory"]["segments"]) == LAYERS or way["recompute_layers"] is True
            memory = controller.savings._host
            assert len(memory._free) == memory.chunks and bool(memory.chunks) == ("offload" in way)
    assert found[0][1] or phase == "nothing-for-attention"  # its adapters are there
    for other in found[1:]:
        equal(found[0], other)


def test_tiles_and_lists_are_chosen_once(monkeypatch):
    """Documents of several tiles, on both sides of a segment's end."""
    ids = torch.randint(3, 80, (1, 640), generator=torch.Generator().manual_seed(0))
    chosen: list[int] = []
    choose = TileChooser._choose
    monkeypatch.setattr(TileChooser, "_choose", lambda self, rows: chosen.append(rows.layer) or choose(self, rows))
    found = []
    for again in (False, 2):
        phase = lemo.Phase("sparse", keys=256, local=0, keep=0.8)
        options = {"block_size": 64, "phases": [phase], "recompute_layers": again, "recompute": "full"}
        model = tuned("llama", layers=4, max_position_embeddings=1024)
        controller = lemo.apply(model, lemo.LemoConfig(**options))
        found.append(gradients(model, {"input_ids": ids, "labels": ids}))
        assert min(controller.report()["density"]) < 1 and chosen == [0, 1, 2, 3]
        chosen.clear()
    equal(*found)


@pytest.mark.parametrize("recompute", ["full", "none"])
def test_dropout_is_the_same_again(recompute):
    inputs, found = batch("packed"), []
    for again in (False, 2):
        model = tuned("llama", layers=4)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = torch.nn.Dropout(0.3)
        lemo.apply(model, settings("dense", recompute=recompute, recompute_layers=again))
        torch.manual_seed(6)
        found.append(gradients(model, inputs))
    equal(*found)


def test_two_passes_in_flight_have_their_own_streams():
    inputs, found = batch("packed"), []
    for again in (False, 2):
        lemo.apply(model := tuned("llama", layers=4), settings("dense", recompute="full", recompute_layers=again))
        first, second = model(**inputs).loss, model(**inputs).loss
        first.backward()
        second.backward()
        found.append((first + second, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    equal(*found)


def test_an_auxiliary_loss_is_counted_once():
    inputs, found = batch("packed"), []
    for again in (False, 2):
        model = tuned("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.3)
        lemo.apply(model, settings("dense", recompute="full", recompute_layers=again))
        found.append(gradients(model, inputs))
    equal(*found)


@pytest.mark.parametrize("phase", ["dense", "two-lists"])
def test_streams_before_segments_are_all_that_is_saved(phase, monkeypatch):
    """Streams and rows that are there at a time, against the plan."""
    most: list[int] = []

    def counted(name):
        original = getattr(Records, name)

        def call(self, *given):
            found = original(self, *given)
            held = sum(s.x_kept.nbytes for s in self._streams) + sum(r.x_kept.nbytes for r in self._records)
            most.append(held + (found.x_kept.nbytes if name == "pop" and found is not None else 0))
            return found

        monkeypatch.setattr(Records, name, call)

    for name in ("put", "put_stream", "pop"):
        counted(name)
    ids = torch.randint(3, 80, (1, 64))
    controller = lemo.apply(model := tuned("llama", layers=6), settings(phase, recompute="full", recompute_layers=2))
    gradients(model, {"input_ids": ids, "labels": ids})
    plan, n = controller.savings.plan, controller.savings.needs(controller.phase, (64,), 4)
    lists = sum(n.of(i, "full").others for i in range(6))
    assert plan.segments == (2, 2, 2) and max(most) == plan.saved - lists
    if phase == "dense":
        assert max(most) == 4 * n.stream


# --- plans ------------------------------------------------------------------------------------------------------------

SHAPE = LayerShape(8, 4096, 32, 8, 128, 14336, 128256, lora={"q": 8, "k": 8, "v": 8, "o": 8})


def needs(kept=1.0):
    rows = int(16384 * kept)
    lists = LayerLists(ListSize(rows, 1, rows, rows // 64, kept == 1.0))
    phase = lemo.Phase("dense") if kept == 1.0 else lemo.Phase(keep=kept)
    return Needs((SHAPE,) * 8, (lists,) * 8, phase, tokens=16384, weights=16 << 30)


def test_the_budget_lets_as_few_layers_run_again_as_it_needs():
    n = needs()
    full, least = budget.fixed(n, "full").peak, budget.fixed(n, "full", again=True)
    assert budget.choose(n, full).segments == ()
    # Of 8 streams and rows, 4 are there at a time, in segments that grow shorter.
    assert least.segments == (4, 2, 2) and full - least.peak == 4 * n.stream
    before = 0
    for size in range(full - 1, least.peak, -(n.stream // 3)):
        plan = budget.choose(n, size)
        assert plan.peak <= size and plan.again >= before and sum(plan.segments) == 8
        before = plan.again
    assert budget.choose(n, least.peak).peak == least.peak
    with pytest.raises(ValueError, match="with everything recomputed, in segments of layers that run again"):
        budget.choose(n, least.peak - 1)
    with pytest.raises(ValueError, match=r'let layers run again in segments \(recompute_layers="auto"'):
        budget.choose(n, full - 1, again=False)


def test_offload_comes_first_and_stays_within_its_limit():
    n = needs()
    size = budget.fixed(n, "full").peak - n.stream
    plan = budget.choose(n, size, "auto")
    assert plan.again == 0 and plan.offloaded and "run again" not in str(plan)
    for streams in (0, 1, 2):
        plan = budget.choose(n, size - 2 * n.stream, f"{max(1, streams * n.stream)}B")
        assert plan.host <= streams * n.stream and plan.peak <= size - 2 * n.stream
        assert plan.again and "run again" in str(plan)


def test_a_stream_of_all_tokens_costs_more_than_the_rows_of_few():
    assert budget.fixed(needs(0.1), "full", again=True).segments == ()
    assert budget.fixed(needs(0.1), "full", again=3).segments == (2, 3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute_layers": 1}, "at least 2; got 1"),
        ({"recompute_layers": -2}, "at least 2; got -2"),
        ({"recompute_layers": "all"}, "LemoConfig.recompute_layers must be"),
        ({"offload": "64", "memory_budget": "1GiB"}, "expected a unit, like 100GiB; got '64'"),
        ({"offload": "64GiB"}, "as few layers as memory_budget needs"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        lemo.LemoConfig(**options)


def test_combinations_that_cannot_work(caplog):
    from torch.utils.checkpoint import checkpoint

    model = tuned("llama")
    with pytest.raises(ValueError, match="recompute_layers: the model has 3 layers; got 4"):
        lemo.apply(model, lemo.LemoConfig(recompute_layers=4))
    lemo.apply(model, settings("dense", recompute="full", recompute_layers=2))
    checkpoint(lambda: model(**batch("plain")).loss, use_reentrant=False).backward()
    assert "recompute_layers is off inside an activation checkpoint" in caplog.text


# --- peaks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(monkeypatch):
    """Every layer is a long one."""
    monkeypatch.setattr(sys.modules["lemo.ops.attention"], "HEADS_BYTES", 1)
    for module in (lemo.engine.step, lemo.engine.memory):
        monkeypatch.setattr(module, "MLP_ROWS", 64)
    for module in (lemo.engine.backward, lemo.engine.memory):
        monkeypatch.setattr(module, "SEPARATE_BYTES", 1)


@pytest.mark.parametrize(("phase", "again"), [("dense", 2), ("skip", False), ("backward", 2)])
def test_peaks_are_those_of_the_estimate(phase, again, pieces, monkeypatch):
    """All that is allocated at a time, in proportions like those of a long context. (Attention's workspace is larger on
    the CPU than on a GPU: with 16 heads, one of which is worked on at a time, by 3 % of the whole.)"""
    monkeypatch.setattr(lemo.engine.memory, "_LOSS_BYTES", 0)
    sizes = {"hidden_size": 256, "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 512}
    model = lora(base("llama", layers=4, **sizes, max_position_embeddings=1024), ATTENTION["llama"]).train()
    phases = [lemo.Phase(phase, policy=None if phase == "dense" else "random")]
    config = lemo.LemoConfig(phases=phases, recompute="full", recompute_layers=again)
    lemo.apply(model, config)
    ids = torch.randint(3, 80, (1, 1024))

    def run():
        model(input_ids=ids, labels=ids).loss.backward()

    run()
    found = lemo.estimate(model, config, 1024, element=4, lora_rank=4)["phases"][0]
    assert bool(found["segments"]) == bool(again)
    assert peak_bytes(run) == pytest.approx(found["saved"] + found["working"], rel=0.05)


@pytest.mark.parametrize(("family", "phase"), [("llama", "dense"), ("phi3", "weighted"), ("gpt_oss", "two-lists")])
def test_long_layers_go_backward_in_pieces(family, phase, request, monkeypatch):
    """A few heads of attention at a time, and projections in chunks of rows: gradients as of a layer that saves all."""
    inputs, found, separate = batch("packed"), [], []
    by_parts = lemo.engine.backward._by_parts
    monkeypatch.setattr(lemo.engine.backward, "_by_parts", lambda *a: separate.append(a) or by_parts(*a))
    for recompute in ("none", "attention", "full"):
        lemo.apply(model := tuned(family), settings(phase, recompute=recompute))
        found.append(gradients(model, inputs))
        request.getfixturevalue("pieces")
    assert bool(separate) == (phase != "two-lists")
    (loss, grads), *others = found
    for other, theirs in others:
        torch.testing.assert_close(other, loss)
        assert theirs.keys() == grads.keys()
        for name, gradient in grads.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
