"""Measures results again: the commands that benchmarks/README.md lists, on the GPUs at hand.

  python benchmarks/suite.py                                          # what there is, and how long it takes on one H200
  python benchmarks/suite.py step-backward-h200 ops --gpus 0 1        # these, a GPU each, as GPUs become free
  python benchmarks/suite.py all --minutes 25                         # what fits; the longest first

Each command writes its results file as it would by hand; names are those of the files, without the GPU where the script
adds it. Nothing starts that would end after --minutes, by the times of the list, and what still runs then is ended:
most scripts write their rows as they are measured. What they print is in --logs, a file each. Exit status 1 if one
failed. Other work on a GPU spoils what is measured on it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from common import ROOT, table

LIST = ROOT / "benchmarks" / "README.md"
BEGIN = "One command for each table"
COMMENT = re.compile(r"# (.*): ([\d.]+) minutes?$")


@dataclass(frozen=True)
class Measurement:
    name: str
    what: str
    minutes: float
    words: tuple[str, ...]  # of the command, after "python"


def name_of(words: Sequence[str]) -> str:
    """Of its results file; of the script and its part if the script names the file."""
    if "--out" in words:
        return words[words.index("--out") + 1]
    part = [word for word in words[1:2] if not word.startswith("-")]
    return "-".join([Path(words[0]).stem, *part])


def listed(text: str) -> list[Measurement]:
    """From the indented lines below BEGIN: a comment that ends in the minutes, and its command. Raises ValueError."""
    found = []
    lines = text[text.index(BEGIN) :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("    "))
    block = [line.strip() for line in lines[first:]]
    block = block[: block.index("")]
    if len(block) % 2:
        raise ValueError(f"{LIST.name}: expected a comment and a command in turn below {BEGIN!r}")
    for comment, command in zip(block[::2], block[1::2], strict=True):
        said, words = COMMENT.fullmatch(comment), shlex.split(command)
        if said is None or words[:1] != ["python"]:
            raise ValueError(
                f'{LIST.name}: expected "# WHAT: N minutes" and a python command, got {comment!r}, {command!r}'
            )
        found.append(Measurement(name_of(words[1:]), said[1], float(said[2]), tuple(words[1:])))
    return found


@dataclass(frozen=True)
class Running:
    measurement: Measurement
    process: subprocess.Popen[bytes]
    log: TextIO
    start: float


def begin(measurement: Measurement, gpu: str | None, logs: Path) -> Running:
    log = (logs / f"{measurement.name}.log").open("w")
    environment = dict(os.environ) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    command = [sys.executable, *measurement.words]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    print(f"{measurement.name}: begins" + f" on GPU {gpu}" * (gpu is not None), flush=True)
    return Running(measurement, process, log, time.monotonic())


def measure(wanted: Sequence[Measurement], gpus: Sequence[str | None], deadline: float, logs: Path) -> list[str]:
    """Names of those that failed, were ended, or were not begun."""
    waiting = sorted(wanted, key=lambda m: -m.minutes)
    running: dict[str | None, Running] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            now = time.monotonic()
            for gpu in gpus:
                fits = next((m for m in waiting if now + 60 * m.minutes <= deadline), None)
                if gpu not in running and fits is not None:
                    waiting.remove(fits)
                    running[gpu] = begin(fits, gpu, logs)
            for gpu, one in list(running.items()):
                late = now > deadline
                if late:
                    one.process.terminate()
                    one.process.wait()
                if (status := one.process.poll()) is not None:
                    del running[gpu]
                    one.log.close()
                    how = "ended at the limit" if late else f"exit status {status}"
                    print(f"{one.measurement.name}: {how} after {(now - one.start) / 60:.1f} minutes", flush=True)
                    failed += [one.measurement.name] if status or late else []
            if not running and not any(now + 60 * m.minutes <= deadline for m in waiting):
                break
            time.sleep(0.2)
    finally:
        for one in running.values():
            one.process.terminate()
            one.log.close()
    for m in waiting:
        print(f"{m.name}: not begun, for want of time ({m.minutes:g} minutes)")
    return failed + [m.name for m in waiting]


def main(arguments: Sequence[str] | None = None) -> int:
    known = {m.name: m for m in listed(LIST.read_text())}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="what to measure, or all (default: print the list)")
    parser.add_argument(
        "--gpus", nargs="+", metavar="N", help="numbers of GPUs, one command on each at a time (default: the first)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for everything together")
    parser.add_argument(
        "--logs", type=Path, default=Path("runs") / "suite", metavar="FOLDER", help="(default: runs/suite)"
    )
    args = parser.parse_args(arguments)
    if not args.names:
        rows = [{"name": m.name, "minutes": f"{m.minutes:g}", "what": m.what} for m in known.values()]
        print(table(rows, ("name", "minutes", "what")))
        return 0
    names = list(known) if args.names == ["all"] else args.names
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no measurement is called {unknown[0]!r}; there are {', '.join(known)}")
    if args.minutes <= 0:
        parser.error(f"--minutes: expected more than 0, got {args.minutes:g}")
    args.logs.mkdir(parents=True, exist_ok=True)
    failed = measure(
        [known[name] for name in names], args.gpus or [None], time.monotonic() + 60 * args.minutes, args.logs
    )
    if failed:
        print(f"not measured in full: {', '.join(failed)} (see {args.logs})", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
