"""The `lemo` command: calibrate, finetune, evaluate, report, sweep, profile, info, estimate.

Every subcommand lives in a separate module with `add(subparsers)` and a `run(args)` that returns an exit code.
Exit codes: 0 done, 1 a fault of lemo itself or a computation that failed, 2 something to fix in the command,
the data or the machine, 130 interrupted (Ctrl-C, SIGINT), 143 terminated (SIGTERM), which is the same otherwise.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from lemo.cli.common import Formatter, explain, process
from lemo.cli.interrupts import Terminated, interrupts_raise

_COMMANDS = ("calibrate", "finetune", "evaluate", "report", "sweep", "profile", "info", "estimate")

_EPILOG = """\
A first run, from text to a measured adapter:

  lemo estimate  --model MODEL --context 16384
  lemo calibrate --model MODEL --data books/ --context 16384 --out calibration
  lemo finetune  --model MODEL --data books/ --context 16384 --calibration calibration --out run
  lemo evaluate  --model MODEL --data dev=dev.txt --context 16384 --adapter run/adapter
  lemo report    run

Which settings are worth it on your model and data:

  lemo sweep     --model MODEL --data books/ --context 16384 --steps 60 --out study

MODEL is a folder of a transformers model or its name on the hub. The adapter is a plain PEFT adapter: it loads with
PEFT alone and is served densely, without lemo.
Every command documents itself: lemo finetune --help
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lemo",
        description="Long-context LoRA fine-tuning with token elimination.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("--version", action="version", version=f"lemo {importlib.import_module('lemo').__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        importlib.import_module(f"lemo.cli.{name}").add(subparsers)
    return parser


def _let_waiting_threads_sleep() -> None:
    """torch's OpenMP threads spin while they wait, which on a machine with more busy threads than cores (several jobs,
    or one next to other work) slows every job down many times. OpenMP reads this once, when torch is loaded."""
    if "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _which_process() -> str:
    try:
        rank, count = process()
    except ValueError:
        return ""
    return f" (process {rank} of {count})" if rank else ""


def _hint(args: argparse.Namespace) -> str:
    """What an interrupted command leaves, and how it resumes."""
    if args.command == "finetune":
        begun = (Path(args.out) / "run.json").exists()
        return f"; resume with: lemo finetune --out {args.out} --resume" if begun else " before the run began"
    if args.command == "sweep":
        return "; the same command continues"
    return "; a calibration does not resume: start it again" if args.command == "calibrate" else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors become one message on stderr unless --debug is given."""
    _let_waiting_threads_sleep()
    args = build_parser().parse_args(argv)
    try:
        if args.command != "finetune" and process()[1] > 1:
            raise ValueError(f"runs in one process, but WORLD_SIZE is {process()[1]}; start it without torchrun")
        with warnings.catch_warnings():
            # PEFT reads a property that transformers has renamed.
            warnings.filterwarnings("ignore", r"`is_gradient_checkpointing` is deprecated", FutureWarning)
            if not args.debug:
                # Other libraries' notices to their own developers; ours are printed as lines.
                warnings.simplefilter("ignore", FutureWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
            with interrupts_raise():
                return args.run(args)
    except KeyboardInterrupt as error:
        what, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
        if not _which_process():  # each of several gets the signal, and the first speaks
            print(f"lemo {args.command}: {what}{_hint(args)}", file=sys.stderr)
        return code
    except BrokenPipeError:
        return 0
    except Exception as error:
        if args.debug:
            raise
        message, code = explain(error)
        if message:
            print(f"lemo {args.command}{_which_process()}: {message}", file=sys.stderr)
        return code
