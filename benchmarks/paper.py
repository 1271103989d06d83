"""The models of the paper (arXiv 2501.09767) at its lengths, nothing recomputed: lemo against dense LoRA.

  python benchmarks/paper.py                                    # five shapes: about 4 minutes on an H200
  python benchmarks/paper.py --only llama3-8b opt-1.3b
  python benchmarks/paper.py --only tiny tiny-opt tiny-opt-350m    # a smoke run: no GPU needed, no memory figures

Random bf16 weights, LoRA r=8 alpha=16 on q, k, v, o, one document, forward, backward and AdamW, as in step.py. The peer
is what the paper calls LoRA: transformers + PEFT, here with the fastest attention that PyTorch has. Rows:

  dense       lemo, nothing eliminated
  upper-0.4   0.4 of the tokens kept in the upper half of the layers, everything in the lower half: what the paper's
              published code does, 0.7 on average
  skip-0.5    half of the tokens kept in every layer

time_times and memory_times are the peer's figure over ours (above 1: lemo takes less). paper_lora_mib, paper_mib and
their quotient paper_memory_times are the paper's own peaks for the model and length, from the logs that its authors
published (one A800 with 80 GB); empty where they have none, as for the time of these steps. Its abstract says up to
1.93 times less memory and up to 1.36 times faster over all settings. Results: benchmarks/results/paper-GPU.json.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import add_output, header, table, write_results
from models import Base, make_base, ours, release
from rivals import PLAIN, peer
from step import ROWS, Saving, check, measure, settings

COLUMNS = (
    "model", "row", "context", "kept", "step_ms", "time_times", "peak_mib", "memory_times", "paper_lora_mib",
    "paper_mib", "paper_memory_times", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A model and a length of the paper. lora_mib, paper_mib: its peaks of LoRA and of its own system."""

    model: str
    tokens: int
    lora_mib: int | None = None
    paper_mib: int | None = None


CASES = (
    Case("llama2-7b", 8192, 72507, 43962),
    Case("llama3-8b", 8192, 78701, 42097),
    Case("opt-6.7b", 8192),
    Case("opt-1.3b", 16384, 44384, 28068),
    Case("opt-350m", 32768, 51945, 27565),
)
SMOKE = (Case("tiny", 320), Case("tiny-opt", 320), Case("tiny-opt-350m", 320))
MODELS = {case.model: case for case in (*CASES, *SMOKE)}


def configs(base: Base) -> dict[str, Any]:
    """lemo's settings by row."""
    import lemo

    layers = base.config.num_hidden_layers
    phase = lemo.Phase("skip", keep=0.4, policy="update_norm")
    upper = lemo.LemoConfig(phases=[phase], recompute="none", layers=range(layers // 2, layers))
    return {
        "dense": settings(ROWS["dense"], Saving("none"), Path()),
        "upper-0.4": upper,
        "skip-0.5": settings(ROWS["skip-0.5"], Saving("none"), Path()),
    }


def compare(row: dict[str, Any], other: dict[str, Any] | None, case: Case) -> dict[str, Any]:
    """A row with the peer's figures and the paper's, and what either is of its LoRA."""
    if case.lora_mib is not None and case.paper_mib is not None:
        row = row | {"paper_lora_mib": case.lora_mib, "paper_mib": case.paper_mib}
        row["paper_memory_times"] = round(case.lora_mib / case.paper_mib, 3)
    if other is None:
        return row
    row = row | {"peer": other["method"]}
    for name, times in (("step_ms", "time_times"), ("peak_mib", "memory_times")):
        if name in other:
            row[f"peer_{name}"] = other[name]
        if name in other and name in row:
            row[times] = round(other[name] / row[name], 3)
    return row


def rows_of(case: Case, base: Base, steps: int) -> Iterator[dict[str, Any]]:
    same = {"context": case.tokens, "recompute": "none", "model": base.name}
    other = {"row": "peer", "method": PLAIN, "mode": "dense"} | same
    other |= measure(base, peer(base, PLAIN, "none"), case.tokens, steps)
    yield compare(other, other, case)
    release(base)
    checked = check(base, PLAIN, Saving("none"), min(2048, case.tokens))
    for name, config in configs(base).items():
        release(base)
        row = {"row": name, "method": "lemo", "mode": config.phases[0].mode, "check": checked} | same
        row |= measure(base, ours(base, config), case.tokens, steps)
        yield compare(row, other, case)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.model for case in CASES]
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=names, metavar="MODEL", help="models")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per row (default: 5)")
    add_output(parser, "paper")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    made = header()  # before anything is written: a results file under version control would make the commit "-dirty"
    warnings.filterwarnings("ignore", category=FutureWarning)  # new names in transformers that old versions lack
    rows: list[dict[str, Any]] = []
    for model in args.only:
        base = make_base(model)
        for row in rows_of(MODELS[model], base, args.steps):
            release(base)
            rows.append(row)
            print(table([row], COLUMNS), flush=True)
            write_results(args.out, rows, **made)
        base.weights.clear()
    print(table(rows, COLUMNS))
    print(write_results(args.out, rows, **made))
    return int(any("error" in row and row["method"] == "lemo" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
