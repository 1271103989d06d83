"""Does a step take the memory that `lemo estimate` says, and does it keep to it?

  python benchmarks/memory.py estimate                                   # ten settings: about 2 minutes on an H200
  python benchmarks/memory.py growth                                     # 200 steps of varying lengths, in three modes
  python benchmarks/memory.py growth --model tiny --context 256 --steps 6    # a smoke run, also without a GPU

estimate: the peak of one step of a Llama-3-8B shape, as PyTorch counts what is allocated, against the estimate that was
made from the model's configuration alone. error is estimate / measured - 1; exit 1 if one is beyond its limit: 5 %, and
10 % in the weighted phase, whose estimate has room for a draw that keeps more. Without a GPU there is nothing to
measure it by, and the rows have estimates only.

growth: 200 steps of documents of random lengths up to the context, of which the first and the last have all of it.
live_mib is what is allocated after a step, reserved_mib what the allocator holds, both after the first step, and how
many bytes more after the last; host_mib is pinned host memory (of offloaded rows). What is allocated may grow by less
than 1 MiB (the lists of the last step's draw are part of it), what is reserved by 2 % (the allocator keeps blocks that
fit none of the next requests); exit 1 otherwise. On the CPU, live_mib counts the storages of all tensors that Python
can reach. Results: benchmarks/results/memory-PART-GPU.json.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import header, short_device_name, table, write_results
from models import SHAPES, Base, make_base, ours, release
from step import ROWS, Row, Saving, document, settings

MIB = 1 << 20
LIVE_LIMIT, RESERVED_LIMIT = MIB, 0.02


@dataclass(frozen=True)
class Setting:
    """One step whose memory is estimated. budget: in place of `recompute`. limit: of the estimate's error."""

    row: Row
    tokens: int
    recompute: str = "full"
    offload: int | str = 0
    budget: str | None = None
    limit: float = 0.05

    def config(self, layers: int) -> Any:
        import lemo

        if self.budget is None:
            offload = min(self.offload, layers) if isinstance(self.offload, int) else self.offload
            return settings(self.row, Saving(self.recompute, offload), Path())
        plain = settings(self.row, Saving("auto"), Path())
        return lemo.LemoConfig(phases=plain.phases, memory_budget=self.budget, offload=self.offload or False)


# Contexts are as short as a share of the weights in the peak allows that does not hide an error.
SETTINGS = (
    Setting(ROWS["dense"], 65536, "full"),
    Setting(ROWS["dense"], 32768, "attention", "all"),
    Setting(ROWS["dense"], 8192, "none"),
    Setting(ROWS["skip-0.5"], 65536, "full"),
    Setting(ROWS["skip-0.5"], 65536, "attention", 16),
    Setting(ROWS["skip-0.3"], 16384, "none"),
    Setting(Row("backward", 0.5, "random"), 32768),
    Setting(ROWS["sparse-8k-keys"], 32768, "full", "all"),
    Setting(ROWS["dense"], 32768, budget="48GiB"),
    Setting(ROWS["backward-0.5"], 32768, limit=0.1),
)


class Trainer:
    """A model under lemo, and its steps as step.py takes them."""

    def __init__(self, base: Base, model: Any) -> None:
        self.base, self.model = base, model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(self, tokens: int) -> None:
        ids = document(self.base, tokens)
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# --- estimate ---------------------------------------------------------------------------------------------------------


def estimated(base: Base, setting: Setting, tokens: int) -> dict[str, Any]:
    """The row of a setting, with its peak where there is a GPU to measure it on."""
    import lemo

    config = setting.config(base.config.num_hidden_layers)
    expected = lemo.estimate(base.config, config, tokens)["phases"][0]
    row = {
        "setting": setting.row.describe(),
        "context": tokens,
        "recompute": "by budget" if setting.budget else setting.recompute,
        "offload": setting.offload,
        "budget": setting.budget,
        "model": base.name,
        "estimate_mib": round(expected["peak"] / MIB),
        "host_mib": round(expected["host"] / MIB),
        "limit": setting.limit,
    }
    if not base.cuda:
        return row
    with ours(base, config) as (model, _):
        trainer = Trainer(base, model)
        trainer.step(tokens)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        trainer.step(tokens)
        torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated()
    return row | {"measured_mib": round(measured / MIB), "error": round(expected["peak"] / measured - 1, 4)}


def estimates(base: Base, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for setting in SETTINGS:
        tokens = min(setting.tokens, args.context or setting.tokens)
        rows.append(estimated(base, setting, tokens))
        release(base)
    return rows


# --- growth -----------------------------------------------------------------------------------------------------------


def held(base: Base) -> dict[str, int]:
    """Bytes after a step."""
    if base.cuda:
        torch.cuda.synchronize()
        return {"live": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    return {"live": sum({s.data_ptr(): s.nbytes() for s in storages}.values())}


def lengths(context: int, steps: int) -> list[int]:
    """The longest first, which needs the most of everything, and last, so that the same is compared."""
    draw = random.Random(0)
    return [context, *(draw.randint(context // 8, context) for _ in range(steps - 2)), context]


def growth(base: Base, name: str, context: int, steps: int, recompute: str, offload: int | str) -> dict[str, Any]:
    """Bytes that are held after the first step, and by how much they grow up to the last."""
    found: dict[int, dict[str, int]] = {}
    with ours(base, settings(ROWS[name], Saving(recompute, offload), Path())) as (model, controller):
        trainer = Trainer(base, model)
        for i, tokens in enumerate(lengths(context, steps)):
            trainer.step(tokens)
            controller.step()  # what it remembers of a step's passes is let go
            if i in (0, steps - 1):
                found[i] = held(base)
        memory = controller.report()["memory"]
    first, last = found[0], found[steps - 1]
    row = {"row": name, "context": context, "recompute": recompute, "offload": offload, "model": base.name}
    row |= {"steps": steps}
    for kind in first:
        row |= {f"{kind}_mib": round(first[kind] / MIB, 3), f"{kind}_growth_bytes": last[kind] - first[kind]}
    return row | ({"host_mib": round(memory["host_bytes"] / MIB, 1)} if memory else {})


def grown(row: dict[str, Any]) -> bool:
    """Whether a row holds more after its last step than it may."""
    reserved = row.get("reserved_growth_bytes", 0) / MIB
    return row["live_growth_bytes"] >= LIVE_LIMIT or reserved > RESERVED_LIMIT * row.get("reserved_mib", 0)


def growths(base: Base, args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name, recompute, offload in (
        ("dense", "full", 0),
        ("skip-0.5", "attention", "all"),
        ("backward-0.5", "full", 0),
    ):
        rows.append(growth(base, name, args.context or 4096, args.steps, recompute, offload))
        release(base)
    return rows


# --- the command ------------------------------------------------------------------------------------------------------

COLUMNS = {
    "estimate": (
        "setting", "context", "recompute", "offload", "budget", "estimate_mib", "measured_mib", "error", "limit",
    ),
    "growth": (
        "row", "context", "recompute", "offload", "steps", "live_mib", "live_growth_bytes", "reserved_mib",
        "reserved_growth_bytes", "host_mib",
    ),
}  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["estimate", "growth"])
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama3-8b", help="shape (default: llama3-8b)")
    parser.add_argument(
        "--context", type=int, help="estimate: no setting has more tokens; growth: the longest (default: 4096)"
    )
    parser.add_argument("--steps", type=int, default=200, help="growth: steps per row (default: 200)")
    parser.add_argument("--out", help="result file, or a name in results/ (default: memory-PART-GPU)")
    args = parser.parse_args(arguments)
    if args.context is not None and args.context < 128:
        parser.error(f"--context: expected at least 128 tokens, got {args.context}")
    if args.steps < 2:
        parser.error(f"--steps: expected at least 2, got {args.steps}")
    args.out = args.out or f"memory-{args.part}-{short_device_name()}"
    return args


def main() -> int:
    args = parse()
    made = header()  # before anything is written: a results file under version control would make the commit "-dirty"
    base = make_base(args.model)
    rows = estimates(base, args) if args.part == "estimate" else growths(base, args)
    print(table(rows, COLUMNS[args.part]))
    print(write_results(args.out, rows, **made))
    if args.part == "growth":
        return int(any(map(grown, rows)))
    return int(any(abs(row.get("error", 0.0)) > row["limit"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
