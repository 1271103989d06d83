"""lemo estimate: what fits, before anything is run."""

from __future__ import annotations

import argparse
import json
from typing import Any

from lemo.cli.common import Formatter, add_common, load_config, path_name
from lemo.training.settings import check_defaults_matter, parse_schedule

_EPILOG = """\
examples:
  lemo estimate --model MODEL --context 65536
  lemo estimate --model MODEL --context 262144 --schedule skip:0.3 --recompute full
  lemo estimate --model MODEL --context 65536 --schedule low-memory --json

Only the model's configuration is read, no weights. A schedule needs what its most memory-intensive phase
needs: the default's last phase is dense, so its peak is a dense step's; low-memory avoids that.
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "estimate",
        help="memory and cost of a run, before running it",
        description="Estimate the peak memory and the relative cost of a run, phase by phase, from the model's shape.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument(
        "--model", type=path_name, required=True, help="folder of a transformers causal LM, or its name on the hub"
    )
    parser.add_argument("--context", type=int, required=True, help="tokens per window")
    parser.add_argument("--batch", type=int, default=1, help="windows per forward pass")
    parser.add_argument("--schedule", default="default", help="preset or phases, as for lemo finetune")
    parser.add_argument("--keep", type=float, help="fraction of the blocks kept (default: 0.5)")
    parser.add_argument("--recompute", default="full", help="none, attention or full")
    parser.add_argument("--lora-rank", type=int, default=8, help="rank of the adapter")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lemo.engine.config import LemoConfig

    model = load_config(args.model, None, False)
    check_defaults_matter(args.schedule, args.keep, None)
    phases = parse_schedule(args.schedule, 0.5 if args.keep is None else args.keep)
    # Policies that predict need a calibration to be named; memory does not depend on what is in it.
    config = LemoConfig(phases=phases, recompute=args.recompute, calibration="calibration")
    from lemo import estimate

    result = estimate(model, config, args.context, args.batch, lora_rank=args.lora_rank)
    print(json.dumps(result, indent=1) if args.json else result)
    return 0
