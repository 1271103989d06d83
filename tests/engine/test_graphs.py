"""Passes that run as graphs: the same numbers as without, and no graph where it could not have them.

A tape of operators stands in for CUDA graphs (`support.tape`): it repeats what was recorded with the memory it was
recorded with, as a graph does. tests/engine/test_cuda_engine.py has the real ones.
"""

from __future__ import annotations

import gc
import logging
from typing import Any

import lemo
import pytest
import torch
from lemo.engine import layout
from lemo.engine.segments import Segment
from lemo.integration import graphs
from lemo.integration.graphs import Graphs
from peft import LoraConfig, get_peft_model
from support.models import ATTENTION, base, lora
from support.tape import Recorder
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

DENSE = lemo.Phase("dense")
SHARED = lemo.Phase("skip", policy="random", policy_options={"shared": True})
UPDATES = lemo.Phase("skip", policy="update_norm")


@pytest.fixture(autouse=True)
def sizes_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are read after the backward pass, as on a GPU."""
    monkeypatch.setattr(layout, "_waiting_costs", lambda scores: True)


def train(model: Any, phases: list[lemo.Phase], on: bool = True, **settings: Any) -> lemo.Controller:
    config = lemo.LemoConfig(block_size=4, phases=phases, cuda_graphs=on, **settings)
    controller = lemo.apply(model, config)
    controller.graphs = Graphs(controller.note, Recorder())
    return controller


def tiny(layers: int = 2, **lora: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=40, **sizes))
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, **lora}
    return get_peft_model(model, LoraConfig(**options)).train()


def trained(model: Any) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def batch(i: int, tokens: int = 64) -> dict[str, Tensor]:
    ids = torch.randint(0, 40, (1, tokens), generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids, "labels": ids}


def backward(model: Any, i: int, tokens: int = 64) -> Tensor:
    loss = model(**batch(i, tokens)).loss
    loss.backward()
    return loss.detach()


def run(phases: list[lemo.Phase], on: bool, lengths: list[int], depth: int = 2, **settings: Any) -> Any:
    """Losses, reports and trained weights of a run with a step for each of the lengths; and its graphs."""
    model = tiny(depth)
    controller = train(model, phases, on, **settings)
    controller.total_steps = len(lengths)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    losses, reports = [], []
    for i, tokens in enumerate(lengths):
        losses.append(float(backward(model, i, tokens)))
        reports.append(controller.report())
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    return losses, reports, [p.detach().clone() for p in trained(model)], controller.graphs


CASES: dict[str, tuple[lemo.Phase, dict[str, Any]]] = {
    "dense": (DENSE, {}),
    "dense-full": (DENSE, {"recompute": "full"}),
    "shared": (SHARED, {}),
    "random": (lemo.Phase("skip", policy="random"), {"recompute": "attention"}),
    "default": (lemo.Phase("skip"), {}),
    "carried": (lemo.Phase("skip", policy="update_norm", policy_options={"carry": True}), {"recompute": "full"}),
    "exact": (lemo.Phase("skip", policy="exact"), {}),
    "two-lists": (lemo.Phase("skip", policy="update_norm", mlp_keep=0.25), {"recompute": "full"}),
    "some-layers": (UPDATES, {"layers": [1]}),
    "segments": (UPDATES, {"recompute_layers": 2}),
    "backward": (lemo.Phase("backward", policy="random"), {}),
    "backward-by-update": (lemo.Phase("backward", policy="update_norm"), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_bit_for_bit(case: str) -> None:
    phase, settings = CASES[case]
    depth = 3 if "recompute_layers" in settings else 2
    losses, reports, weights, _ = run([phase], False, [64] * 4, depth, **settings)
    others, theirs, trained_as, found = run([phase], True, [64] * 4, depth, **settings)
    assert found.replays == 3 and not found.failures
    assert losses == others and reports == theirs and len(set(losses)) == 4
    assert all(torch.equal(a, b) for a, b in zip(weights, trained_as, strict=True))


@pytest.mark.parametrize("family", ["opt", "gemma3_text", "qwen3", "phi3", "gpt_oss"])
def test_families(family: str) -> None:
    found = []
    for on in (False, True):
        torch.manual_seed(0)
        model = lora(base(family), ATTENTION[family]).train()
        controller = train(model, [UPDATES], on)
        losses = [backward(model, i) for i in range(3)]
        found.append(losses + [p.grad for p in trained(model)])
    expected = "how many rows an expert has is known on the device alone" if family == "gpt_oss" else None
    assert controller.graphs.reason == expected and controller.graphs.replays == (0 if expected else 2)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", ["shared", "dense-full", "segments"])
def test_recorded_graphs_end_at_leaves_that_nothing_used_before(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd would wait on the stream of leaves that an earlier step's graph still holds, which CUDA forbids."""
    phase, settings = CASES[case]
    model = tiny(3 if "recompute_layers" in settings else 2)
    controller = train(model, [phase], True, **settings)
    own = {id(p) for p in trained(model)}
    found: list[list[bool]] = []
    real = Segment.backward

    def looked_at(self: Segment, dy: Tensor, params: Any, *more: Any) -> Any:
        found[-1] += [id(p) in own for p in params]
        return real(self, dy, params, *more)

    monkeypatch.setattr(Segment, "backward", looked_at)
    losses = []
    for i in range(3):
        found.append([])
        losses.append(model(**batch(i)).loss)  # kept, with its graph
        losses[-1].backward()
    eager, recorded, replayed = found
    assert all(eager) and eager and recorded and not any(recorded) and not replayed
    assert controller.graphs.replays == 2 and {id(p) for p in trained(model)} == own


def test_tiles_are_chosen_anew_and_reported() -> None:
    phase = lemo.Phase("sparse", keys=256, local=0)
    losses, reports, weights, _ = run([phase], False, [640] * 3)
    others, theirs, trained_as, found = run([phase], True, [640] * 3)
    assert found.replays == 2
    assert losses == others and reports == theirs
    assert reports[1]["covered"] != reports[2]["covered"]
    assert all(torch.equal(a, b) for a, b in zip(weights, trained_as, strict=True))


def test_schedules_and_lengths_have_graphs_of_their_own() -> None:
    """Each shape is recorded when it comes a second time, and none is mistaken for another."""
    phases = [lemo.Phase("skip", share=0.5, policy="update_norm"), lemo.Phase("dense", share=0.5)]
    lengths = [64, 64, 96, 64, 96, 96, 64, 96, 96, 64, 64, 96]
    losses, reports, weights, _ = run(phases, False, lengths)
    others, theirs, trained_as, found = run(phases, True, lengths)
    assert len(found.captured) == 4 and found.replays == 8
    assert losses == others and reports == theirs
    assert all(torch.equal(a, b) for a, b in zip(weights, trained_as, strict=True))


def test_documents_of_other_lengths_are_another_shape() -> None:
    model = tiny()
    controller = train(model, [DENSE])
    for lengths in ([24, 40], [24, 40], [40, 24]):
        position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
        model(**batch(0), position_ids=position_ids).loss.backward()
    assert controller.graphs.replays == 1


@pytest.mark.parametrize("phase", [DENSE, SHARED, UPDATES], ids=["dense", "shared", "update-norm"])
def test_gradients_add_up_over_micro_batches(phase: lemo.Phase) -> None:
    """Autograd keeps the first gradient it is given as it is; the graph must not write into it."""
    sums = []
    for on in (False, True):
        model = tiny()
        controller = train(model, [phase], on)
        for i in range(4):
            backward(model, i)
        sums.append([p.grad.clone() for p in trained(model)])
    assert controller.graphs.replays == 3
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))


@pytest.mark.parametrize("phase", [DENSE, UPDATES], ids=["dense", "update-norm"])
def test_a_second_pass_before_the_first_ones_backward(phase: lemo.Phase) -> None:
    """Runs as usual: what the first one saved lies in the graph's memory."""
    found = []
    for on in (False, True):
        model = tiny()
        controller = train(model, [phase], on)
        for i in range(2):
            backward(model, i)
        losses = [model(**batch(i)).loss for i in (2, 3)]
        for loss in losses:
            loss.backward()
        found.append([loss.detach() for loss in losses] + [p.grad for p in trained(model)])
    assert controller.graphs.replays == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_pass_without_a_backward_pass_frees_the_graph() -> None:
    model = tiny()
    controller = train(model, [DENSE])
    for i in range(2):
        backward(model, i)
    loss = model(**batch(2)).loss
    del loss
    backward(model, 3)
    assert controller.graphs.replays == 3


def moved(model: Any) -> None:
    for p in trained(model):
        p.data = p.data.clone() + 0.01


def other_adapter(model: Any) -> None:
    model.set_adapter("other")


def scaled(model: Any) -> None:
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2


def frozen(model: Any) -> None:
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].requires_grad_(False)


@pytest.mark.parametrize("change", [moved, other_adapter, scaled, frozen])
def test_graphs_are_recorded_again_if_weights_or_adapters_change(change: Any) -> None:
    found = []
    for on in (False, True):
        model = tiny()
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        controller = train(model, [DENSE], on)
        for i in range(2):
            backward(model, i)
        change(model)
        model.zero_grad()
        losses = [backward(model, i) for i in range(3)]
        found.append(losses + [p.grad for p in trained(model)])
    assert controller.graphs.replays == 1 + 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", ["shared", "some-layers", "exact", "segments"])
def test_what_graphs_read_stays_in_memory(case: str) -> None:
    """A graph holds addresses, not tensors: whatever it reads has to be held by someone."""
    phase, settings = CASES[case]
    controller = train(model := tiny(3), [phase], **settings)
    for tokens in (64, 64, 32):
        backward(model, 0, tokens)
    recorder: Any = controller.graphs.record
    assert controller.graphs.replays == 1
    read = recorder.read_from_outside()
    gc.collect()
    assert len(read) > 20 and not any(memory.expired() for memory in read)


def test_optimizers_that_write_in_place_need_no_new_graph() -> None:
    assert len(run([DENSE], True, [64] * 4)[3].captured) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["input_layernorm"]},
        {"use_dora": True},
        {"target_modules": "all-linear", "bias": "none"},
    ],
    ids=["embedding", "norms", "dora", "all-linear"],
)
def test_whatever_trains_gets_its_gradient(options: dict[str, Any]) -> None:
    found = []
    for on in (False, True):
        model = tiny(**options)
        controller = train(model, [SHARED], on)
        for i in range(3):
            backward(model, i)
        found.append([p.grad for p in trained(model)])
    assert controller.graphs.replays == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- what runs as usual -----------------------------------------------------------------------------------------------


def dropped(phase: lemo.Phase = DENSE, reason: str = "", tokens: int = 64, **options: Any) -> Any:
    return pytest.param(phase, reason, tokens, options, id=reason.replace(" ", "-"))


@pytest.mark.parametrize(
    ("phase", "reason", "tokens", "options"),
    [
        dropped(reason="dropout", lora_dropout=0.1),
        dropped(lemo.Phase("backward", policy="random", weighted=True), "changes from step to step"),
        dropped(lemo.Phase("sparse", mass=0.5), "the host has to read sizes"),
        dropped(UPDATES, "multiples of block_size", tokens=62),
        dropped(lemo.Phase("skip", policy="sampled"), "draws anew in every layer"),
    ],
)
def test_what_a_graph_cannot_hold_runs_as_usual_and_says_so_once(
    phase: lemo.Phase, reason: str, tokens: int, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    controller = train(model := tiny(**options), [phase])
    with caplog.at_level(logging.WARNING):
        for i in range(3):
            backward(model, i, tokens)
    said = [r.message for r in caplog.records if r.message.startswith("cuda_graphs: layers run without graphs")]
    assert len(said) == 1 and reason in said[0]
    assert controller.graphs.replays == 0


def test_without_a_gpu_layers_run_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    lemo.apply(model, lemo.LemoConfig(block_size=4, phases=[DENSE], cuda_graphs=True))
    backward(model, 0)
    assert "not on a CUDA device" in caplog.text


def test_watched_passes_say_why_no_graph_will_run(caplog: pytest.LogCaptureFixture) -> None:
    """A run shorter than the number of its maps has no other passes."""
    controller = lemo.apply(model := tiny(), lemo.LemoConfig(block_size=4, phases=[UPDATES], cuda_graphs=True))
    controller.watch(True)
    backward(model, 0)
    assert "not on a CUDA device" in caplog.text
    assert controller.watch(False) is not None


def test_watched_passes_run_without_a_graph() -> None:
    controller = train(model := tiny(), [UPDATES])
    for i in range(3):
        backward(model, i)
    controller.watch(True)
    backward(model, 3)
    assert controller.graphs.replays == 2 and controller.watch(False) is not None


def test_required_blocks_and_several_adapters_run_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    controller = train(model := tiny(), [UPDATES], keep_labelled=True)
    backward(model, 0)
    assert "blocks with labels" in caplog.text
    lemo.remove(model)
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    controller = train(model, [DENSE])
    backward(model, 0)
    assert "several adapters" in caplog.text and controller.graphs.replays == 0


@pytest.mark.parametrize("phase", [DENSE, SHARED, UPDATES], ids=["dense", "shared", "update-norm"])
def test_a_recording_that_fails_changes_nothing(phase: lemo.Phase, caplog: pytest.LogCaptureFixture) -> None:
    def record(work: Any) -> Any:
        work()
        raise RuntimeError("operation not permitted")

    found = []
    for on in (False, True):
        model = tiny()
        controller = train(model, [phase], on)
        controller.graphs = Graphs(controller.note, record)
        losses = [backward(model, i) for i in range(3)]
        found.append(losses + [p.grad for p in trained(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert caplog.text.count("recording failed with RuntimeError: operation not permitted") == 1
    assert "operation not permitted" in next(iter(controller.graphs.failures.values()))
    assert controller.graphs.reason == "recording failed in an earlier pass of this phase"


def test_graphs_are_gone_once_lemo_is_removed() -> None:
    controller = train(model := tiny(), [DENSE])
    for i in range(2):
        backward(model, i)
    assert controller.graphs.captured
    lemo.remove(model)
    assert not controller.graphs.captured


def test_only_so_many_shapes_are_recorded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(graphs, "MOST_SHAPES", 1)
    controller = train(model := tiny(), [DENSE])
    for tokens in (64, 64, 32, 32, 32, 64):
        backward(model, 0, tokens)
    assert controller.graphs.replays == 2 and len(controller.graphs.captured) == 1
    assert caplog.text.count("1 shapes of batches and lists are recorded") == 1


# --- misuse -----------------------------------------------------------------------------------------------------------


def test_backward_twice_and_parameters_changed_in_between_are_errors() -> None:
    train(model := tiny(), [DENSE])
    backward(model, 0)
    stream = model.base_model.model.model(input_ids=batch(1)["input_ids"]).last_hidden_state
    stream.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="through the same step a second time"):
        stream.sum().backward()
    loss = model(**batch(1)).loss
    with torch.no_grad():
        trained(model)[0].mul_(2)
    with pytest.raises(RuntimeError, match="was changed in place between"):
        loss.backward()


def test_a_reference_pass_cannot_repeat_lists_that_a_graph_chose() -> None:
    controller = train(model := tiny(), [UPDATES])
    for _ in range(2):
        backward(model, 0)
    with controller.reference_pass(), pytest.raises(RuntimeError, match="ran as a CUDA graph"):
        model(input_ids=batch(0)["input_ids"])


def test_a_reference_pass_repeats_lists_that_were_chosen_before() -> None:
    found = []
    for on in (False, True):
        controller = train(model := tiny(), [SHARED], on)
        for _ in range(2):
            backward(model, 0)
        with controller.reference_pass():
            found.append(model(input_ids=batch(0)["input_ids"]).logits)
    assert controller.graphs.replays == 1 and torch.equal(*found)


@pytest.mark.parametrize("other", [{"memory_budget": "1GiB"}, {"offload": True}])
def test_settings_that_contradict_graphs_are_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give cuda_graphs or"):
        lemo.LemoConfig(cuda_graphs=True, **other)
