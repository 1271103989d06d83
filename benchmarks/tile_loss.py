"""What leaving out pairs of tiles does to a model's predictions: its loss in mode "sparse" against the exact one.

No training: the language-modelling loss of documents of real text, forward only, through `lemo` with every limit and
tile policy. excess is what the loss has more than with dense attention, and over_default what it has more than with the
default policy at the same limit, each with half its 95 % interval over documents (paired). computed is the share of the
pairs of tiles, covered the share of attention that the policy takes them to hold; both are means over layers and
documents.

  python benchmarks/tile_loss.py --model smollm2 --context 8192      # benchmarks/smollm2.py makes the model
  python benchmarks/tile_loss.py --model smollm2 --context 4096 --limit density=0.25 --policy probe recent
  python benchmarks/tile_loss.py --model smollm2 --context 2048 --documents 1 --out /tmp/loss.json

Results are written after every document. The text is source code of installed packages. In float32 on the CPU, bfloat16
on a GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import add_output, header, table, write_results
from lemo.training.evaluate import student_quantile
from tile_coverage import texts
from torch import Tensor

# Every rule with every policy that knows it. Shares of attention follow the densities, to be compared at equal ones.
LIMITS: tuple[dict[str, Any], ...] = (
    {"density": 0.5},
    {"density": 0.25},
    {"density": 0.125},
    {"keys": 640},  # as many pairs as density 0.25 at 4K tokens
    {"keys": 1152},  # the same at 8K
    {"mass": 0.93},
    {"mass": 0.85},
)
# The default first: it is what the others are compared with.
POLICIES: dict[str, dict[str, Any]] = {
    "probe": {},
    "probe, 8 rows": {"tile_options": {"rows": 8}},
    "probe, 2 rows": {"tile_options": {"rows": 2}},
    "probe, mean": {"tile_options": {"rank": "mean"}},
    "probe, mean, 2 rows": {"tile_options": {"rank": "mean", "rows": 2}},
    "recent": {"tile_policy": "recent"},
}
COLUMNS = ("limit", "policy", "computed", "covered", "loss", "excess", "excess_half", "over_default", "over_half")


def limit_text(limit: dict[str, Any]) -> str:
    return " ".join(f"{name}={value:g}" for name, value in limit.items())


def settings(limits: Sequence[str], policies: Sequence[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """(limit, policy, arguments of the phase) of the named ones."""
    return [
        (limit_text(limit), name, limit | policy)
        for limit in LIMITS
        for name, policy in POLICIES.items()
        if limit_text(limit) in limits and name in policies and not ("mass" in limit and name == "recent")
    ]


def difference(mine: Sequence[float], other: Sequence[float]) -> tuple[float, float | None]:
    """Mean difference over documents, and half the width of its 95 % interval; None with one document."""
    differences = [a - b for a, b in zip(mine, other, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return mean, None
    return mean, student_quantile(0.95, n - 1) * statistics.stdev(differences) / math.sqrt(n)


def with_differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the columns that compare a row's losses with those of others; the first row is dense."""
    defaults = {row["limit"]: row["losses"] for row in rows if row["policy"] == next(iter(POLICIES))}
    for row in rows:
        row["loss"] = statistics.fmean(row["losses"])
        row["excess"], row["excess_half"] = difference(row["losses"], rows[0]["losses"])
        other = defaults.get(row["limit"])
        row["over_default"], row["over_half"] = (None, None) if other is None else difference(row["losses"], other)
    return rows


def measure(model: Any, ids: Tensor, phase: Any) -> dict[str, list[float]]:
    """Loss of a document in one mode, and what its attention computed in every layer."""
    import lemo

    controller = lemo.apply(model, lemo.LemoConfig(phases=[phase], recompute="full"))
    try:
        loss = float(model(input_ids=ids[None], labels=ids[None]).loss.detach())
        report = controller.report()
    finally:
        lemo.remove(model)
    if phase.mode == "dense":
        return {"losses": [loss], "computed": [1.0], "covered": [1.0]}
    covered = [c for c in report["covered"] if c is not None]
    return {"losses": [loss], "computed": report["density"], "covered": covered}


def summary(found: dict[tuple[str, str], list[dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """Rows of the results from what was measured, by limit and policy, of every document; dense first."""
    rows = []
    for (limit, policy), documents in found.items():
        losses, computed, covered = (
            [x for document in documents for x in document[name]] for name in ("losses", "computed", "covered")
        )
        row = {"limit": limit, "policy": policy, "computed": statistics.fmean(computed)}
        rows.append(row | {"covered": statistics.fmean(covered) if covered else None, "losses": losses})
    return with_differences(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model that lemo supports")
    parser.add_argument("--context", type=int, default=8192, help="tokens per document (default: 8192)")
    parser.add_argument("--documents", type=int, default=4, help="documents to read (default: 4)")
    limits = [limit_text(limit) for limit in LIMITS]
    parser.add_argument("--limit", nargs="+", choices=limits, default=limits, help="default: all")
    parser.add_argument("--policy", nargs="+", choices=list(POLICIES), default=list(POLICIES), help="default: all")
    add_output(parser, "sparse-smollm2")
    args = parser.parse_args(arguments)
    if args.context < 1024 or args.documents < 1:
        parser.error("--context: expected at least 1024 tokens, and --documents at least 1")
    if not Path(args.model).is_dir():
        parser.error(
            f"--model: {args.model} is not a folder; python benchmarks/smollm2.py --out {args.model} makes one"
        )
    import lemo
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = header()
    cuda = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.bfloat16 if cuda else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to("cuda" if cuda else "cpu").train()
    model.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_()  # lemo runs where something trains
    phases = {("none", ""): lemo.Phase("dense")}
    for limit, policy, options in settings(args.limit, args.policy):
        phases[limit, policy] = lemo.Phase("sparse", **options)
    found: dict[tuple[str, str], list[dict[str, list[float]]]] = {}
    with tqdm(total=args.documents * len(phases), unit=" forward passes") as bar:
        for i, ids in enumerate(texts(tokenizer, args.context, args.documents)):
            for place, phase in phases.items():
                found.setdefault(place, []).append(measure(model, ids.to(model.device), phase))
                bar.update()
            same = {"context": args.context, "documents": i + 1}
            path = write_results(args.out, summary(found), **made, model=Path(args.model).name, settings=same)
    print(table(summary(found), COLUMNS))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
