"""Times the steps that the quality study needs, of a Llama-3-8B shape, at one length: every stage of its schedules.

As benchmarks/step.py measures them (random weights, LoRA r=8, one document, everything recomputed), but without a peer,
and with the warm-up on a short document (warmup_context in the rows), as step.py has it for long ones: a dense step of
256K tokens takes minutes. Of the policies that a mode and a kept share are used with, the dearest is timed. Windows are
steps of shorter documents, in the same process.

--common measures chosen steps next to a step that another file of the same GPU has next to the dense one, in its place:
prices are then chained through it (Costs in quality_schedules.py). --also takes stages as in the schedules.

  python benchmarks/quality_costs.py --context 65536       # about 3 minutes on an H200
  python benchmarks/quality_costs.py --context 262144      # estimated at 8 minutes; --only if that is too long
  python benchmarks/quality_costs.py --context 65536 --list
  python benchmarks/quality_costs.py --context 262144 --only sparse --also "sparse keys=8192"
  python benchmarks/quality_costs.py --context 262144 --common "skip keep 0.3 at 262144" --only backward \\
      --also "sparse density=0.125 window=1/2"
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import add_output, header, table, write_results
from models import SHAPES, Base, make_base, ours, release
from quality_schedules import MODEL, ROWS, Row, key, named, parse, unavailable
from step import WARM_TOKENS, document, timed, untrained_calibration

POLICIES = (None, "random", "update_norm", "sampled", "predictors")  # the dearest last


def needed(context: int) -> list[tuple[int, Mapping[str, Any]]]:
    """Tokens and phase of every step that the schedules are made of; dense at `context` first."""
    found: dict[Any, tuple[int, Mapping[str, Any]]] = {}
    for row in ROWS:
        if unavailable(row):
            continue
        for stage in row.stages:
            place = (int(context * stage.window), key(stage.phase))
            rank = POLICIES.index(stage.phase.get("policy"))
            if place not in found or rank > POLICIES.index(found[place][1].get("policy")):
                found[place] = (place[0], stage.phase)
    return list(found.values())


def name(tokens: int, phase: Mapping[str, Any]) -> str:
    return named((tokens, key(phase)))


def chosen(args: argparse.Namespace) -> list[tuple[int, Mapping[str, Any]]]:
    """What to measure, the step first that prices are relative to. Raises SystemExit for a name that does not exist."""
    every = needed(args.context)
    also = []
    for text in args.also:
        try:
            (stage,) = parse(f"100% {text}")
        except ValueError as error:
            raise SystemExit(f"--also {text!r}: {error}") from None
        if reason := unavailable(Row(text, f"100% {text}")):
            raise SystemExit(f"--also {text!r}: {reason}")
        also.append((int(args.context * stage.window), stage.phase))
    first = every[0]
    if args.common is not None:
        there = {name(*w): w for w in (*every, *also)}
        if args.common not in there:
            raise SystemExit(
                f"--common: no step is called {args.common!r}; there are {', '.join(there)}. --also names others"
            )
        first = there[args.common]
    if args.only:
        unknown = [part for part in args.only if not any(part in name(*w) for w in every)]
        if unknown:
            raise SystemExit(f"--only: no step's name contains {unknown[0]!r}; --list prints the names")
        every = [w for w in every if any(part in name(*w) for part in args.only)]
    elif args.common is not None:
        every = []
    return list({name(*w): w for w in (first, *every, *also)}.values())


def milliseconds(base: Base, phase: Mapping[str, Any], tokens: int, steps: int, calibration: Path) -> dict[str, Any]:
    """Of a whole step, after two of a short document."""
    import lemo

    warmup = min(WARM_TOKENS, tokens)
    predicts = phase.get("policy") in ("predictors", "sampled")
    config = lemo.LemoConfig(
        phases=[lemo.Phase(**phase)], recompute="full", calibration=calibration if predicts else None
    )
    try:
        with ours(base, config) as (model, controller):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

            def step(ids: torch.Tensor) -> None:
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            for _ in range(2):
                step(document(base, warmup))
            ids = document(base, tokens)
            if base.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            times = [timed(lambda: step(ids), base.cuda) for _ in range(steps)]
            found: dict[str, Any] = {"step_ms": round(statistics.median(times), 1), "steps": steps}
            found["warmup_context"] = warmup
            found["kept"] = round(statistics.mean(controller.kept_ratios), 4)
            if computed := controller.report()["density"]:
                found["computed"] = round(statistics.mean(computed), 4)
            if base.cuda:
                found["peak_mib"] = torch.cuda.max_memory_allocated() >> 20
            return found
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="steps whose name contains one of these, and dense")
    parser.add_argument(
        "--common",
        metavar="NAME",
        help="this step in place of the dense one, and no others but those of --only and --also; it must be in another "
        "file of the same GPU, next to the dense step",
    )
    parser.add_argument("--also", nargs="+", default=[], metavar="STAGE", help="other stages, as in the schedules")
    parser.add_argument("--steps", type=int, help="timed steps each (default: 3 below 128K tokens, 1 from there)")
    parser.add_argument("--model", choices=sorted(SHAPES), default=MODEL)
    parser.add_argument("--list", action="store_true", help="print the names of the steps, time nothing")
    add_output(parser, "costs")
    args = parser.parse_args(arguments)
    if args.context < 64:
        parser.error(f"--context: expected at least 64 tokens, got {args.context}")
    wanted = chosen(args)
    if args.list:
        print("\n".join(name(*w) for w in wanted))
        return 0
    made = header()
    warnings.filterwarnings("ignore", category=FutureWarning)
    base = make_base(args.model)
    # Not the name of the file that has the dense step: it is the other half of every chained price.
    out = args.out if args.out.endswith(".json") else f"{args.out}-{args.context}{'-chained' * bool(args.common)}"
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        calibration = untrained_calibration(base, Path(scratch) / "calibration")
        release(base)
        for tokens, phase in wanted:
            mode, keep, density, keys, weighted = key(phase)
            row = {"row": name(tokens, phase), "method": "lemo", "mode": mode, "keep": keep, "density": density}
            row |= {
                "keys": keys,
                "policy": phase.get("policy"),
                "weighted": weighted,
                "context": tokens,
                "recompute": "full",
            }
            steps = args.steps or (1 if tokens >= 131072 else 3)
            row |= {"model": base.name} | milliseconds(base, phase, tokens, steps, calibration)
            release(base)
            rows.append(row)
            print(
                table([row], ("row", "policy", "kept", "computed", "step_ms", "peak_mib", "error")).splitlines()[1],
                flush=True,
            )
            path = write_results(out, rows, **made)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
