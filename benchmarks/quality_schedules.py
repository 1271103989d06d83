"""The ways of training that the quality study compares, as text, and what they cost by measured steps.

A schedule is stages separated by ";", each a share of the cost, a mode of lemo, and the phase's settings:
  70% skip keep=0.5 policy=random shared; 30% dense
Besides the fields of lemo.Phase there are
  shared        policy option: one draw for all layers
  window=1/2    documents of that share of the length, at shifted positions, in any mode
  every=8       the last of every 8 steps is exact, and of the whole length
A share is a share of the run's cost, not of its steps: a cheaper step comes more often.

Costs are those of whole steps of a Llama-3-8B shape, relative to lemo's dense step of the same file, as
benchmarks/step.py measured them at the lengths that are compared (64K and 256K tokens). A stage without a measured step
is refused, never estimated; only what is arithmetic of measured steps is counted: steps of a stage add up, and so do
layers (two of 32 full layers at the dense step's cost of a layer). A step that was not measured next to the dense one
may be priced through one step that was measured in two files of the same GPU (see Costs), and results say so.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

REFERENCE_LAYERS = 32  # of the shape whose steps were measured
CONTEXTS = (65536, 262144)
MODEL = "llama3-8b"
PREDICTING = ("predictors", "sampled")  # policies that need a calibration


@dataclass(frozen=True)
class Stage:
    """A stretch of a run. share: of its cost, in (0, 1]; phase: fields of lemo.Phase but for share."""

    share: float
    phase: Mapping[str, Any]
    window: Fraction = Fraction(1)
    every: int | None = None


@dataclass(frozen=True)
class Row:
    """A way of training. rival: could be had without lemo. edges: first and last layer keep everything."""

    name: str
    text: str
    rival: bool = False
    edges: bool = False
    stages: tuple[Stage, ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", parse(self.text))


def parse(text: str) -> tuple[Stage, ...]:
    """Raises ValueError for text that is not a schedule; whether lemo has the modes is asked later."""
    stages = []
    for part in text.split(";"):
        words = part.split()
        if len(words) < 2 or not words[0].endswith("%"):
            raise ValueError(
                f'a stage is "<share>% <mode> ...", for instance "70% skip keep=0.5"; got {part.strip()!r}'
            )
        phase: dict[str, Any] = {"mode": words[1]}
        options: dict[str, Any] = {}
        more: dict[str, Any] = {}
        for word in words[2:]:
            name, _, value = word.partition("=")
            if name == "window":
                more["window"] = Fraction(value)
            elif name == "every":
                more["every"] = int(value)
            elif name in ("shared", "source"):
                options[name] = value or True
            elif name == "weighted":
                phase[name] = True
            else:
                texts, integers = ("policy", "tile_policy"), ("keys", "local")
                phase[name] = value if name in texts else int(value) if name in integers else float(value)
        if options:
            phase["policy_options"] = options
        stages.append(Stage(float(words[0][:-1]) / 100, phase, **more))
    if abs(sum(s.share for s in stages) - 1.0) > 1e-9:
        raise ValueError(f"the shares of a schedule must add up to 100 %; got {text!r}")
    for stage in stages:
        if not 0 < stage.window <= 1:
            raise ValueError(f"a window must be a share of the length, above 0 and at most 1; got {text!r}")
    return tuple(stages)


ROWS = (
    Row("dense", "100% dense", rival=True),
    Row("windows 1/2, then full", "70% dense window=1/2; 30% dense", rival=True),
    Row("windows 1/4, then full", "70% dense window=1/4; 30% dense", rival=True),
    Row("windows 1/8, then full", "70% dense window=1/8; 30% dense", rival=True),
    Row("windows 1/16, then full", "70% dense window=1/16; 30% dense", rival=True),
    Row("random subset 0.5, then exact", "70% skip keep=0.5 policy=random shared; 30% dense", rival=True),
    Row("random subset 0.3, then exact", "70% skip keep=0.3 policy=random shared; 30% dense", rival=True),
    Row("skip 0.5 by predictors, then exact", "70% skip keep=0.5 policy=predictors; 30% dense"),
    Row("skip 0.5 drawn by predictors, then exact", "70% skip keep=0.5 policy=sampled shared; 30% dense"),
    Row("backward 0.5 weighted", "100% backward keep=0.5 policy=random weighted"),
    Row(
        "skip 0.5, then backward",
        "70% skip keep=0.5 policy=random shared; 30% backward keep=0.5 policy=random weighted",
    ),
    Row(
        "ramp 0.3, 0.5, exact",
        "35% skip keep=0.3 policy=random shared; 35% skip keep=0.5 policy=random shared; 30% dense",
    ),
    Row(
        "ramp 0.25, 0.5, 0.75, exact",
        "20% skip keep=0.25 policy=random shared; 25% skip keep=0.5 policy=random shared; "
        "25% skip keep=0.75 policy=random shared; 30% dense",
    ),
    Row("skip 0.5, edges full, then exact", "70% skip keep=0.5 policy=random shared; 30% dense", edges=True),
    Row("skip 0.5, every eighth exact", "100% skip keep=0.5 policy=random shared every=8"),
    Row("sparse 0.25", "100% sparse density=0.25"),
    Row("sparse 0.125", "100% sparse density=0.125"),
    Row("sparse 0.25, then exact", "70% sparse density=0.25; 30% dense"),
    Row("sparse 0.25 + skip 0.5, then exact", "70% sparse density=0.25 keep=0.5 policy=random shared; 30% dense"),
    Row("skip 0.3, then sparse 0.125", "50% skip keep=0.3 policy=random shared; 50% sparse density=0.125"),
    Row("windows 1/4, then sparse 0.125", "50% dense window=1/4; 50% sparse density=0.125"),
    Row("sparse 0.125, every eighth exact", "100% sparse density=0.125 every=8"),
    Row("windows 1/2, sparse 0.25, then exact", "70% sparse density=0.25 window=1/2; 30% dense"),
    Row("windows 1/4, sparse 0.25, then exact", "70% sparse density=0.25 window=1/4; 30% dense"),
    Row("windows 1/4, sparse 0.25, then sparse 0.25", "70% sparse density=0.25 window=1/4; 30% sparse density=0.25"),
    Row("windows 1/4, then sparse 0.25", "70% dense window=1/4; 30% sparse density=0.25"),
    Row("windows 1/8, then sparse 0.25", "70% dense window=1/8; 30% sparse density=0.25"),
    Row("windows 1/8, sparse 0.25, then sparse 0.25", "70% sparse density=0.25 window=1/8; 30% sparse density=0.25"),
    Row("windows 1/16, then sparse 0.25", "70% dense window=1/16; 30% sparse density=0.25"),
    Row("windows 1/4, then 1/2, then full", "35% dense window=1/4; 35% dense window=1/2; 30% dense", rival=True),
)


# ---- what lemo can do ------------------------------------------------------------------------------------------------


def unavailable(row: Row) -> str | None:
    """Why this lemo cannot train the row, or None. A mode that does not exist yet makes its rows wait."""
    import lemo
    from lemo.engine.config import MODES

    known = {f.name for f in dataclasses.fields(lemo.Phase)}
    for stage in row.stages:
        if stage.phase["mode"] not in MODES:
            return f'this lemo has no mode "{stage.phase["mode"]}"'
        if lacking := sorted(set(stage.phase) - known):
            return f"lemo.Phase has no {', '.join(lacking)} in this lemo"
        try:
            lemo.Phase(**stage.phase)
        except ValueError as error:
            return str(error)
    return None


# ---- costs -----------------------------------------------------------------------------------------------------------

Key = tuple[str, float, float | None, int | None, bool]
Step = tuple[int, Key]  # tokens, and what else a step's cost depends on


def key(phase: Mapping[str, Any]) -> Key:
    """What a step's cost depends on, at a number of tokens: mode, keep, density, keys, weighted."""
    mode = phase["mode"]
    keep = phase.get("keep")
    keep = (1.0 if mode in ("dense", "sparse") else 0.5) if keep is None else keep
    return mode, float(keep), phase.get("density"), phase.get("keys"), bool(phase.get("weighted"))


def describe(of: Key) -> str:
    mode, keep, density, keys, weighted = of
    more = f" density {density:g}" if density is not None else ""
    more += f" keys {keys}" if keys is not None else ""
    return f"{mode} keep {keep:g}{more}{' weighted' * weighted}"


def named(step: Step) -> str:
    return f"{describe(step[1])} at {step[0]}"


@dataclass(frozen=True)
class Price:
    """What a step costs, in dense steps. chain: if no file has both, how it follows from two files."""

    rate: float
    chain: str | None = None


@dataclass(frozen=True)
class Costs:
    """Milliseconds of lemo's steps at tokens, by file, and the GPU of each file.

    Rates are between steps of one file, so of one process. A step that no file has next to the dense step at the full
    context is priced through a step that two files of the same GPU share, with the same tokens and settings: its ratio
    to the common step in the one file, times the ratio of the common step to the dense one in the other. Never through
    more than one common step: every link adds the difference between two processes. Of several chains the one whose
    common step takes the longest counts, as the spread of its times is the smallest; of equals, the first by the names
    of the files. A step that some file has next to the dense one is never chained.
    """

    files: Mapping[str, Mapping[Step, float]]
    gpus: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, paths: Iterable[Path], model: str = MODEL) -> Costs:
        """Of results files of benchmarks/step.py. Several policies of one setting: the dearest counts."""
        files: dict[str, dict[Step, float]] = {}
        gpus: dict[str, str] = {}
        for path in sorted(paths):
            result = json.loads(path.read_text())
            found: dict[Step, float] = {}
            for row in result["rows"]:
                if row.get("method") != "lemo" or row.get("recompute") != "full" or row.get("model") != model:
                    continue
                if "step_ms" in row:
                    place = (row["context"], key(row))
                    found[place] = max(found.get(place, 0.0), row["step_ms"])
            if found:
                files[path.name] = found
                if gpu := result.get("gpu"):
                    gpus[path.name] = gpu
        return cls(files, gpus)

    def price(self, step: Step, context: int) -> Price | None:
        """Of a step in dense steps at `context` tokens; None if no measurements give it."""
        dense = (context, key({"mode": "dense"}))
        for rows in self.files.values():
            if step in rows and dense in rows:
                return Price(rows[step] / rows[dense])
        chains = [
            (rows[common], -i, common, name, other)
            for i, (name, other) in enumerate(itertools.permutations(self.files, 2))
            if step in (rows := self.files[name]) and dense in self.files[other] and self._same_gpu(name, other)
            for common in rows.keys() & self.files[other].keys()
        ]
        if not chains:
            return None
        _, _, common, name, other = max(chains, key=lambda c: (*c[:2], named(c[2])))
        rate = self.files[name][step] / self.files[name][common] * self.files[other][common] / self.files[other][dense]
        return Price(rate, f"{named(step)} / {named(common)} in {name} x {named(common)} / {named(dense)} in {other}")

    def _same_gpu(self, name: str, other: str) -> bool:
        """Known, and the same."""
        return name in self.gpus and self.gpus[name] == self.gpus.get(other)

    def prices(self, stage: Stage, context: int, edges: bool = False) -> list[Price] | str:
        """Of the stage's step and, if `edges` are dense layers of it, of the dense step of its length; or a text that
        says what is not measured."""
        tokens = int(context * stage.window)
        keys = [key(stage.phase)]
        if edges and stage.phase["mode"] != "dense":
            keys.append(key({"mode": "dense"}))
        found = []
        for of in keys:
            price = self.price((tokens, of), context)
            if price is None:
                return (
                    f"no measured step of {describe(of)} at {tokens} tokens (next to dense at {context}, in one file "
                    "or in two of one GPU that share a step)"
                )
            found.append(price)
        return found

    def rate(self, stage: Stage, context: int, edges: bool = False) -> float | str:
        """A step of the stage in dense steps at `context` tokens; a text that says what is not measured."""
        prices = self.prices(stage, context, edges)
        if isinstance(prices, str):
            return prices
        rate, *dense = (price.rate for price in prices)
        if dense:
            rate += 2 / REFERENCE_LAYERS * (dense[0] - rate)
        return rate if stage.every is None else ((stage.every - 1) * rate + 1.0) / stage.every

    def of_row(self, row: Row, context: int) -> list[float] | str:
        """The rates of a row's stages, or what is missing."""
        rates = []
        for stage in row.stages:
            rate = self.rate(stage, context, row.edges)
            if isinstance(rate, str):
                return rate
            rates.append(rate)
        return rates

    def chained(self, row: Row, context: int) -> list[str]:
        """How those prices of a row's stages follow that no single file gives."""
        prices = (self.prices(stage, context, row.edges) for stage in row.stages)
        chains = [price.chain for found in prices if not isinstance(found, str) for price in found]
        return list(dict.fromkeys(chain for chain in chains if chain is not None))


# ---- the steps of a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one kind."""

    steps: int
    phase: Mapping[str, Any]
    window: Fraction = Fraction(1)


def segments(row: Row, rates: list[float], sequences: float, batch: int) -> list[Segment]:
    """The steps whose cost is that of `sequences` dense sequences, in order. Every stage has a step at least."""
    found: list[Segment] = []
    for stage, rate in zip(row.stages, rates, strict=True):
        steps = max(1, round(stage.share * sequences / (rate * batch)))
        if stage.every is None:
            found.append(Segment(steps, stage.phase, stage.window))
            continue
        whole, rest = divmod(steps, stage.every)
        for _ in range(whole):
            found += [Segment(stage.every - 1, stage.phase, stage.window), Segment(1, {"mode": "dense"})]
        if rest:
            found.append(Segment(rest, stage.phase, stage.window))
    return found


def cost(of: list[Segment], row: Row, costs: Costs, context: int, batch: int) -> float | None:
    """What a run's steps cost at `context` tokens, in dense sequences; None where that is not measured."""
    total = 0.0
    for segment in of:
        rate = costs.rate(Stage(1.0, segment.phase, segment.window), context, row.edges)
        if isinstance(rate, str):
            return None
        total += rate * segment.steps * batch
    return total
