"""One LoRA step of a Llama-3-8B shape on several GPUs of one host: how much each further GPU adds.

  torchrun --nproc-per-node 4 benchmarks/scaling.py ddp                          # weak scaling: 64K tokens in each
  torchrun --nproc-per-node 4 benchmarks/scaling.py fsdp                         # FSDP2: 64K tokens in each
  torchrun --nproc-per-node 4 benchmarks/scaling.py sequence --context 524288 --only sparse-8k-keys
  torchrun --nproc-per-node 2 benchmarks/scaling.py sequence --model tiny --context 512      # a smoke run, on the CPU

ddp: the model in every process, a document of its own in each, gradients averaged by DistributedDataParallel. fsdp: the
same with every layer's weights divided (`fully_shard`). sequence: one document, divided among the processes
(`lemo.apply(..., sequence_group=...)`).

Each row is measured with 1, 2, 4, ... processes of one launch (--sizes); the others wait meanwhile. LoRA r=8 on q, k,
v, o, random bf16 weights, everything recomputed, rows as in step.py. step_ms is the median over the timed steps of the
slowest process's time, tokens_per_second that of all processes, peak_mib the largest of any. speedup is the rate over
that of one process, efficiency the same per process; both need size 1. The loss of `sequence` has to be the same for
all sizes: it is checked. Results: benchmarks/results/scaling-PART-GPU.json.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from common import header, short_device_name, table, write_results
from models import SHAPES, Base, make_base, make_model, release, with_adapters
from step import ROWS, Saving, settings
from torch import distributed

COLUMNS = (
    "part", "row", "processes", "context", "step_ms", "tokens_per_second", "speedup", "efficiency", "peak_mib", "loss",
    "error",
)  # fmt: skip
PARTS = ("ddp", "fsdp", "sequence")
# In bf16, the order of sums moves the loss of one document by less.
LOSS_LIMIT = 2e-3


@contextlib.contextmanager
def contestant(part: str, base: Base, row: str, group: Any) -> Iterator[tuple[Any, Any]]:
    """(what is called for a loss, the parameters that train), in the processes of a group. With FSDP2, the whole
    weights of `base` are let go once they are divided."""
    import lemo

    model = with_adapters(make_model(base))
    options: dict[str, Any] = {"sequence_group": group} if part == "sequence" else {}
    if part == "fsdp":
        divide(model, group, base.device.type)
        base.weights.clear()
    lemo.apply(model, settings(ROWS[row], Saving("full"), Path()), **options)
    called = model
    if part == "ddp" and distributed.get_world_size(group) > 1:
        devices = [base.device.index] if base.cuda else None
        called = torch.nn.parallel.DistributedDataParallel(model, devices, process_group=group)
    yield called, [p for p in model.parameters() if p.requires_grad]
    lemo.remove(model)


def divide(model: Any, group: Any, device: str) -> None:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh.from_group(group, device)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def measure(args: argparse.Namespace, row: str, group: Any, base: Base) -> dict[str, Any]:
    """Figures of this process: a step to warm up, then the timed ones."""
    part, tokens, steps = args.part, args.context, args.steps
    own = 0 if part == "sequence" else distributed.get_rank(group)
    generator = torch.Generator(base.device).manual_seed(2 + own)
    ids = torch.randint(0, base.config.vocab_size, (1, tokens), device=base.device, generator=generator)
    with contestant(part, base, row, group) as (called, trained):
        optimizer = torch.optim.AdamW(trained, lr=1e-4)
        loss, times = torch.zeros(()), []
        for i in range(steps + 1):
            finish(base, group)
            if i == 1 and base.cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss = called(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            finish(base, None)
            times.append(1e3 * (time.perf_counter() - start))
            loss = loss.detach()
    figures: dict[str, Any] = {"times": times[1:], "loss": loss.item()}
    return figures | ({"peak_mib": torch.cuda.max_memory_allocated() >> 20} if base.cuda else {})


def finish(base: Base, group: Any) -> None:
    """Waits for the device, and for the processes of a group."""
    if base.cuda:
        torch.cuda.synchronize()
    if group is not None:
        distributed.barrier(group)


def together(part: str, found: Sequence[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """One row of all processes' figures."""
    failed = [f["error"] for f in found if "error" in f]
    if failed:
        return {"error": failed[0]}
    step = statistics.median(max(times) for times in zip(*(f["times"] for f in found), strict=True))
    tokens = tokens if part == "sequence" else tokens * len(found)
    row: dict[str, Any] = {"step_ms": round(step, 1), "tokens_per_second": round(1e3 * tokens / step, 1)}
    row["loss"] = round(statistics.mean(f["loss"] for f in found), 4)
    if "peak_mib" in found[0]:
        row["peak_mib"] = max(f["peak_mib"] for f in found)
    return row


def compare(part: str, row: dict[str, Any], one: dict[str, Any] | None) -> dict[str, Any]:
    """A row with its rate against that of one process. Raises SystemExit if a divided document has another loss."""
    if one is None or "error" in row or "error" in one:
        return row
    if part == "sequence" and abs(row["loss"] - one["loss"]) > LOSS_LIMIT * abs(one["loss"]):
        raise SystemExit(f"the loss of {row['processes']} processes is {row['loss']}, of one {one['loss']}")
    speedup = row["tokens_per_second"] / one["tokens_per_second"]
    return row | {"speedup": round(speedup, 3), "efficiency": round(speedup / row["processes"], 3)}


def all_sizes(args: argparse.Namespace, groups: dict[int, Any]) -> list[dict[str, Any]]:
    """Every row with every number of processes; the same list in all of them."""
    rows: list[dict[str, Any]] = []
    rank, base = distributed.get_rank(), make_base(args.model, args.layers)
    for name in args.only:
        one = None
        for size, group in groups.items():
            mine: dict[str, Any] = {}
            if rank < size:
                try:
                    base = base if base.weights else make_base(args.model, args.layers)
                    mine = measure(args, name, group, base)
                except torch.OutOfMemoryError:
                    mine = {"error": "out of memory"}
            release(base)  # FSDP2's hooks and the model form a cycle, which would hold its weights in the next row
            found: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(found, mine)
            row = {"part": args.part, "row": name, "processes": size, "context": args.context}
            row |= together(args.part, found[:size], args.context)
            one = row if size == 1 else one
            rows.append(compare(args.part, row, one))
            if rank == 0:
                print(table(rows[-1:], COLUMNS), flush=True)
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--context", type=int, default=65536, help="tokens of a document (default: 65536)")
    parser.add_argument(
        "--only", nargs="+", choices=list(ROWS), default=["dense", "skip-0.5"], metavar="ROW", help="rows to measure"
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of processes (default: 1, 2, 4, ... and all)")
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama3-8b", help="shape (default: llama3-8b)")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a smoke run")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of every row (default: 3)")
    parser.add_argument("--out", help="result file, or a name in results/")
    args = parser.parse_args(arguments)
    args.out = args.out or f"scaling-{args.part}-{short_device_name()}"
    return args


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    args, made = parse(arguments), header()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    ours = not distributed.is_initialized()
    if ours:
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    world = distributed.get_world_size()
    sizes = sorted(args.sizes or {1 << i for i in range(world.bit_length()) if 1 << i <= world} | {world})
    if sizes[-1] > world or sizes[0] < 1:
        raise SystemExit(f"--sizes {sizes}: torchrun started {world} processes")
    groups = {size: distributed.new_group(list(range(size))) for size in sizes}
    rows = all_sizes(args, groups)
    if distributed.get_rank() == 0:
        write_results(args.out, rows, **made, model=args.model)
    if ours:
        distributed.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
