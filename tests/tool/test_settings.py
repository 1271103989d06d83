"""Settings of a run and the notation for schedules, without a run."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from lemo.training.phases import planned_phases, stopped, unreached, unreached_of
from lemo.training.settings import FinetuneSettings, check_defaults_matter, parse_schedule
from lemo.training.trainer import learning_rate_factor


def test_runs_of_earlier_versions_are_the_same_runs() -> None:
    plain = FinetuneSettings().to_json()
    assert not {"dora", "rslora", "modules_to_save", "cuda_graphs"} & plain.keys()
    settings = FinetuneSettings(dora=True, modules_to_save=("norm",))
    assert FinetuneSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings.spelled_out()
    assert FinetuneSettings.from_json(plain) == FinetuneSettings().spelled_out()


def test_graphs_are_asked_for_and_contradict_a_budget() -> None:
    assert FinetuneSettings(cuda_graphs=True).lemo_config().cuda_graphs
    assert not FinetuneSettings().lemo_config().cuda_graphs
    with pytest.raises(ValueError, match="give cuda_graphs or memory_budget"):
        FinetuneSettings(cuda_graphs=True, recompute="auto", memory_budget=1 << 30)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_learning_rates(kind: str) -> None:
    factors = [learning_rate_factor(FinetuneSettings(lr_schedule=kind, warmup=4), 12, s) for s in range(12)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0 and all(a >= b > 0 for a, b in itertools.pairwise(factors[4:]))
    assert (factors[-1] == 1.0) == (kind == "constant")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("lr", (0.0, math.inf, math.nan)),
        ("lora_alpha", (-1.0, 0.0, math.inf, math.nan)),
        ("warmup", (-1,)),
        ("weight_decay", (-0.1, math.nan)),
        ("max_grad_norm", (-1.0, math.inf, math.nan)),
        ("seed", (-1, 1 << 32)),
        ("lora_targets", ((),)),
        ("modules_to_save", ((),)),
    ],
)
def test_settings_that_make_no_sense(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is .*, expected"):
            FinetuneSettings(**{name: value})


def test_windows_have_a_block_where_blocks_are_chosen() -> None:
    for schedule in ("dense", "sparse:0.5", "dense:window=1/16", "skip@0.5,dense:window=1/16"):
        context = 64 if "skip" in schedule else 32
        assert min(FinetuneSettings(context=context, schedule=schedule).window_lengths()) < 64
    for schedule in ("default", "skip", "backward", "sparse:0.5:keep=0.5", "skip@0.5,dense"):
        with pytest.raises(ValueError, match="context 32 is shorter than one block of 64 tokens"):
            FinetuneSettings(context=32, schedule=schedule)
    with pytest.raises(ValueError, match=r"where blocks are chosen: .* the shortest of these have 32"):
        FinetuneSettings(context=64, schedule="skip:window=1/2,dense:window=1/4")
    for context, schedule in ((1, "dense"), (-4, "dense"), (64, "dense:window=1/64,dense")):
        with pytest.raises(ValueError, match="expected windows of at least 2 tokens"):
            FinetuneSettings(context=context, schedule=schedule)
    with pytest.raises(ValueError, match="expected windows of at least 2 tokens"):
        FinetuneSettings(context=1, block_size=1)


def test_schedules() -> None:
    phases = parse_schedule("skip:0.3:exact@0.7, backward:weighted@0.2,dense@.1", keep=0.5)
    assert [(p.mode, p.keep, p.policy, p.weighted, p.share) for p in phases] == [
        ("skip", 0.3, "exact", False, 0.7),
        ("backward", 0.5, None, True, 0.2),
        ("dense", 1.0, None, False, 0.1),
    ]
    (shared,) = parse_schedule("skip:0.5:sampled:shared")
    assert (shared.policy, shared.policy_options) == ("sampled", {"shared": True})
    tiled, both = parse_schedule(
        "sparse:0.125:local=2@0.7,sparse:keys=8192:keep=0.3:random:shared", keep=0.5, policy="exact"
    )
    assert (tiled.density, tiled.keys, tiled.local, tiled.keep, tiled.policy) == (0.125, None, 2, 1.0, None)
    assert (both.density, both.keys, both.keep, both.policy) == (None, 8192, 0.3, "random")
    assert [p.mode for p in parse_schedule("default")] == ["skip", "dense"]
    assert [p.mode for p in parse_schedule("low-memory")] == ["skip", "backward"]
    for text in (
        "skipp",
        "skip@x",
        "skip:2",
        "skip:telepathy",
        "dense:0.5",
        "skip@,dense",
        "sparse:foo=1",
        "sparse:keys=all",
    ):
        with pytest.raises(ValueError, match="phase"):
            parse_schedule(text)
    for text, what in (
        ("skip:.5:.7", "keep"),
        ("skip:.5:keep=.5", "keep"),
        ("skip:random:exact", "policy"),
        ("skip:shared:shared", "policy_options"),
        ("sparse:.5:density=.7", "density"),
    ):
        with pytest.raises(ValueError, match=f"{what} is given 2 times"):
            parse_schedule(text)
    (parts,) = parse_schedule("skip:.5:predictors:mlp_keep=.25")
    assert parts.mlp_keep == 0.25
    with pytest.raises(ValueError, match="write tile_policy=recent"):
        parse_schedule("sparse:recent")
    with pytest.raises(ValueError, match="keys is '8e3', expected an integer"):
        parse_schedule("sparse:keys=8e3")
    settings = FinetuneSettings(lora_targets=("q_proj",))
    assert FinetuneSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings.spelled_out()


def test_options_that_reach_a_phase() -> None:
    check_defaults_matter("sparse:keep=.3,dense", None, "random")
    check_defaults_matter("sparse,skip", 0.3, "random")
    check_defaults_matter("dense", 0.3, "random")  # the baseline of a comparison


def test_phases_by_their_steps() -> None:
    settings = FinetuneSettings(
        context=64, block_size=8, steps=10, schedule="sparse:keys=128:window=1/2@1,skip:.3@8,dense@0.1"
    )
    assert [(p.name, p.steps) for p in planned_phases(settings)] == [
        ("sparse 1.0 keys 128 window 0.5", "step 1"),
        ("skip 0.3 update_norm", "steps 2-10"),
        ("dense 1.0", "no steps"),
    ]
    assert [p.name for p in unreached(settings, 0)] == ["sparse 1.0 keys 128 window 0.5", "skip 0.3 update_norm"]
    assert stopped(settings, 2) == "stopped after 2 of 10 steps"  # a phase without steps cannot be reached
    assert unreached_of({"settings": settings.to_json() | {"of": "another version"}}, 0) == []
