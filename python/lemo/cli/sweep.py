"""lemo sweep: which way of training is worth its cost, on the user's own model and data."""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from lemo.cli.common import (
    AS_THE_MODEL,
    Formatter,
    add_common,
    add_data,
    add_model,
    default_context,
    device_of,
    load_data,
    load_model,
    path_name,
    say,
)
from lemo.cli.recorded import AS_CALIBRATED, as_options, calibrated, say_calibrated
from lemo.storage import write_text
from lemo.training.settings import FinetuneSettings

_D = FinetuneSettings(steps=60, held_out=0.1)
# Of the options that a study folder records.
_DEFAULTS: dict[str, Any] = {"equal": "cost"} | {
    name: getattr(_D, name)
    for name in ("context", "steps", "held_out", "batch", "block_size", "recompute", "lora_rank", "lora_alpha")
}

# What a study may have more of when it is continued. An earlier lemo did not record them.
_LISTS: dict[str, Any] = {"rows": None, "seeds": [1, 2, 3], "lr": [2e-4]}

_EPILOG = """\
examples:
  lemo sweep --model MODEL --data train/ --context 16384 --steps 60 --out study --plan
      measure a step of every way of training, and print what the study would run and take

  lemo sweep --model MODEL --data train/ --context 16384 --steps 60 --out study --minutes 120
      run it, for two hours; the same command continues it. Table on stdout, page in study/sweep.html

  lemo sweep --model MODEL --data train/ --context 16384 --steps 60 --out study --only skip sparse --lr 1e-4 3e-4
      only rows whose name contains one of these words (and dense), each with its best learning rate

  lemo sweep --model MODEL --data train/ --context 16384 --steps 60 --out study --rows dense \\
             gentle=skip:0.8@0.9,dense@0.1 sparse:keys=4096
      rows of your own, NAME=SCHEDULE or a schedule as lemo finetune --schedule takes it

how to read it: every row trains an adapter per seed at the cost of --steps dense steps (by measured time: a cheaper
step comes more often) and is judged on the dense model, on the same held-out text. The change against dense is paired
(same seed, same text). The last line names the row to use and why. "Use dense: nothing beats it beyond the interval"
is a finding, too: with little data or few seeds intervals are wide, and more seeds narrow them. Rows called windows
and random are what one could do without lemo or without choosing: if they win, elimination by importance adds nothing.
--equal steps compares equally many steps instead: then the cheapest row within --tolerance of dense is recommended.

--out is a study folder: finished runs are kept and never repeated, an interrupted one resumes from its checkpoint, and
more rows, seeds or minutes may be given later; rows, seeds, rates, --context, --steps and what else all runs share are
then those of the study, unless given. Each run in it is a run folder: lemo report shows it.
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "sweep",
        help="find the way of training that is worth its cost, on your model and data",
        description="The sensitivity study: keep, density, mode and schedule against dense training at equal cost.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument(
        "--out", type=path_name, required=True, metavar="STUDY", help="study folder, new or to continue"
    )
    add_model(parser)
    add_data(parser)
    study = parser.add_argument_group("study")
    study.add_argument(
        "--context",
        type=int,
        help=f"tokens per window (default: {AS_CALIBRATED}, else {_D.context}, {AS_THE_MODEL})",
    )
    study.add_argument("--steps", type=int, help=f"optimizer steps of a dense run (default: {_DEFAULTS['steps']})")
    study.add_argument("--equal", choices=("cost", "steps"), help="what all rows have the same of (default: cost)")
    study.add_argument(
        "--rows",
        nargs="+",
        action="extend",
        metavar="[NAME=]SCHEDULE",
        help="ways of training, usual ones by name (default: see --plan)",
    )
    study.add_argument(
        "--only", nargs="+", action="extend", metavar="TEXT", help="rows whose name contains one of these, and dense"
    )
    study.add_argument(
        "--seeds", nargs="+", action="extend", type=int, help="of adapters and data order (default: 1 2 3)"
    )
    study.add_argument(
        "--lr",
        nargs="+",
        action="extend",
        type=float,
        help="learning rates; each row gets its best one (default: 0.0002)",
    )
    study.add_argument("--held-out", type=float, help="fraction of the data that judges (default: 0.1)")
    study.add_argument("--max-tokens", type=int, help="held-out tokens at most")
    study.add_argument("--tolerance", type=float, default=0.01, help="with --equal steps: perplexity that may be lost")
    study.add_argument(
        "--minutes", type=float, default=math.inf, help="start no run that would end later (default: none)"
    )
    study.add_argument("--plan", action="store_true", help="measure steps, print costs and times, train nothing")
    run = parser.add_argument_group("runs")
    run.add_argument("--batch", type=int, help=f"windows per step (default: {_D.batch})")
    run.add_argument(
        "--block-size", type=int, help=f"tokens per block (default: {AS_CALIBRATED}, else {_D.block_size})"
    )
    run.add_argument("--recompute", help=f"none, attention or full (default: {_D.recompute})")
    run.add_argument("--lora-rank", type=int, help=f"rank of the adapter (default: {_D.lora_rank})")
    run.add_argument(
        "--lora-alpha", type=float, help=f"scale of the adapter is alpha / rank (default: {_D.lora_alpha:g})"
    )
    run.add_argument("--calibration", type=path_name, help="folder written by lemo calibrate")
    run.add_argument("--html", type=path_name, metavar="FILE", help="page to write (default: STUDY/sweep.html)")
    add_common(parser)
    parser.set_defaults(run=run_command)


def _complete(args: argparse.Namespace) -> None:
    """Options that are not given: those of the study in --out, as the calibration was made, or the defaults."""
    from lemo.study.sweep import plan_of

    there = {name: value for name, value in plan_of(Path(args.out)).items() if value is not None}
    missing = [n for n in (*_DEFAULTS, "max_tokens", "calibration", *_LISTS) if getattr(args, n) is None]
    if there:
        _check_recorded(args.out, [name for name in missing if name in _DEFAULTS and name not in there])
    taken = {name: there[name] for name in missing if name in there}
    if taken:
        say(f"{as_options(taken)}: as the study {args.out} has it")
    else:
        taken = calibrated(args, ("context", "block_size"))
        say_calibrated(args, taken)
        if "context" in missing and "context" not in taken:
            taken["context"] = default_context(args, _D.context)
    for name in missing:
        setattr(args, name, taken.get(name, (_DEFAULTS | _LISTS).get(name)))


def _check_recorded(out: str, lacking: list[str]) -> None:
    """Raises ValueError for options that neither the command nor the study has: a default would begin other runs."""
    from lemo.study.sweep import STUDY_FILE, dense_steps

    if not lacking:
        return
    options = " and ".join(f"--{name.replace('_', '-')}" for name in lacking)
    steps = " or ".join(map(str, dense_steps(Path(out)))) if "steps" in lacking else ""
    raise ValueError(
        f"{Path(out) / STUDY_FILE} does not record {options} (an earlier lemo wrote it): give {options} as the study "
        f"was begun with{f'; its dense runs have {steps} steps' if steps else ''}"
    )


def _plan(args: argparse.Namespace) -> Any:
    from lemo.study.sweep import DENSE, ROWS, Plan, Row, parse_row

    given = args.rows is not None
    _complete(args)
    rows = tuple(map(parse_row, args.rows)) if args.rows else ROWS
    if args.only and not given:  # chosen from the study's and from the usual ones
        names = {row.name for row in rows}
        rows += tuple(row for row in ROWS if row.name not in names)
    if all(row.name != DENSE for row in rows):
        rows = (Row(DENSE, "dense", rival=True), *rows)
    if args.only:
        rows = tuple(r for r in rows if r.name == DENSE or any(part in r.name for part in args.only))
        if len(rows) == 1 and not any(part in DENSE for part in args.only):
            raise ValueError(f"--only {' '.join(args.only)}: no row has this in its name; --plan shows all rows")
    if not args.minutes > 0:
        raise ValueError(f"--minutes {args.minutes:g}: expected a number above 0")
    settings = FinetuneSettings(
        schedule=DENSE,  # rows have their own, and the plan checks their windows
        context=args.context,
        steps=args.steps,
        batch=args.batch,
        block_size=args.block_size,
        recompute=args.recompute,
        lora_rank=args.lora_rank,
        lora_alpha=args.lora_alpha,
        calibration=None if args.calibration is None else os.path.abspath(args.calibration),
        held_out=args.held_out,
    )
    return Plan(settings, rows, tuple(args.seeds), tuple(args.lr), args.equal, args.max_tokens, args.minutes)


def run_command(args: argparse.Namespace) -> int:
    from lemo.study.conclusions import as_text, recommend, rows_of
    from lemo.study.sweep import Study
    from lemo.study.sweep_page import sweep_page
    from lemo.training.checkpoint import locked

    plan = _plan(args)
    device_of(args.device)
    model = load_model(args, plan.settings.context, to_train=True)
    study = Study(model, load_data(args, model.config), plan, Path(args.out), say)
    if args.plan:
        with locked(study.out):
            study.open(training=False)
            study.measure()
        print(_costs(study))
        return 0
    left = study.run(progress=False)
    rows = rows_of(study)
    advice = recommend(rows, plan.equal, len(plan.seeds), args.tolerance)
    print(as_text(rows, advice))
    about = {"model": args.model, "data": args.data, "equal": plan.equal, "times": study.times, **study.identity}
    target = Path(args.html) if args.html else study.out / "sweep.html"
    write_text(target, sweep_page(f"lemo sweep: {Path(args.model).name}", rows, advice, about))
    write_text(study.out / "sweep.json", json.dumps({"rows": rows, "recommendation": advice}, indent=1))
    say(f"wrote {target}")
    if left:
        say(f"at least {left} runs to come: the same command continues")
    return 0


def _costs(study: Any) -> str:
    """What the study would run: steps, cost and time of every row."""
    width = max(len(row.name) for row in study.plan.rows)
    lines, total = [f"{'row':{width}}  {'steps':>6}  {'cost':>5}  {'minutes':>8}  schedule"], 0.0
    runs = len(study.plan.rates) + len(study.plan.seeds) - 1
    for row in study.rows:
        minutes = study.cost(row) * study.plan.settings.steps * study.times["dense"] / 60
        total += runs * minutes
        lines.append(
            f"{row.name:{width}}  {study.steps(row):6}  {study.cost(row):5.2f}  {minutes:8.1f}  {row.schedule}"
        )
    lines.append(f"{runs} runs of each row: about {total:.0f} minutes of training, and evaluations")
    return "\n".join(lines)
