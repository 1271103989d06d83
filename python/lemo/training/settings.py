"""The settings of a fine-tuning run, and the notation for schedules. Imports neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from lemo.engine.config import (
    MODES,
    POLICIES,
    RECOMPUTE,
    TILE_POLICIES,
    LemoConfig,
    Mode,
    Phase,
    RecomputeSetting,
    default_phases,
)

LearningRateSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class FinetuneSettings:
    """Everything that decides what a run computes. Two runs with equal settings and data give the same adapter.

    schedule: see `parse_schedule` and `Stage`.
    batch: windows of `context` tokens per forward pass. In each process, batch x accumulate windows make one step.
    calibration: folder written by `lemo calibrate`, needed by the policies `predictors` and `sampled`.
    lora_targets: module names (those the model lacks are skipped), or "all-linear"; None: the attention projections of
    the model's family. The adapter is always float32. dora, rslora: as PEFT's use_dora and use_rslora; modules_to_save:
    names of modules that train as a whole and are saved with the adapter, in the model's dtype.
    memory_budget, offload, recompute_layers, cuda_graphs: as in `lemo.LemoConfig`; a budget needs recompute "auto".
    """

    context: int = 4096
    steps: int = 100
    batch: int = 1
    accumulate: int = 1
    schedule: str = "default"
    keep: float = 0.5
    policy: str | None = None
    calibration: str | None = None
    block_size: int = 64
    recompute: RecomputeSetting = "full"
    memory_budget: int | None = None
    offload: bool | int | str = False
    recompute_layers: bool | int | Literal["auto"] = "auto"
    cuda_graphs: bool = False
    lr: float = 2e-4
    lr_schedule: LearningRateSchedule = "constant"
    warmup: int = 20
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] | None = None
    dora: bool = False
    rslora: bool = False
    modules_to_save: tuple[str, ...] | None = None
    held_out: float = 0.0
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "lora_rank", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("lr", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("warmup", "weight_decay", "max_grad_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number of at least 0")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}, expected an integer from 0 to {(1 << 32) - 1}")
        if self.lora_targets is not None and not self.lora_targets:
            raise ValueError("lora_targets is empty, expected names of linear layers or all-linear")
        if self.modules_to_save is not None and not self.modules_to_save:
            raise ValueError("modules_to_save is empty, expected names of modules, or None")
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}, expected a fraction in (0, 1]")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}, expected a fraction in [0, 1)")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, expected a fraction in [0, 1)")
        if self.lr_schedule not in get_args(LearningRateSchedule):
            raise ValueError(f"lr_schedule is {self.lr_schedule!r}, expected constant, linear or cosine")
        if self.recompute not in RECOMPUTE:
            raise ValueError(f"recompute is {self.recompute!r}, expected one of {', '.join(RECOMPUTE)}")
        self._check_windows()
        self.lemo_config()

    def _check_windows(self) -> None:
        """Of one block, nothing could be left out; where none is chosen, a block means nothing."""
        lengths = self.window_lengths()
        chosen = [n for n, phase in zip(lengths, self.phases(), strict=True) if phase.chooses_blocks]
        if chosen and self.context < self.block_size:
            raise ValueError(
                f"context {self.context} is shorter than one block of {self.block_size} tokens; "
                "give a longer context or a smaller block_size"
            )
        if min(chosen, default=self.block_size) < self.block_size:
            raise ValueError(
                f"schedule is {self.schedule!r}, expected windows of at least one block of {self.block_size} tokens "
                f"where blocks are chosen: of a context of {self.context}, the shortest of these have {min(chosen)}; "
                "give a longer context, longer windows or a smaller block_size"
            )
        if min(lengths) < 2:
            raise ValueError(
                f"schedule is {self.schedule!r}, expected windows of at least 2 tokens: of a context of "
                f"{self.context}, its shortest have {min(lengths)}; give a longer context or longer windows"
            )

    def spelled_out(self) -> FinetuneSettings:
        """With the phases of a preset in place of its name, as runs record them: another version may give the name
        another meaning, which must not change what a run goes on with, or says of itself."""
        return dataclasses.replace(self, schedule=spelled_out(self.schedule))

    def stages(self) -> list[Stage]:
        return parse_stages(self.schedule, self.keep, self.policy)

    def phases(self) -> list[Phase]:
        return [stage.phase for stage in self.stages()]

    def window_lengths(self) -> list[int]:
        """Tokens of a window in each phase."""
        return [int(self.context * stage.window) for stage in self.stages()]

    def lemo_config(self) -> LemoConfig:
        return LemoConfig(
            block_size=self.block_size,
            calibration=self.calibration,
            seed=self.seed,
            recompute=self.recompute,
            memory_budget=self.memory_budget,
            offload=self.offload,
            recompute_layers=self.recompute_layers,
            cuda_graphs=self.cuda_graphs,
            phases=self.phases(),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values. Settings of later versions are left out while they change nothing, so that the runs of earlier
        ones are the same runs."""
        values = dataclasses.asdict(self)
        for name in _LISTS:
            values[name] = None if values[name] is None else list(values[name])
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if name not in _LATER or value != defaults[name]}

    @staticmethod
    def from_json(values: dict[str, Any]) -> FinetuneSettings:
        """The inverse of `to_json`, but for presets, whose phases it names. Raises ValueError for names this version
        does not know."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(FinetuneSettings)})
        if unknown:
            raise ValueError(f"settings {', '.join(unknown)} are not known to this version of lemo")
        names: dict[str, Any] = {name: tuple(values[name]) for name in _LISTS if values.get(name) is not None}
        if isinstance(schedule := values.get("schedule"), str):
            names["schedule"] = recorded(schedule)
        return FinetuneSettings(**{**values, **names})


_LISTS = ("lora_targets", "modules_to_save")
_LATER = ("dora", "rslora", "modules_to_save", "cuda_graphs")

# Skipping is cheap but trains for a model that is not served; an exact phase corrects this (docs/guide/modes.md).
_EXACT_SHARE = default_phases()[-1].share
PRESETS = {
    "default": f"skip@{1 - _EXACT_SHARE:g},dense@{_EXACT_SHARE:g}",
    # As the study ran them: 70 % of the cost goes into windows, and most of the steps.
    "long-context": "dense:window=1/4@0.91,sparse:0.25@0.09",
    "extension": "dense:window=1/8@0.97,sparse:0.25@0.03",
    "whole-documents": f"sparse:0.25@{1 - _EXACT_SHARE:g},dense@{_EXACT_SHARE:g}",
    "low-memory": f"skip@{1 - 1.5 * _EXACT_SHARE:g},backward:weighted@{1.5 * _EXACT_SHARE:g}",
    "skip": "skip",
    "backward": "backward:weighted",
    "dense": "dense",
}


# From here on attention is about half of a dense step: 46 % at 32K tokens of a Llama-3-8B shape, if the steps of 16K
# and 32K in benchmarks/results/costs-h200-65536.json are split into a linear and a quadratic part.
LONG_CONTEXT = 32768


def default_schedule(
    context: int,
    keep: float | None,
    policy: str | None,
    calibration: str | None,
    stretched: bool = False,
    answers_only: bool = False,
) -> str:
    """The preset of a command that names none: of our ways of training, the one that did best in the quality study at
    the costs of long contexts (docs/results.md), another if positions are stretched to reach the context; "default"
    below, or if an option asks for tokens to be left out. Where only answers are labels, every step has whole
    documents: a window could hold an answer without the evidence for it."""
    asked = any(option is not None for option in (keep, policy, calibration))
    if context < LONG_CONTEXT or asked:
        return "default"
    if answers_only:
        return "whole-documents"
    return "extension" if stretched else "long-context"


def spelled_out(schedule: str) -> str:
    """The phases of a preset; any other schedule as it is."""
    return PRESETS.get(schedule, schedule)


# What records that name a preset mean by it, where that has changed: runs have recorded the phases since then.
_FORMERLY = {
    "extension": "sparse:0.25:window=1/4@0.95,sparse:0.25@0.05",
    "long-context": PRESETS["whole-documents"],
}


def recorded(schedule: str) -> str:
    """The phases of a schedule as a run folder has it, whichever version wrote it."""
    return _FORMERLY.get(schedule, spelled_out(schedule))


def former_names(schedule: str) -> list[str]:
    """The presets by whose names earlier versions may have recorded phases, where the names mean others by now."""
    return [name for name, phases in _FORMERLY.items() if phases == schedule]


def _window(text: str) -> Fraction:
    share = Fraction(text)
    if not 0 < share < 1:
        raise ValueError
    return share


# Settings of a phase that a schedule gives as NAME=VALUE, how their values are read, and what these have to be.
_NAMED: dict[str, tuple[Callable[[str], Any], str]] = {
    "keep": (float, "a number"),
    "density": (float, "a number"),
    "keys": (int, "an integer"),
    "mass": (float, "a number"),
    "local": (int, "an integer"),
    "mlp_keep": (float, "a number"),
    "policy": (str, "a name"),
    "tile_policy": (str, "a name"),
    "window": (_window, "a share of the context like 1/4 or 0.25"),
}


def _setting(option: str, mode: str) -> tuple[str, Any]:
    """The setting of a phase that an option gives, and its value. A bare number is the mode's main one."""
    name, named, value = option.partition("=")
    if named:
        if name not in _NAMED:
            raise ValueError(f"no setting is called {name!r}; there are {', '.join(_NAMED)}")
        read, expected = _NAMED[name]
        try:
            return name, read(value)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{name} is {value!r}, expected {expected}") from None
    if option == "weighted":
        return "weighted", True
    if option == "shared":
        return "policy_options", {"shared": True}
    if option[:1].isdigit() or option[:1] == ".":
        return "density" if mode == "sparse" else "keep", float(option)
    if option in TILE_POLICIES and option not in POLICIES:
        raise ValueError(f"{option!r} chooses tiles, not blocks: write tile_policy={option}")
    return "policy", option


@dataclass(frozen=True)
class Stage:
    """A phase of `lemo finetune`: lemo's own, and the share of the context that its windows have. With less than 1, a
    part of each window is trained on, at a place drawn from the seed, with the positions that it has in the whole."""

    phase: Phase
    window: Fraction = Fraction(1)


def parse_schedule(text: str, keep: float = 0.5, policy: str | None = None) -> list[Phase]:
    """Phases from a preset's name or from `MODE[:NUMBER][:POLICY][:shared][:weighted][:NAME=VALUE][@SHARE]`, separated
    by commas.

    SHARE is the phase's share of the steps, relative to the others' (default 1). NUMBER is the kept fraction, in
    `sparse` the density; NAME one of keep, density, keys, mass, local, mlp_keep, policy, tile_policy (see
    `lemo.Phase`). The kept fraction defaults to `keep` (`sparse` keeps all tokens), POLICY to `policy` in phases that
    skip; `backward` phases select at random unless they name a policy, because there any preference biases the
    gradient. `shared`: one draw for all layers of a step (random, sampled). Raises ValueError.
    """
    stages = parse_stages(text, keep, policy)
    if any(stage.window < 1 for stage in stages):
        raise ValueError(
            f"schedule {text!r}{f' ({PRESETS[text]})' if text in PRESETS else ''}: window= cuts the data of lemo "
            "finetune, lemo sweep and lemo estimate, and means nothing elsewhere; give phases without it"
        )
    return [stage.phase for stage in stages]


def parse_stages(text: str, keep: float = 0.5, policy: str | None = None) -> list[Stage]:
    """As `parse_schedule`, of what `lemo finetune` takes: NAME may also be window, a share of the context like 1/4 or
    0.25. Raises ValueError."""
    stages = []
    for part in spelled_out(text).split(","):
        description, at, share = part.strip().partition("@")
        mode, *options = description.split(":")
        where = f"schedule {text!r}, phase {part.strip()!r}"
        if mode not in MODES:
            raise ValueError(
                f"{where}: {mode!r} is neither a preset ({', '.join(PRESETS)}) nor a mode ({', '.join(MODES)})"
            )
        try:
            if at and not share:
                raise ValueError("no share after @")
            stages.append(_stage(mode, options, float(share or 1), keep, policy))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return stages


def _stage(mode: Mode, options: list[str], share: float, keep: float, policy: str | None) -> Stage:
    values: dict[str, Any] = {"policy": policy} if mode == "skip" else {}
    if mode in ("skip", "backward"):
        values["keep"] = keep
    settings = [_setting(option, mode) for option in options]
    names = [name for name, _ in settings]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given {names.count(twice)} times")
    values |= settings
    window = values.pop("window", Fraction(1))
    if mode == "sparse" and policy is not None and values.get("keep", 1.0) != 1.0:
        values.setdefault("policy", policy)
    return Stage(Phase(mode=mode, share=share, **values), window)


def uses_default_keep(text: str) -> bool:
    """Whether a phase of the schedule keeps the share of the blocks that `FinetuneSettings.keep` says."""
    return parse_stages(text, keep=0.25) != parse_stages(text, keep=0.75)


def check_defaults_matter(text: str, keep: float | None, policy: str | None) -> None:
    """Raises ValueError if a kept fraction or a policy that was asked for reaches no phase of a schedule with "sparse",
    where either is easily taken for one of its own settings. (In the others, baselines take both without using them.)
    """
    if all(stage.phase.mode != "sparse" for stage in parse_stages(text)):
        return
    if keep is not None and not uses_default_keep(text):
        raise ValueError(
            f"--keep {keep:g} has no effect: every phase of --schedule {text} names its own, or keeps all tokens. "
            "Leave it out, or write it in the schedule, as in skip:0.3 or sparse:keep=0.3"
        )
    if policy is not None and parse_stages(text, policy="random") == parse_stages(text, policy="update_norm"):
        raise ValueError(
            f"--policy {policy} has no effect: no phase of --schedule {text} leaves tokens out by a policy that it "
            "does not name itself. Leave it out, or write it in the schedule, as in sparse:keep=0.3:random"
        )
