"""lemo estimate: what fits, before anything is run."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lemo.cli.common import Formatter, add_common, load_config, offload, path_name, recompute_layers, size
from lemo.engine.sizes import GPUS, gpu_bytes
from lemo.training.settings import check_defaults_matter, default_schedule, parse_stages

_EPILOG = f"""\
examples:
  lemo estimate --model MODEL --context 65536
  lemo estimate --model MODEL --context 262144 --schedule skip:0.3 --recompute full
  lemo estimate --model MODEL --context 65536 --schedule low-memory --json
  lemo estimate --model MODEL --gpu h100
      the longest context of every mode on that GPU, without and with offload to host memory
  lemo estimate --model MODEL --gpu 24GiB --schedule sparse:keys=8192:keep=0.3
  lemo estimate --model MODEL --context 65536 --schedule sparse:0.25:window=1/2@0.7,dense@0.3
      windows of half the context first: their phase is counted with so many tokens
  lemo estimate --model MODEL --context 131072 --memory-budget 74GiB --offload auto
      what every layer would save within a budget, as lemo finetune with the same options decides it

Only the model's configuration is read, no weights. A schedule needs what its most memory-intensive phase
needs: the default's last phase is dense, so its peak is a dense step's; low-memory avoids that.

GPUs (--gpu): a size, or {", ".join(sorted(GPUS))}. What a GPU holds is
what torch reports; 1 GiB and 5 % of it are left for the CUDA context and fragmentation.
"""

# What --gpu compares, if no schedule is given.
_MODES = "dense,backward:{keep}:weighted,skip:{keep},sparse:keys=8192,sparse:keys=8192:keep={keep}"


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "estimate",
        help="memory of a run, and the longest context of a GPU, before running it",
        description="Estimate the peak memory of a run, phase by phase, from the model's shape; or the longest context "
        "that fits a GPU, mode by mode.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument(
        "--model", type=path_name, required=True, help="folder of a transformers causal LM, or its name on the hub"
    )
    parser.add_argument("--context", type=int, help="tokens per window")
    parser.add_argument("--gpu", help="a GPU's name or memory: prints the longest context that fits it")
    parser.add_argument("--batch", type=int, default=1, help="windows per forward pass")
    parser.add_argument(
        "--schedule",
        help="preset or phases, as for lemo finetune (default: as there, by --context; --gpu: each mode)",
    )
    parser.add_argument("--keep", type=float, help="fraction of the blocks kept (default: 0.5)")
    parser.add_argument("--recompute", help="none, attention or full (default: full)")
    parser.add_argument("--memory-budget", type=size, help="memory that a step may take: layers save what fits")
    parser.add_argument(
        "--offload", type=offload, help="saved rows in host memory: all, auto, a number of layers, or at most a size"
    )
    parser.add_argument(
        "--recompute-layers",
        type=recompute_layers,
        help="layers that run again in segments: auto (needs --memory-budget), least, none, or layers of a segment",
    )
    parser.add_argument("--lora-rank", type=int, default=8, help="rank of the adapter")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check(args)
    model = load_config(args.model, None, False)
    result = [_longest(args, model)] if args.gpu is not None else []
    if args.context is not None:
        result.append(_estimate(args, model))
    if args.json:
        print(json.dumps(result[0] if len(result) == 1 else {"longest": result[0], "estimate": result[1]}, indent=1))
    else:
        print("\n\n".join(str(r) for r in result))
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that are missing, or that would have no effect."""
    if args.context is None and args.gpu is None:
        raise ValueError("give --context (the memory of its steps), --gpu (the longest context that fits), or both")
    given = {
        "--recompute": args.recompute,
        "--memory-budget": args.memory_budget,
        "--offload": args.offload,
        "--recompute-layers": args.recompute_layers,
    }
    useless = [name for name, value in given.items() if value is not None] if args.context is None else []
    if useless:
        raise ValueError(
            f"{', '.join(useless)}: no effect on the longest context, which is shown with everything recomputed, "
            "without and with offload, and with segments of layers that run again: leave it out, or give --context"
        )


def _estimate(args: argparse.Namespace, model: Any) -> Any:
    from lemo import estimate
    from lemo.engine.config import LemoConfig

    schedule = args.schedule or default_schedule(args.context, args.keep, None, None)
    check_defaults_matter(schedule, args.keep, None)
    stages = parse_stages(schedule, _keep(args))
    # Policies that predict need a calibration to be named; memory does not depend on what is in it.
    config = LemoConfig(
        phases=[stage.phase for stage in stages],
        recompute=args.recompute or ("full" if args.memory_budget is None else "auto"),
        memory_budget=args.memory_budget,
        offload=args.offload or False,
        recompute_layers="auto" if args.recompute_layers is None else args.recompute_layers,
        calibration="calibration",
    )
    windows = [stage.window for stage in stages]
    shortest = min(int(args.context * window) for window in windows)
    if min(windows) < 1 and shortest < config.block_size:
        raise ValueError(
            f"--schedule {schedule}: expected windows of at least one block of {config.block_size} tokens, as lemo "
            f"finetune does; of a context of {args.context}, the shortest have {shortest}"
        )
    return estimate(model, config, args.context, args.batch, windows=windows, lora_rank=args.lora_rank)


def _longest(args: argparse.Namespace, model: Any) -> Any:
    from lemo import longest
    from lemo.engine.config import LemoConfig

    if args.schedule is not None:
        check_defaults_matter(args.schedule, args.keep, None)
    schedule = args.schedule or _MODES.format(keep=_keep(args))
    stages = parse_stages(schedule, _keep(args))
    config = LemoConfig(phases=[stage.phase for stage in stages], calibration="calibration")
    try:
        gpu = gpu_bytes(args.gpu)
    except ValueError as error:
        raise ValueError(f"--gpu: {error}") from None
    windows = [stage.window for stage in stages]
    return longest(model, gpu, config, args.batch, windows=windows, lora_rank=args.lora_rank)


def _keep(args: argparse.Namespace) -> float:
    return 0.5 if args.keep is None else args.keep
