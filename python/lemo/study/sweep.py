"""The sensitivity study: ways of training on one model and its data, at equal measured cost or equal steps.

Every run is an ordinary `lemo finetune` run in a folder below the study's, and is judged densely on the same held-out
pieces. A study folder can be continued, also with more rows, seeds or learning rates: step times are measured once and
kept, and a run is named by everything that decides its result, so finished ones are never repeated, and an interrupted
one resumes from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lemo.data import Documents, evaluation_spans, split_held_out
from lemo.predictors import model_fingerprint
from lemo.predictors.store import calibration_digest, check_calibrated_for
from lemo.storage import write_text
from lemo.study.steps import step_seconds
from lemo.training.adapters import loaded_adapter, restored_modules
from lemo.training.checkpoint import locked
from lemo.training.evaluate import score
from lemo.training.finetune import LOG_FILE, finetune, read_log
from lemo.training.settings import FinetuneSettings, Stage, former_names, parse_stages, recorded, spelled_out

DENSE = "dense"
STUDY_FILE = "study.json"


@dataclass(frozen=True)
class Row:
    """A way of training. schedule: as `lemo finetune --schedule` takes it; part: of the context that its windows have,
    in all phases; rival: could be had without lemo."""

    name: str
    schedule: str
    part: int = 1
    rival: bool = False

    @property
    def stages(self) -> list[Stage]:
        return parse_stages(self.schedule)

    @property
    def text(self) -> str:
        """As `parse_row` takes it."""
        return self.name if self in ROWS or self.name == self.schedule else f"{self.name}={self.schedule}"


ROWS = (
    Row(DENSE, "dense", rival=True),
    Row("windows of 1/2", "dense", part=2, rival=True),
    Row("windows of 1/4", "dense", part=4, rival=True),
    # Shares of the steps at which windows are about 70 % of the cost, as in the rows below.
    Row("windows of 1/2, then full", "dense:window=1/2@0.84,dense@0.16", rival=True),
    Row("windows of 1/4, then full", "dense:window=1/4@0.91,dense@0.09", rival=True),
    Row("random 0.5, then exact", "skip:0.5:random:shared@0.7,dense@0.3", rival=True),
    Row("skip 0.7, then exact", "skip:0.7@0.7,dense@0.3"),
    Row("skip 0.5, then exact", "skip:0.5@0.7,dense@0.3"),
    Row("skip 0.3, then exact", "skip:0.3@0.7,dense@0.3"),
    Row("skip 0.5", "skip:0.5"),
    Row("skip 0.5, then backward", "skip:0.5@0.7,backward:0.5:weighted@0.3"),
    Row("backward 0.5", "backward:0.5:weighted"),
    Row("sparse 0.5", "sparse:0.5"),
    Row("sparse 0.25", "sparse:0.25"),
    Row("sparse 0.25, then exact", "sparse:0.25@0.7,dense@0.3"),
    Row("windows of 1/4, then sparse 0.25", "dense:window=1/4@0.91,sparse:0.25@0.09"),
)


def parse_row(text: str) -> Row:
    """A row from `NAME=SCHEDULE`, the name of a row of ROWS, or a schedule that is its own name. Raises ValueError."""
    if usual := next((row for row in ROWS if row.name == text), None):
        return usual
    name, equals, schedule = text.partition("=")
    if not equals or ":" in name:  # sparse:keys=8192 is a schedule without a name
        name = schedule = text
    parse_stages(schedule)
    # Of presets that always meant the same, runs are found under their names, as earlier versions recorded them.
    return Row(name, spelled_out(schedule) if recorded(schedule) != spelled_out(schedule) else schedule)


@dataclass(frozen=True)
class Plan:
    """What is compared. steps: of a dense run; equal: "cost" or "steps"; rates: learning rates, the first being tried
    first; max_tokens: held-out tokens at most; minutes: no run starts that would end later."""

    settings: FinetuneSettings
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    equal: str = "cost"
    max_tokens: int | None = None
    minutes: float = math.inf

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError(f"every row needs a different name, got {', '.join(names)}")
        if DENSE not in names:
            raise ValueError(f"the rows need one named {DENSE}, which the others are compared with; got {names}")
        if not self.seeds or not self.rates or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"expected different seeds and at least one learning rate, got {self.seeds}, {self.rates}")
        if self.equal not in ("cost", "steps"):
            raise ValueError(f'equal is {self.equal!r}, expected "cost" or "steps"')
        stages = [(row.part, stage) for row in self.rows for stage in row.stages if stage.phase.chooses_blocks]
        least = self.settings.block_size
        smallest = min((int(self.settings.context / part * s.window) for part, s in stages), default=least)
        if smallest < least:
            raise ValueError(
                f"the shortest windows of which blocks are chosen have {smallest} tokens, fewer than a block of "
                f"{least}; give a longer context, a smaller block_size or rows with longer windows"
            )


def _read(path: Path) -> dict[str, Any]:
    """What a study file holds. Raises ValueError if it is damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        values = None
    identity = values.get("identity") if isinstance(values, dict) else None
    if (
        not isinstance(identity, dict)
        or not all(isinstance(part, dict) for part in (identity.get("settings"), values.get("times")))
        or not all(_is_list(values[name], kind) for name, kind in _LISTS.items() if name in values)
    ):
        raise ValueError(
            f"{path} is damaged: it does not hold what lemo sweep writes; restore it, or begin the study in another "
            "folder"
        )
    return dict(values)


def plan_of(out: Path) -> dict[str, Any]:
    """What the plan of the study in a folder says, by the names of the options of `lemo sweep`; {} if there is none.
    Raises ValueError for a damaged one."""
    path = out / STUDY_FILE
    if not path.exists():
        return {}
    there = _read(path)
    identity = there["identity"]
    values = {**identity["settings"], **{name: identity.get(name) for name in ("context", "held_out", "max_tokens")}}
    values |= {name: there[name] for name in _VARIED if name in there}
    return values | ({"rows": _rows_of(there)} if "rows" in there else {})


def _rows_of(there: dict[str, Any]) -> list[str]:
    """The rows of a study file as `parse_row` takes them. Presets whose meaning has changed since were recorded by
    their names only while they had the former one."""
    rows = []
    for text in there.get("rows", ()):
        name, _, schedule = text.rpartition("=")
        changed = recorded(schedule) != spelled_out(schedule)
        rows.append(f"{name or schedule}={recorded(schedule)}" if changed else text)
    return rows


def dense_steps(out: Path) -> list[int]:
    """Steps that finished dense runs of the study in a folder have; those that cannot be read are left out."""
    found = set()
    for path in out.glob("runs/*/result.json"):
        try:
            settings = json.loads(path.read_bytes())["settings"]
            # Windows of a part of the context are dense as well, and their steps are not the study's.
            if settings["schedule"] == DENSE:
                found.add((int(settings["context"]), int(settings["steps"])))
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue
    longest = max((context for context, _ in found), default=0)
    return sorted(steps for context, steps in found if context == longest)


# What runs of one study may differ in: recorded as the last command that trained had it; lists are all that any had.
_VARIED = ("steps", "equal", "calibration", "rows", "seeds", "lr")
_LISTS = {"rows": str, "seeds": int, "lr": float}


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is kind for one in value)


# What decides whether runs may be compared, as the command line calls it.
_CALLED = {
    "calibration_sha256": "--calibration",
    "data_sha256": "--data",
    "model": "--model",
    "several_rates": "--lr (one or several)",
    "split_seed": "seed of the held-out part",
}


def _different(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """In what two studies' identities differ, as the command line calls it."""
    names = [name for name in ours if name != "settings" and ours[name] != theirs.get(name)]
    a, b = ours["settings"], theirs["settings"]
    names += [name for name in a | b if a.get(name) != b.get(name)]
    return sorted({_CALLED.get(name, "--" + name.replace("_", "-")) for name in names})


class Study:
    """A study folder: step times, and the runs that are finished."""

    def __init__(
        self, model: Any, documents: Documents, plan: Plan, out: Path, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self.model, self.plan, self.out, self.report = model, plan, out, report
        fraction = plan.settings.held_out or 0.1
        self.documents, held = split_held_out(documents, fraction, plan.settings.seed)
        spans = evaluation_spans(held, plan.settings.context, plan.max_tokens)
        self.many_rates = len(plan.rates) > 1
        if len(spans) < 2:
            raise ValueError(
                f"the held-out part has {len(spans)} pieces of up to {plan.settings.context} tokens, too few for an "
                "interval; give more data, a larger --held-out or a smaller --context"
            )
        # Learning rates are chosen on other pieces than those that judge.
        self.judge = held.cut(spans[1::2] if self.many_rates else spans)
        self.choose = held.cut(spans[::2])
        self.times: dict[str, float | None] = {}  # None: the step did not fit into memory
        self.identity = json.loads(json.dumps(self._identity(documents, fraction)))
        of = plan.settings
        self.varied: dict[str, Any] = {"steps": of.steps, "equal": plan.equal, "calibration": of.calibration}
        self.varied |= {"rows": [row.text for row in plan.rows], "seeds": list(plan.seeds), "lr": list(plan.rates)}

    def _identity(self, documents: Documents, fraction: float) -> dict[str, Any]:
        """What all runs of a folder have in common, so that they may be compared."""
        plan, device = self.plan, next(self.model.parameters()).device
        calibration = plan.settings.calibration
        varied = ("schedule", "steps", "seed", "lr", "context", "calibration")
        common = {k: v for k, v in plan.settings.to_json().items() if k not in varied}
        return {
            "settings": common,
            "context": plan.settings.context,
            "model": model_fingerprint(self.model),
            "calibration_sha256": calibration and calibration_digest(calibration),
            "data_sha256": documents.fingerprint(),
            "held_out": fraction,
            "split_seed": plan.settings.seed,
            "max_tokens": plan.max_tokens,
            "several_rates": self.many_rates,
            "device": device.type,
        }

    # ---- files

    def open(self, training: bool = True) -> None:
        """Makes the folder, or checks that it holds a study of the same. training: what runs may differ in is recorded
        as this command has it. Raises ValueError, and CalibrationError for a calibration of another model."""
        path = self.out / STUDY_FILE
        there = _read(path) if path.exists() else None
        if there is not None and (different := _different(self.identity, there["identity"])):
            raise ValueError(
                f"--out {self.out} holds a study with another {', '.join(different)}; continue it with the same "
                "options, or choose another folder"
            )
        if (calibration := self.plan.settings.calibration) is not None:
            # Now, and not when the first row that predicts has its turn: rows that do not may take hours.
            check_calibrated_for(calibration, self.identity["model"])
        if there is not None:
            self.times = there["times"]
            if training:
                self._add_to_lists(there)
            else:
                self.varied = {name: there[name] for name in _VARIED if name in there}
            self._write()
            return
        if self.out.exists() and any(p.name != ".lock" for p in self.out.iterdir()):
            raise ValueError(f"--out {self.out} is not empty and not a study; choose another folder")
        (self.out / "runs").mkdir(parents=True, exist_ok=True)
        self._write()

    def _add_to_lists(self, there: dict[str, Any]) -> None:
        """What the study had more of than this command stays a part of it. A row that is given again is the new one."""
        rows = {parse_row(text).name: text for text in [*_rows_of(there), *self.varied["rows"]]}
        self.varied["rows"] = list(rows.values())
        for name in ("seeds", "lr"):
            self.varied[name] = list(dict.fromkeys([*there.get(name, ()), *self.varied[name]]))

    def _write(self) -> None:
        values = {"identity": self.identity, "times": self.times, **self.varied}
        write_text(self.out / STUDY_FILE, json.dumps(values, indent=1))

    def result(self, settings: FinetuneSettings) -> dict[str, Any] | None:
        path = self._folder(settings) / "result.json"
        return json.loads(path.read_text()) if path.exists() else None

    def _folder(self, settings: FinetuneSettings) -> Path:
        """Of a run, also of one that an earlier version called by the name that its preset had then."""
        values, folders = settings.to_json(), []
        for schedule in (settings.schedule, *former_names(settings.schedule)):
            text = json.dumps(values | {"schedule": schedule}, sort_keys=True)
            folders.append(self.out / "runs" / hashlib.sha256(text.encode()).hexdigest()[:16])
        return next((folder for folder in folders if folder.exists()), folders[0])

    # ---- costs

    def measure(self) -> None:
        """Times of a step of every phase that the rows have; those in the folder stay what they are."""
        for row in self.plan.rows:
            for key, schedule in _phases(row):
                if key in self.times:
                    continue
                settings = dataclasses.replace(self._base(row), schedule=schedule, steps=8)
                try:
                    seconds = self.times[key] = step_seconds(self.model, self.documents, settings)
                    self.report(f"a step of {key}: {1000 * seconds:.1f} ms")
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    self.times[key] = None
                    self.report(f"a step of {key} does not fit into the GPU's memory: rows with it are left out")
                self._write()
        if self.times[DENSE] is None:
            raise ValueError(
                "a dense step does not fit into the GPU's memory, and without it nothing can be compared: give a "
                "shorter --context, --recompute full or a smaller --batch"
            )

    @property
    def rows(self) -> tuple[Row, ...]:
        """Rows whose steps were measured."""
        return tuple(r for r in self.plan.rows if all(self.times.get(key) for key, _ in _phases(r)))

    def _base(self, row: Row) -> FinetuneSettings:
        settings = self.plan.settings
        calibration = settings.calibration if _predicts(row) else None
        return dataclasses.replace(
            settings,
            schedule=row.schedule,
            context=settings.context // row.part,
            calibration=calibration,
            held_out=0.0,
        )

    def steps(self, row: Row) -> int:
        """Optimizer steps of a row's runs: those of dense, or as many as cost the same."""
        if self.plan.equal == "steps":
            return self.plan.settings.steps
        return max(1, round(self.plan.settings.steps * self._seconds(DENSE) / self._step_time(row)))

    def _seconds(self, key: str) -> float:
        seconds = self.times[key]
        assert seconds is not None, f"{key} was not measured"
        return seconds

    def _step_time(self, row: Row) -> float:
        """Mean time of a step over the row's phases, by their shares of the steps."""
        phases = [stage.phase for stage in row.stages]
        whole = sum(p.share for p in phases)
        keys = [key for key, _ in _phases(row)]
        return sum(p.share / whole * self._seconds(key) for p, key in zip(phases, keys, strict=True))

    def cost(self, row: Row) -> float:
        """Of one run, relative to a dense one, by measured steps."""
        return self.steps(row) * self._step_time(row) / (self.plan.settings.steps * self._seconds(DENSE))

    # ---- runs

    def settings(self, row: Row, rate: float, seed: int) -> FinetuneSettings:
        steps = self.steps(row)
        warmup = min(self.plan.settings.warmup, max(1, steps // 10))
        return dataclasses.replace(self._base(row), lr=rate, seed=seed, steps=steps, warmup=warmup)

    def rate(self, row: Row) -> float | None:
        """The row's best learning rate on the pieces that choose; None while not all are tried."""
        first, losses = self.plan.seeds[0], []
        for rate in self.plan.rates:
            result = self.result(self.settings(row, rate, first))
            if result is None:
                return None
            failed = "failed" in result
            losses.append(math.inf if failed else _mean(result["choose"]) if self.many_rates else 0.0)
        return self.plan.rates[int(np.argmin(losses))]

    def wanted(self) -> list[tuple[Row, FinetuneSettings]]:
        """Runs that are still to be done, as far as they are known: rates first, then the other seeds."""
        first = self.plan.seeds[0]
        runs = [(row, self.settings(row, rate, first)) for row in self.rows for rate in self.plan.rates]
        for seed in self.plan.seeds[1:]:
            runs += [(row, self.settings(row, r, seed)) for row in self.rows if (r := self.rate(row)) is not None]
        return [(row, settings) for row, settings in runs if self.result(settings) is None]

    def run(self, progress: bool = False) -> int:
        """Does what is wanted until nothing is left or the budget is. Returns the number of runs still known to come.

        Raises ValueError or CheckpointError for a folder that cannot be continued.
        """
        deadline = time.monotonic() + 60 * self.plan.minutes
        with locked(self.out):
            self.open()
            self.measure()
            while wanted := self.wanted():
                row, settings = wanted[0]
                expected = settings.steps * self._step_time(row)
                if time.monotonic() + expected > deadline:
                    self.report(f"the budget of {self.plan.minutes:g} minutes ends before the next run would")
                    break
                self.report(f"{row.name}: {settings.steps} steps, rate {settings.lr:g}, seed {settings.seed}")
                self._one(settings, progress)
            return len(self.wanted())

    def _one(self, settings: FinetuneSettings, progress: bool) -> None:
        """One run. A diverged one, or one that does not fit, is a result, too."""
        folder = self._folder(settings)
        try:
            result = self._trained(folder, settings, progress)
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            result = {"settings": settings.to_json(), "failed": str(error).splitlines()[0]}
            self.report(f"failed: {result['failed']}")
        write_text(folder / "result.json", json.dumps(result))

    def _trained(self, folder: Path, settings: FinetuneSettings, progress: bool) -> dict[str, Any]:
        resume = (folder / "run.json").exists()
        start = time.perf_counter()
        with restored_modules(self.model):
            every = max(10, settings.steps // 5)
            finetune(
                self.model, self.documents, settings, folder, resume=resume, save_every=every, keep_checkpoints=1,
                progress=progress, maps=2,
            )  # fmt: skip
        spent = time.perf_counter() - start
        result: dict[str, Any] = {"settings": settings.to_json(), "seconds": None if resume else round(spent, 3)}
        with loaded_adapter(self.model, str(folder / "adapter")) as wrapped:
            for name, held in (("judge", self.judge), ("choose", self.choose)):
                if name == "judge" or self.many_rates:
                    scores = score(wrapped, held, self.plan.settings.context)
                    result[name] = {"nll": scores.nll.tolist(), "tokens": scores.tokens.tolist()}
        steps = [r for r in read_log(folder / LOG_FILE) if "loss" in r]
        # On the CPU it is the process's, of all runs so far.
        cuda = self.identity["device"] == "cuda"
        result["peak_memory_bytes"] = max(r["peak_memory_bytes"] for r in steps) if cuda and steps else None
        result["left_out"] = any(min([*r.get("kept", []), *r.get("density", [])], default=1.0) < 1.0 for r in steps)
        return result


def _phases(row: Row) -> list[tuple[str, str]]:
    """(name of its cost, schedule of it alone) of every phase."""
    parts = [part.strip().partition("@")[0] for part in spelled_out(row.schedule).split(",")]
    return [(part if row.part == 1 else f"{part} in windows of 1/{row.part}", part) for part in parts]


def _predicts(row: Row) -> bool:
    """Whether a calibration, if there is one, is used."""
    chosen = ("predictors", "sampled", None)
    return any(
        (p.chooses_blocks and p.policy in chosen and p.mode != "backward") or p.tile_policy == "predictors"
        for p in (stage.phase for stage in row.stages)
    )


def _mean(losses: dict[str, Sequence[float]]) -> float:
    mean = float(np.sum(losses["nll"]) / np.sum(losses["tokens"]))
    return mean if math.isfinite(mean) else math.inf
