"""Which layers save more under a memory budget: bounds, order, exact bytes, equal results."""

import functools

import lemo
import pytest
import torch
from lemo.engine import budget
from lemo.engine.budget import LayerLists, ListSize, Needs
from lemo.engine.memory import LayerShape
from lemo.engine.sizes import GPUS, gpu_bytes, left_for_steps, parse_bytes, rounded_up
from support import tiny
from support.models import ATTENTION, LINEARS, base, batch, gradients, lora, tuned
from support.saved import count

LAYERS, BLOCK = 4, 8
SHAPE = LayerShape(LAYERS, 4096, 32, 8, 128, 14336, 128256, lora={"q": 8, "k": 8, "v": 8, "o": 8})


def needs(rows=(8192,) * LAYERS, mode="skip", **options):
    lists = tuple(LayerLists(ListSize(n, 1, n, n // 64, False)) for n in rows)
    phase = lemo.Phase(mode, **options.pop("phase", {}))
    return Needs((SHAPE,) * LAYERS, lists, phase, tokens=16384, weights=16 << 30, **options)


def test_a_budget_is_kept_and_spent_as_far_as_layers_allow():
    n = needs()
    least, most = budget.fixed(n, "full").peak, budget.fixed(n, "none").peak
    step = n.of(0, "attention").total - n.of(0, "full").total
    before = least
    for size in range(least, most + step, (most - least) // 23):
        plan = budget.choose(n, size)
        assert plan == budget.choose(n, size)
        assert plan.peak <= size and plan.peak >= before
        before = plan.peak
        # No layer could save more.
        for i, level in enumerate(plan.recompute):
            richer = {"full": "attention", "attention": "none"}.get(level)
            if richer is not None:
                trial = [*plan.recompute[:i], richer, *plan.recompute[i + 1 :]]
                assert n.plan(trial, plan.offloaded).peak > size
    assert budget.choose(n, most).recompute == ("none",) * LAYERS


def test_attention_first_and_the_last_layers_first():
    n = needs()
    start = budget.fixed(n, "full").peak
    step = n.of(0, "attention").total - n.of(0, "full").total
    found = [budget.choose(n, start + k * step).recompute for k in range(LAYERS + 1)]
    assert found == [("full",) * (LAYERS - k) + ("attention",) * k for k in range(LAYERS + 1)]
    # One layer fewer would not do: gate and up of a layer that is computed again are working memory.
    mixed = budget.choose(n, budget.fixed(n, "none").peak - 1).recompute
    assert mixed == ("attention", "attention", "none", "none")
    assert n.working(mixed) > n.working(["none"] * LAYERS)


def test_layers_with_more_rows_come_first():
    n = needs(rows=(8192, 16384, 8192, 8192))
    plan = budget.choose(n, budget.fixed(n, "full").peak + n.of(1, "attention").total - n.of(1, "full").total)
    assert plan.recompute == ("full", "attention", "full", "full")
    plan = budget.fixed(n, "full", 2)
    assert plan.offloaded == {1, 0}


def test_too_small_a_budget_names_the_least():
    n = needs()
    least = budget.fixed(n, "full").peak
    with pytest.raises(ValueError, match=f"needs at least {rounded_up(least)}") as error:
        budget.choose(n, least - 1)
    assert "offload" in str(error.value)
    assert budget.choose(n, parse_bytes(rounded_up(least))).peak <= parse_bytes(rounded_up(least))


def test_one_error_names_every_phase_that_does_not_fit():
    skip, dense = needs(), needs(rows=(16384,) * LAYERS, mode="dense")
    plans = [budget.fixed(n, "full") for n in (skip, dense)]
    least = [plan.peak for plan in plans]
    assert least[0] < least[1]

    def together(size, *of):
        return budget.planned_together(functools.partial(budget.choose, n, size, False, False) for n in of)

    assert [p.peak <= least[1] for p in together(least[1], skip, dense)] == [True, True]
    with pytest.raises(budget.BudgetError) as error:  # one of two: as it always was
        together(least[0], skip, dense)
    assert "a step of mode 'dense' with 16384 tokens needs at least" in str(error.value)
    assert "skip" not in str(error.value) and "raise it, or" in str(error.value)
    with pytest.raises(budget.BudgetError) as error:
        together(least[0] - 1, skip, dense, dense)
    text = str(error.value)
    assert "the steps of 2 phases do not fit: mode 'skip' keep 0.5 with 16384 tokens needs at least" in text
    for peak in least:
        assert f"needs at least {rounded_up(peak)} with everything recomputed (weights and optimizer" in text
    assert f"raise it to {rounded_up(least[1])}, or" in text and text.count("needs at least") == 2
    # A way out must be one for all of them.
    assert [plan.peak - plan.saved < least[0] for plan in plans] == [True, False] and "--offload" not in text
    with pytest.raises(budget.BudgetError, match="--offload all"):
        together(least[0] - 1, skip)


def test_a_step_that_does_not_fit_names_the_other_phases_too():
    """In the run, at the first pass of a phase: not one error now and another at a later step."""
    phases = [lemo.Phase("skip", keep=0.5, policy="random"), lemo.Phase("dense")]
    settings = lemo.LemoConfig(block_size=BLOCK, phases=phases, recompute="auto", memory_budget=1 << 10)
    model = tiny.build()
    controller = lemo.apply(model, settings)
    controller.total_steps = 2
    ids = torch.zeros(1, 64, dtype=torch.long)
    model.train()
    with pytest.raises(ValueError, match=r"mode 'skip' keep 0\.5 with 64 tokens .*mode 'dense' keep 1 with 64 tokens"):
        model(input_ids=ids, labels=ids)


def test_offload_takes_as_few_layers_as_the_budget_needs():
    n = needs()
    full = budget.fixed(n, "full")
    rows = n.of(0, "full").rows
    for size, layers in ((full.peak, 0), (full.peak - 1, 1), (full.peak - rows - 1, 2), (full.peak - 2 * rows, 2)):
        plan = budget.choose(n, size, "auto")
        assert plan.peak <= size and plan.offloaded == set(range(layers))
    # Two layers' rows are on the device at a time, and those that stay.
    assert full.saved - budget.fixed(n, "full", True).saved == (LAYERS - 2) * rows
    with pytest.raises(ValueError, match=r"memory_budget is .* and a step of mode 'skip' with 16384 tokens needs"):
        budget.choose(n, full.peak - 2 * rows - 1, "auto")


def test_offloaded_layers_save_no_graphs():
    plan = budget.fixed(needs(), "none", 2)
    assert plan.recompute == ("attention", "attention", "none", "none")
    assert budget.choose(needs(), 1 << 40, 1).recompute == ("attention", "none", "none", "none")
    assert budget.choose(needs(countable=False), 1 << 40).recompute == ("attention",) * LAYERS


def test_mode_backward_saves_attention_at_least_and_everything_if_it_fits():
    n = needs(mode="backward")
    full, none = budget.fixed(n, "full"), budget.fixed(n, "none")
    assert full.saved == budget.fixed(n, "attention").saved < none.saved
    assert budget.choose(n, 1 << 40) == none
    step = n.of(0, "none").total - n.of(0, "full").total
    plan = budget.choose(n, full.peak + 2 * step)
    assert plan.recompute == ("full", "full", "none", "none") and plan.saved == full.saved + 2 * step
    assert budget.choose(n, full.peak + 2 * step - 1).recompute == ("full", "full", "full", "none")
    # Under a budget offloaded layers save no graphs; if they were asked for, everything but lists moves.
    assert budget.choose(n, 1 << 40, 1).recompute == ("full", "none", "none", "none")
    assert budget.fixed(n, "none", 1).recompute == ("attention", "none", "none", "none")
    moved = budget.fixed(n, "none", True, graphs=True)
    assert moved.recompute == none.recompute
    # The last layer's rows stay: they are needed back at once.
    assert moved.host == (LAYERS - 1) * n.of(0, "none").rows
    assert moved.saved == none.saved - (LAYERS - 2) * n.of(0, "none").rows
    assert n.of(0, "none").others == 4 * 8192 + 8
    assert budget.fixed(needs(), "none", True, graphs=True) == budget.fixed(needs(), "none", True)  # other modes


def config(**options):
    phase = lemo.Phase(**{"mode": "skip", "policy": "random", **options.pop("phase", {})})
    return lemo.LemoConfig(block_size=BLOCK, phases=[phase], seed=3, **options)


def planned(model, lengths, extra, **options):
    """Settings whose budget is what full recomputation needs, and `extra` times what one layer's attention adds."""
    settings = config(memory_budget="1TiB", **options)
    n = lemo.apply(model, settings).savings.needs(settings.phases[0], lengths, 4)
    lemo.remove(model)
    size = budget.fixed(n, "full").peak + int(extra * (n.of(0, "attention").total - n.of(0, "full").total))
    return config(memory_budget=size, **options), n


@pytest.mark.parametrize("targets", [ATTENTION["llama"], LINEARS["llama"]])
@pytest.mark.parametrize(
    ("phase", "layers"),
    [({}, None), ({}, [0, 2]), ({"mlp_keep": 0.25}, None), ({"keep": 0.25, "mlp_keep": 1.0}, None)],
    ids=["one-list", "some-layers", "two-lists", "all-of-the-mlp"],
)
def test_bytes_are_those_of_the_plan(targets, phase, layers, monkeypatch):
    """With layers that save different things, and lists of different lengths."""
    found, plans = set(), []
    choose = budget.choose
    # The list of all tokens is the step's, and no layer's.
    everything = 4 * 128 + 4 * 3 if layers is not None or phase.get("mlp_keep") == 1.0 else 0
    for extra in (0, 1.5, 3):
        model = lora(base("llama", layers=LAYERS), targets).train()
        settings, _ = planned(model, (64, 64), extra, phase=phase, layers=layers)
        monkeypatch.setattr(budget, "choose", lambda *a: plans.append(choose(*a)) or plans[-1])
        got, *_ = count(model, settings, monkeypatch)
        monkeypatch.undo()
        assert got == plans[-1].saved + everything
        found.add(plans[-1].recompute)
    assert len(found) == 3


@pytest.mark.parametrize("phase", [{}, {"mlp_keep": 0.25}, {"mode": "dense", "policy": None}])
def test_results_are_those_of_fixed_choices(phase):
    inputs, found = batch("packed"), {}
    for name in ("none", "attention", "full", 0.5, 1.5, 2.5):
        model = tuned("llama", layers=LAYERS)
        if isinstance(name, str):
            settings = config(phase=phase, recompute=name)
        else:
            settings, _ = planned(model, (17, 1, 32), name, phase=phase)
        controller = lemo.apply(model, settings)
        found[name] = gradients(model, inputs)
        if not isinstance(name, str):
            assert controller.report()["memory"]["layers"] == {
                k: v for k, v in (("full", LAYERS - int(name)), ("attention", int(name))) if v
            }
    loss, grads = found.pop("none")
    for other, theirs in found.values():
        assert torch.equal(loss, other)
        assert all(torch.equal(theirs[n], g) for n, g in grads.items())


def test_the_budget_is_checked_in_every_step_and_before_it():
    model = tuned("llama")
    controller = lemo.apply(model, config(memory_budget=1 << 20))
    with pytest.raises(
        ValueError, match=r"memory_budget is 1\.0 MiB, and a step of mode 'skip' with 111 tokens needs at"
    ):
        gradients(model, batch("plain"))
    assert controller.report()["memory"] == {}


def test_adapters_that_cannot_be_counted_are_reported(caplog):
    model = lora(base("llama"), ATTENTION["llama"], lora_dropout=0.1).train()
    controller = lemo.apply(model, config(memory_budget="1TiB"))
    gradients(model, batch("plain"))
    assert controller.report()["memory"]["layers"] == {"attention": 3}
    assert "cannot count" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": -1}, "positive number of bytes; got -1"),
        ({"memory_budget": "much"}, "expected a number of bytes, like 40GiB"),
        ({"memory_budget": True}, "expected a number of bytes, like 40GiB"),
        ({"memory_budget": "4GiB", "recompute": "full"}, 'leave recompute at "auto"'),
        ({"offload": -1}, "LemoConfig.offload must be"),
        ({"offload": "all"}, "LemoConfig.offload must be"),
        ({"offload": "auto"}, "give memory_budget"),
        ({"offload": True, "recompute": "none"}, 'use recompute "attention" or "full"'),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        lemo.LemoConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": 4}, r"offload: the model has 3 layers; got 4: give at most 3, or True \(--offload all\)"),
        ({"recompute_layers": 4}, "recompute_layers: the model has 3 layers; got 4, a single segment"),
        ({"recompute_layers": 3}, "got 3, a single segment, and the last never runs again: give at most 2, or True"),
        ({"layers": [1, 3]}, r"layers: the model has layers 0 to 2; got \[3\]"),
    ],
)
def test_more_layers_than_the_model_has(options, message):
    """Neither a run nor an estimate takes what there is instead, without a word."""
    model = tuned("llama")
    with pytest.raises(ValueError, match=message):
        lemo.apply(model, lemo.LemoConfig(**options))
    for known in (model, model.config):
        with pytest.raises(ValueError, match=message):
            lemo.estimate(known, lemo.LemoConfig(**options), 64)
    if "layers" in options:
        with pytest.raises(ValueError, match=message):
            lemo.longest(tuned("llama").config, 1 << 34, lemo.LemoConfig(**options))


def test_as_many_layers_as_the_model_has():
    model = tuned("llama")
    config = lemo.LemoConfig(offload=3, recompute_layers=2)
    # In segments of 1 and 2: the stream before the first, and the rows of the second layer. Others are needed back at
    # once.
    assert lemo.estimate(model, config, 64)["phases"][0]["offloaded"] == 2
    lemo.apply(model, config)


@pytest.mark.parametrize("recompute", ["full", "attention"])
def test_nothing_is_said_to_be_in_host_memory_that_is_not(recompute):
    """The rows of the last layer never leave, and those of a single one with them."""
    for layers, told in ((1, ""), (3, "; rows of 2 in host memory")):
        config = lemo.LemoConfig(recompute=recompute, offload=True)
        model = tuned("llama", layers=layers)
        found = lemo.estimate(model, config, 64)
        assert [(p["offloaded"], p["host"] > 0) for p in found["phases"]] == [(layers - 1, layers > 1)] * 2
        assert told in str(found) and (bool(told) or "host" not in str(found))
        known = lemo.apply(model, config).savings.needs(lemo.Phase("dense"), (64,), 4)
        plan = budget.fixed(known, recompute, True)
        assert told in str(plan) and (bool(told) or "host memory" not in str(plan))


def test_offload_is_named_only_where_it_helps():
    """Not to a model with one layer, whose rows are needed back at once, however much of a step they are."""
    for layers, helps in ((1, False), (8, True)):
        known = lemo.apply(tuned("llama", layers=layers)).savings.needs(lemo.Phase("dense"), (512,), 4)
        everything = known.plan(["full"] * layers, frozenset(range(layers)))
        limit = everything.peak if helps else everything.weights + everything.working
        with pytest.raises(budget.BudgetError) as error:
            budget.choose(known, limit, again=False)
        assert ("--offload all" in str(error.value)) == helps


def test_settings_survive_json():
    settings = lemo.LemoConfig(memory_budget="40GiB", offload="auto")
    assert settings.budget == 40 << 30
    assert lemo.LemoConfig.from_dict(settings.to_dict()) == settings


def test_sizes():
    assert [parse_bytes(t) for t in ("40GiB", "1.5 MiB", "2kb", "12", 7)] == [40 << 30, 3 << 19, 2000, 12, 7]
    for wrong in ("", "GiB", "-1GiB", "1.2.3", "40 gigs", None, 1.5):
        with pytest.raises(ValueError, match="expected a number of bytes"):
            parse_bytes(wrong)
    with pytest.raises(ValueError, match="less than 2\\^63 bytes"):
        parse_bytes("1e400GiB")
    assert (
        gpu_bytes("H100") == gpu_bytes("h100") and gpu_bytes("80GiB") == 80 << 30 and gpu_bytes("RTX 4090") < 24 << 30
    )
    with pytest.raises(ValueError, match="neither a size like 80GiB nor one of a10"):
        gpu_bytes("h1000")
    assert all(0 < left_for_steps(gpu_bytes(name)) < gpu_bytes(name) for name in GPUS)
