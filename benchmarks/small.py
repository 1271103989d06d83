"""Steps of small models, whose kernels the host launches more slowly than a GPU runs them: lemo with and without CUDA
graphs (`LemoConfig(cuda_graphs=True)`), against transformers + PEFT with PyTorch's fastest attention.

Random bf16 weights in the shapes of the demo's model (6 layers, hidden size 256) and of SmolLM2-135M, LoRA r=8 on q, k,
v, o, one document whose labels are its ids, nothing recomputed; forward, backward and AdamW.

  python benchmarks/small.py                                      # less than a minute on an H100 or H200
  python benchmarks/small.py --only dense --shape smollm2-135m    # some of the rows
  python benchmarks/small.py --shape tiny --context 512           # a smoke run, also without a GPU

step_ms is the time of a step in a row of steps, by the host's clock after the GPU is done: the median of several rows,
step_ms_min and step_ms_max their spread. host_ms is the CPU time of the thread that runs the step; if it waits for the
GPU it spins, and the time counts. peak_mib is the most that PyTorch had allocated, reserved_mib what it holds.
time_ratio is the peer's time over ours (above 1: lemo is faster), graph_ratio the time without graphs over that with
them. replays counts the steps that ran as graphs, and error says why there were none.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import add_output, header, table, write_results
from models import Base, make_base, ours, release
from rivals import PLAIN, peer

COLUMNS = (
    "shape", "context", "row", "step_ms", "time_ratio", "graph_ratio", "host_ms", "peak_mib", "reserved_mib", "replays",
    "error",
)  # fmt: skip
SHAPES = {"demo": (4096,), "smollm2-135m": (2048, 8192)}
# Mode, and the policy and its options for blocks, of which half are kept.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "skip-shared": ("skip", {"policy": "random", "policy_options": {"shared": True}}),
    "skip-update-norm": ("skip", {"policy": "update_norm"}),
}


@contextmanager
def contestant(base: Base, row: str | None, graphs: bool) -> Iterator[tuple[Any, Any]]:
    """(model, controller); without lemo if row is None."""
    import lemo

    if row is None:
        with peer(base, PLAIN, "none") as found:
            yield found
        return
    mode, options = ROWS[row]
    settings = lemo.LemoConfig(phases=[lemo.Phase(mode, **options)], recompute="none", cuda_graphs=graphs)  # type: ignore[arg-type]
    with ours(base, settings) as found:
        yield found


def measure(model: Any, controller: Any, ids: torch.Tensor, steps: int, rounds: int) -> dict[str, Any]:
    cuda, trained = ids.is_cuda, [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=cuda)

    def run(count: int) -> tuple[float, float]:
        """Milliseconds of a step: until the device is done, and of this thread."""
        begin, own = time.perf_counter(), time.thread_time()
        for _ in range(count):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if controller is not None:
                controller.step()
        own = time.thread_time() - own
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / count * 1e3, own / count * 1e3

    run(3)  # the second one records
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = [run(steps) for _ in range(rounds)]
    times = [t for t, _ in found]
    result = {"step_ms": statistics.median(times), "step_ms_min": min(times), "step_ms_max": max(times)}
    result["host_ms"] = statistics.median(own for _, own in found)
    if cuda:
        result |= {
            "peak_mib": torch.cuda.max_memory_allocated() >> 20,
            "reserved_mib": torch.cuda.memory_reserved() >> 20,
        }
    return result


def measured(base: Base, row: str | None, graphs: bool, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    release(base)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, base.config.vocab_size, (1, tokens), generator=generator).to(base.device)
    found: dict[str, Any] = {"shape": base.name, "context": tokens, "row": PLAIN if row is None else row}
    if graphs:
        found["row"] += ", graphs"
    try:
        with contestant(base, row, graphs) as (model, controller):
            found |= measure(model, controller, ids, args.steps, args.rounds)
            if graphs:
                found["replays"] = controller.graphs.replays
                found["error"] = controller.graphs.reason
    except torch.OutOfMemoryError:
        found["error"] = "out of memory"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), help="demo, smollm2-135m, or another of models.py")
    parser.add_argument("--context", type=int, nargs="+", help="tokens (default: 4096 of the demo, 2048 and 8192)")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--steps", type=int, default=6, help="in a row")
    parser.add_argument("--rounds", type=int, default=5, help="rows of steps")
    add_output(parser, "small")
    args = parser.parse_args()
    print(header())
    rows: list[dict[str, Any]] = []
    for shape in args.shape:
        base = make_base(shape)
        for tokens in args.context or SHAPES.get(shape, (2048,)):
            rival = measured(base, None, False, tokens, args)
            rows.append(rival)
            for name in args.only:
                plain, recorded = (measured(base, name, graphs, tokens, args) for graphs in (False, True))
                if "step_ms" in plain and "step_ms" in recorded:
                    recorded["graph_ratio"] = plain["step_ms"] / recorded["step_ms"]
                for found in (plain, recorded):
                    if "step_ms" in found and "step_ms" in rival:
                        found["time_ratio"] = rival["step_ms"] / found["step_ms"]
                rows += [plain, recorded]
                write_results(args.out, rows)
    print(table(rows, COLUMNS))
    print(f"written to {write_results(args.out, rows)}")


if __name__ == "__main__":
    main()
