"""What token elimination does to an adapter, against what one could do without it at the same measured cost.

Three settings on one model; adapters (LoRA r=8 on q, k, v, o) are always evaluated on the dense model:
  A  extension: position interpolation to --context, trained on mixed text (train*.bin), perplexity by domain
  B  domain adaptation at the model's own length (adapt_DOMAIN.bin): perplexity there, and elsewhere
  C  long-range tasks whose evidence is far from the answer (lemo.data.questions): loss and accuracy of answers
Every way of training (benchmarks/quality_schedules.py) gets the cost of --sequences dense sequences, by measured steps
of a Llama-3-8B shape at 64K and at 256K tokens, which give it different numbers of steps. A small sweep finds each
way's batch size and learning rate, on held-out text that the tables do not use; then it runs with every seed.

  python benchmarks/smollm2.py --out smollm2
  python benchmarks/quality_data.py --model smollm2 --out tokens
  python benchmarks/quality.py --model smollm2 --tokens tokens --setting B --context 8192 --plan      # costs, steps
  python benchmarks/quality.py --model smollm2 --tokens tokens --setting B --context 8192 --budget-minutes 9 --jobs 3

Every finished run is a file in --study: the same command continues where the last one stopped, on this machine or, if
the folder is copied, on another one like it. --jobs runs train at a time, spread over the GPUs. The results file, with
the rows there are, is written at the end of every command.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import quality_stats as stats
import torch
from common import ROOT, header, table
from quality_results import BASE, MADE_BY, begun_with, finite, publish
from quality_schedules import CONTEXTS, MODEL, PREDICTING, ROWS, Costs, Row, segments, unavailable
from quality_train import (
    BLOCK,
    LORA_R,
    SWEEP_SEED,
    OutOfTime,
    Spec,
    Task,
    calibrate,
    mean_loss,
    name_of,
    too_short,
    train,
)


@dataclasses.dataclass(frozen=True)
class Way:
    """A row at one budget and one length of reference."""

    row: Row
    sequences: float
    cost_at: int
    rates: tuple[float, ...]

    def spec(self, batch: int, rate: float, seed: int, purpose: str) -> Spec:
        made = tuple(segments(self.row, list(self.rates), self.sequences, batch))
        return Spec(made, batch, rate, seed, purpose, self.row.edges)


class Study:
    """The runs that are wanted, and those that are finished."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.folder = args, Path(args.study)
        self.task = Task(
            args.setting,
            args.model,
            args.tokens,
            args.context,
            args.items,
            args.adapt,
            str(self.calibration),
        )
        self.costs = Costs.read(map(Path, args.costs), args.cost_model)
        self.left_out: dict[str, str] = {}
        self.ways: list[Way] = []
        self.cost_at = []
        for context in args.cost_at:
            dense = self.costs.rate(ROWS[0].stages[0], context)
            if isinstance(dense, str):
                self.left_out[f"every row at the costs of {context} tokens"] = dense
            else:
                self.cost_at.append(context)
        for row in ROWS:
            if row.name != "dense" and args.only and not any(part in row.name for part in args.only):
                continue
            if reason := unavailable(row) or too_short(self.task, row):
                self.left_out[row.name] = reason
                continue
            self._price(row)
        if not self.ways:
            raise SystemExit(
                f"--costs: no measured dense step of {args.cost_model} at {' or '.join(map(str, args.cost_at))} tokens "
                f"in {', '.join(args.costs) or 'no file'}; benchmarks/step.py measures them"
            )
        self.base = Spec((), 1, 0.0, 0, "final")

    def _price(self, row: Row) -> None:
        reasons = []
        for context in self.cost_at:
            rates = self.costs.of_row(row, context)
            if isinstance(rates, str):
                reasons.append(rates)
            else:
                self.ways += [Way(row, n, context, tuple(rates)) for n in sorted(self.args.sequences)]
        if reasons:
            whole = "" if len(reasons) == len(self.cost_at) else "at one length only: "
            self.left_out[row.name] = whole + "; ".join(reasons)

    # ---- files

    def results(self) -> dict[str, dict[str, Any]]:
        found = {}
        for path in (self.folder / "runs").glob("*.json"):
            found[path.stem] = json.loads(path.read_text())
        return found

    def failed(self) -> list[str]:
        """What went wrong, and is tried again by the next command."""
        found = [self.not_calibrated.read_text()] if self.not_calibrated.exists() else []
        return found + sorted(r["error"] for r in self.results().values() if "error" in r)

    def identity(self) -> dict[str, Any]:
        """What runs of one study must have in common."""
        from lemo.storage import file_digest

        weights = sorted(Path(self.args.model).glob("*.safetensors"))
        tokens = sorted(Path(self.args.tokens).glob("*.bin")) if self.args.tokens else []
        same = dataclasses.asdict(self.task)
        for name in ("calibration", "model", "tokens"):
            del same[name]
        return same | {
            "model": {p.name: file_digest(p)[:16] for p in weights},
            "tokens": {p.name: file_digest(p)[:16] for p in tokens},
            "calibration steps": self.args.calibration_steps,
            "block": BLOCK,
            "rank": LORA_R,
        }

    def open(self) -> None:
        """Makes the folder, or checks that it is of the same study; forgets claims and errors of earlier commands."""
        path = self.folder / "study.json"
        mine = self.identity()
        for name in ("runs", "claims"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if path.exists():
            there = json.loads(path.read_text())
            if different := [k for k in mine if mine[k] != there.get(k)]:
                raise SystemExit(
                    f"--study: {self.folder} holds runs with another {', '.join(different)} "
                    f"({there.get(different[0])!r}, now {mine[different[0]]!r}); name another folder"
                )
        else:
            path.write_text(json.dumps(mine, indent=1))
        for claim in (self.folder / "claims").iterdir():
            claim.unlink()
        if self.args.settings is not None:
            self.args.settings.keep(self.folder)
        self.not_calibrated.unlink(missing_ok=True)
        for name, result in self.results().items():
            if "error" in result:
                (self.folder / "runs" / f"{name}.json").unlink()

    def claim(self, name: str, done: Path) -> Path | None:
        """The claim's file, unless another worker has the work of that name or just finished it, as `done` says."""
        path = self.folder / "claims" / name
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return None
        if done.exists():
            path.unlink()
            return None
        return path

    def claim_run(self, spec: Spec) -> Path | None:
        return self.claim(name := name_of(spec), self.folder / "runs" / f"{name}.json")

    @property
    def calibration(self) -> Path:
        return self.folder / "calibration"

    @property
    def not_calibrated(self) -> Path:
        """Says why there are no predictors, if training them failed."""
        return self.folder / "calibration-error.txt"

    def keep(self, spec: Spec, result: dict[str, Any]) -> None:
        from lemo.storage import write_text

        made = {"spec": spec.to_dict()} | {name: header()[name] for name in MADE_BY}
        write_text(self.folder / "runs" / f"{name_of(spec)}.json", json.dumps(result | made))

    # ---- what is wanted

    def tried(self, way: Way, results: dict[str, Any]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Settings of the row's sweep: those with a result, and those to try next.

        First batch sizes, then rates; while the best rate is the largest or the smallest, one beyond it, at most
        --widen times.
        """
        args = self.args
        if taken := self.taken(way.row):
            return self._further(way, taken, results)
        first = [(b, args.rates[0]) for b in args.batches]
        open_ = [s for s in first if not self.sweep_run(way, s, results)]
        if open_:
            return [s for s in first if s not in open_], open_
        batch = self._best(way, first, results)[0]
        second = [(batch, r) for r in args.rates[1:]]
        open_ = [s for s in second if not self.sweep_run(way, s, results)]
        if open_:
            return first + [s for s in second if s not in open_], open_
        done = first + second
        for _ in range(args.widen if len(args.rates) > 1 else 0):
            rates = [r for b, r in done if b == batch]
            best = self._best(way, [s for s in done if s[0] == batch], results)[1]
            if min(rates) < best < max(rates):
                break
            beyond = (batch, best * 2 if best == max(rates) else best / 2)
            if not self.sweep_run(way, beyond, results):
                return done, [beyond]
            done.append(beyond)
        return done, []

    def _further(
        self, way: Way, taken: dict[str, Any], results: dict[str, Any]
    ) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """The same of a sweep that another study ended at its edge. Its choice is run once more, to compare losses that
        were measured on the same text."""
        done: list[tuple[int, float]] = []
        if "rate" not in taken["at_edge"] or not self.args.widen_further:
            return done, []
        batch, edge = taken["batch"], taken["rate"]
        factor = 2.0 if edge == max(s["rate"] for s in taken["sweep"] if s["batch"] == batch) else 0.5
        for i in range(self.args.widen_further):
            both = [*done, (batch, edge * factor ** (i + 1))] if done else [(batch, edge), (batch, edge * factor)]
            if open_ := [s for s in both if not self.sweep_run(way, s, results)]:
                return [s for s in both if s not in open_], open_
            done = both
            if self._best(way, done, results) != done[-1]:
                break
        return done, []

    def sweep_run(self, way: Way, setting: tuple[int, float], results: dict[str, Any]) -> dict[str, Any] | None:
        return results.get(name_of(way.spec(*setting, SWEEP_SEED, "sweep")))

    def sweep_loss(self, way: Way, setting: tuple[int, float], results: dict[str, Any]) -> float:
        """Infinite for a run that failed or diverged."""
        run = self.sweep_run(way, setting, results)
        if run is None or "error" in run:
            return math.inf
        groups = stats.measured_groups(self.task.setting, self.task.adapt, run["losses"])
        return finite(mean_loss(run, groups))

    def _best(self, way: Way, tried: list[tuple[int, float]], results: dict[str, Any]) -> tuple[int, float]:
        return min(tried, key=lambda s: self.sweep_loss(way, s, results))

    def sweeps_at(self, row: Row) -> Way:
        """Where a row's sweep is made: at its first length of reference and the largest budget."""
        mine = [w for w in self.ways if w.row is row]
        return max((w for w in mine if w.cost_at == mine[0].cost_at), key=lambda w: w.sequences)

    def taken(self, row: Row) -> dict[str, Any] | None:
        """What the file of --settings holds of the row's sweep: of the very schedule, at the same cost."""
        settings, way = self.args.settings, self.sweeps_at(row)
        return None if settings is None else settings.of(row, way.sequences, way.cost_at)

    def rows(self) -> list[Row]:
        return list(dict.fromkeys(way.row for way in self.ways))

    def swept(self) -> list[Row]:
        """Rows with a sweep of their own in this study."""
        return [row for row in self.rows() if self.args.sweep and self.taken(row) is None]

    def widened(self) -> list[Row]:
        """Rows whose sweep another study made, and this one may widen."""
        known = [(row, self.taken(row)) for row in self.rows() if self.args.widen_further]
        return [row for row, taken in known if taken and "rate" in taken["at_edge"]]

    def chosen(self, row: Row, results: dict[str, Any]) -> tuple[int, float] | None:
        """Batch size and learning rate of a row; None while its sweep is not finished."""
        if not self.args.sweep:
            return self.args.batches[0], self.args.rates[0]
        way, taken = self.sweeps_at(row), self.taken(row)
        done, open_ = self.tried(way, results)
        if taken and not (done or open_):
            return taken["batch"], taken["rate"]
        return None if open_ else self._best(way, done, results)

    def finals(self, way: Way, results: dict[str, Any]) -> list[Spec]:
        setting = self.chosen(way.row, results)
        return [] if setting is None else [way.spec(*setting, seed, "final") for seed in self.args.seeds]

    def wanted(self, results: dict[str, Any]) -> list[Spec]:
        """Runs whose settings are known: sweeps, then a seed of every row before the next seed."""
        found = [self.base]
        for row in self.swept() + self.widened():
            way = self.sweeps_at(row)
            found += [way.spec(*s, SWEEP_SEED, "sweep") for s in self.tried(way, results)[1]]
        finals = [spec for way in self.ways for spec in self.finals(way, results)]
        found += sorted(finals, key=lambda spec: self.args.seeds.index(spec.seed))
        return list({name_of(spec): spec for spec in found if name_of(spec) not in results}.values())

    def lacks_predictors(self) -> bool:
        """Whether rows wait for a calibration that nobody has tried yet."""
        wait = any(s.phase.get("policy") in PREDICTING for way in self.ways for s in way.row.stages)
        return wait and not (self.calibration.exists() or self.not_calibrated.exists())

    def expected(self, spec: Spec, results: dict[str, Any]) -> float:
        """Seconds, from finished runs: of the same phases if there are any; 0 before the first."""

        def kind(values: dict[str, Any]) -> str:
            return json.dumps(sorted({json.dumps(s[1:], sort_keys=True) for s in values["segments"]}))

        def sequences(values: dict[str, Any]) -> int:
            return sum(s[0] for s in values["segments"]) * values["batch"]

        mine = spec.to_dict()
        ran = [r for r in results.values() if "error" not in r and r["steps"]]
        alike = [r for r in ran if kind(r["spec"]) == kind(mine)] or ran
        return statistics.median([r["wall_s"] / sequences(r["spec"]) for r in alike] or [0.0]) * sequences(mine)


# ---- running ---------------------------------------------------------------------------------------------------------


def work(study: Study, deadline: float) -> None:
    """Trains what is wanted until nothing is left, or no further run would end before the deadline."""
    while time.time() < deadline:
        if study.lacks_predictors() and (claim := study.claim("calibration", study.calibration)):
            make_predictors(study, claim)
            continue
        results = study.results()
        calibrated = study.calibration.exists()
        ready = [spec for spec in study.wanted(results) if calibrated or not spec.predicts]
        fitting = [spec for spec in ready if time.time() + study.expected(spec, results) < deadline]
        mine = next(((spec, claim) for spec in fitting if (claim := study.claim_run(spec))), None)
        if mine is not None:
            one(study, *mine, deadline)
        elif fitting or any((study.folder / "claims").iterdir()):
            time.sleep(0.5)  # another worker's run decides what comes next
        else:
            return


def make_predictors(study: Study, claim: Path) -> None:
    """While other workers train what needs none."""
    start = time.time()
    try:
        calibrate(study.task, study.calibration, study.args.calibration_steps)
        print(f"predictors calibrated in {time.time() - start:.0f} s", flush=True)
    except (RuntimeError, ValueError) as error:  # rows that need no predictors continue
        text = f"calibration: {type(error).__name__}: {error}"[:400]
        study.not_calibrated.write_text(text)
        print(text, file=sys.stderr, flush=True)
    finally:
        claim.unlink(missing_ok=True)


def one(study: Study, spec: Spec, claim: Path, deadline: float) -> None:
    steps = sum(s.steps for s in spec.segments)
    modes = ", ".join(dict.fromkeys(s.phase["mode"] for s in spec.segments)) or BASE
    what = f"{spec.purpose}, {modes}, {steps} steps, batch {spec.batch}, rate {spec.rate:g}, seed {spec.seed}"
    try:
        result = train(study.task, spec, deadline)
        print(f"{what}: loss {mean_loss(result):.4f}, {result['wall_s']:.0f} s", flush=True)
    except OutOfTime:
        print(f"{what}: not finished in time; it starts again next time", flush=True)
        claim.unlink(missing_ok=True)
        return
    except (RuntimeError, ValueError) as error:  # out of memory among them; the other runs continue
        result = {"error": f"{what}: {type(error).__name__}: {error}"[:400], "steps": steps}
        print(result["error"], file=sys.stderr, flush=True)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    study.keep(spec, result)
    claim.unlink(missing_ok=True)


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them: a worker's must be among those that this process may use."""
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or [str(i) for i in range(torch.cuda.device_count())])[: torch.cuda.device_count()]


def run(study: Study, args: argparse.Namespace) -> None:
    """All workers: this process, or --jobs others that share the GPUs."""
    deadline = time.time() + 60 * args.budget_minutes
    if args.jobs == 1:
        work(study, deadline)
        return
    gpus = visible_gpus()
    command = [sys.executable, __file__, *args.words, "--worker", str(deadline)]
    workers = []
    for i in range(args.jobs):
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs)), **os.environ}
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[i % len(gpus)]
        workers.append(subprocess.Popen(command, env=environment))
    codes = [worker.wait() for worker in workers]
    if any(codes):
        print(f"{sum(map(bool, codes))} of {len(codes)} workers failed; finished runs are kept", file=sys.stderr)


# ---- the command -----------------------------------------------------------------------------------------------------


def plan(study: Study) -> str:
    """Every row at every length of reference: its rates, its steps, or why it is left out.

    Steps at the batch size of --settings, or at the first one that is tried.
    """
    lines = []
    for way in study.ways:
        taken = study.taken(way.row)
        batch = taken["batch"] if taken else study.args.batches[0]
        steps = sum(s.steps for s in way.spec(batch, 0.0, 0, "final").segments)
        lines.append(
            {
                "row": way.row.name,
                "cost at": way.cost_at,
                "sequences": f"{way.sequences:g}",
                "rates": ", ".join(f"{r:.3f}" for r in way.rates),
                "steps": steps,
            }
        )
    finals = len({name_of(w.spec(1, 0.0, s, "final")) for w in study.ways for s in study.args.seeds})
    swept = study.swept()
    sweeps = len(swept) * (len(study.args.batches) + len(study.args.rates) - 1)
    wider = len(swept) * study.args.widen if len(study.args.rates) > 1 else 0
    sweeps += 2 * len(study.widened())  # what the other study chose, and one beyond it
    wider += len(study.widened()) * (study.args.widen_further - 1)
    out = [
        table(lines, ("row", "cost at", "sequences", "rates", "steps")),
        f"{sweeps} runs to sweep" + f", up to {wider} more at the edges" * bool(wider) + f", {finals} final runs",
    ]
    if study.args.settings is not None:
        rows = len(study.rows())
        out.append(f"settings of {study.args.settings.source['file']}: {rows - len(swept)} of {rows} rows")
        out += [f"not in it as it is now, so swept: {row.name}" for row in swept]
    chains = {(w.row.name, chain): None for w in study.ways for chain in study.costs.chained(w.row, w.cost_at)}
    out += [f"chained: {name}: {chain}" for name, chain in chains]
    return "\n".join([*out, *(f"left out: {name}: {reason}" for name, reason in study.left_out.items())])


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    results = ROOT / "benchmarks" / "results"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model")
    parser.add_argument("--tokens", help="folder of token files (quality_data.py); C without: random filler, raw ids")
    parser.add_argument("--setting", choices=["A", "B", "C"], required=True)
    parser.add_argument("--context", type=int, required=True, help="tokens of a sequence")
    parser.add_argument("--adapt", default="headers", help="B: domain to adapt to (default: headers)")
    parser.add_argument(
        "--sequences", type=float, nargs="+", default=[128.0], help="costs in dense sequences; tables show the largest"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4], help="batch sizes of the sweep")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1e-3, 2e-3, 5e-4], help="learning rates; first: default"
    )
    parser.add_argument(
        "--widen",
        type=int,
        default=2,
        metavar="N",
        help="while a row's best rate is the largest or smallest tried, double or halve it, at most N times",
    )
    parser.add_argument("--no-sweep", dest="sweep", action="store_false", help="the first batch size and rate for all")
    parser.add_argument(
        "--settings",
        metavar="FILE",
        help="results file of a study of the same kind: rows that it has with the same schedule and cost take its "
        "batch size and rate instead of a sweep; the study keeps a copy, and refuses another FILE later",
    )
    parser.add_argument(
        "--widen-further",
        type=int,
        default=0,
        metavar="N",
        help="sweeps of --settings that ended at their largest or smallest rate go on beyond it, at most N times "
        "(default: 0)",
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose name contains one of these, and dense")
    parser.add_argument("--items", type=int, default=8, help="windows per domain or documents in an evaluation")
    parser.add_argument("--calibration-steps", type=int, default=300)
    parser.add_argument(
        "--costs",
        nargs="+",
        default=[str(p) for p in sorted([*results.glob("step-*.json"), *results.glob("costs-*.json")])],
        help="files with measured steps (default: step-*.json and costs-*.json of benchmarks/results)",
    )
    parser.add_argument("--cost-at", type=int, nargs="+", default=list(CONTEXTS), help="lengths whose costs are equal")
    parser.add_argument("--cost-model", default=MODEL, help="shape in these files")
    parser.add_argument("--study", help="folder of finished runs (default: runs/quality-MODEL-SETTING)")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="start nothing that would end later")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--plan", action="store_true", help="print costs and steps, run nothing")
    parser.add_argument("--out", help="results file, or a name in results/ (default: quality-MODEL-SETTING)")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.words = list(arguments)
    if args.tokens is None and args.setting != "C":
        parser.error(f"setting {args.setting} needs --tokens; benchmarks/quality_data.py makes such files")
    for name in ("sequences", "batches", "rates", "jobs", "items"):
        value = getattr(args, name)
        if min(value if isinstance(value, list) else [value]) <= 0:
            parser.error(f"--{name}: expected positive numbers, got {value}")
    if args.context < 2 * BLOCK:
        parser.error(f"--context: expected at least two blocks of {BLOCK} tokens, got {args.context}")
    if args.budget_minutes < 0:
        parser.error(f"--budget-minutes: expected 0 or more, got {args.budget_minutes:g}")
    if unknown := [part for part in args.only or () if not any(part in row.name for row in ROWS)]:
        parser.error(f"--only: no row's name contains {unknown[0]!r}; there are {', '.join(row.name for row in ROWS)}")
    if missing := [path for path in args.costs if not Path(path).is_file()]:
        parser.error(f"--costs: {missing[0]} does not exist")
    for name in ("widen", "widen_further"):
        if (value := getattr(args, name)) < 0:
            parser.error(f"--{name.replace('_', '-')}: expected 0 or more, got {value}")
    if args.widen_further and args.settings is None:
        parser.error(
            "--widen-further: goes on with the sweeps of --settings, which is not given; --widen is for others"
        )
    args.study = args.study or f"runs/quality-{Path(args.model).name}-{args.setting}"
    if args.settings is not None:
        if not args.sweep:
            parser.error("--settings: takes the place of sweeps, and --no-sweep gives every row one setting; name one")
        try:
            args.settings = begun_with(args)
        except ValueError as error:
            parser.error(f"--settings: {error}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if arguments is None else arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # new names in transformers that old versions lack
    study = Study(args)
    if args.plan:
        print(plan(study))
        return 0
    if args.worker is not None:
        work(study, args.worker)
        return 0
    study.folder.mkdir(parents=True, exist_ok=True)
    with (study.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"--study: another command works in {study.folder}; more at a time: --jobs") from None
        study.open()
        run(study, args)
        path, rows = publish(study)
    shown = [
        {
            "row": row["name"],
            "cost at": row.get("cost_at"),
            "sequences": row.get("sequences"),
            "seeds": len(row.get("seeds", [])),
            "loss": row["mean_loss"],
            **{f"{n} %": row.get("against_dense", {}).get("loss", {}).get(n) for n in ("gap", "low", "high")},
        }
        for row in rows
    ]
    print(table(shown, ("row", "cost at", "sequences", "seeds", "loss", "gap %", "low %", "high %")))
    left = len(study.wanted(study.results()))
    failed = study.failed()
    print(
        f"{path}: {left} runs to come"
        + " at least: sweeps decide which" * bool(left and (study.swept() or study.widened()))
    )
    if failed:
        print(f"{len(failed)} failed, and are tried again next time: {failed[0]}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
