"""lemo profile: where a step's time and memory go."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lemo.cli.common import (
    AS_THE_MODEL,
    Formatter,
    add_common,
    add_data,
    add_model,
    default_context,
    load_data,
    load_model,
    path_name,
    say,
)
from lemo.cli.recorded import AS_CALIBRATED, calibrated, say_calibrated
from lemo.storage import write_text
from lemo.training.settings import FinetuneSettings, parse_schedule

_DEFAULTS = FinetuneSettings()

_EPILOG = """\
examples:
  lemo profile --model MODEL --context 16384
      dense LoRA with transformers and PEFT, lemo with nothing eliminated, and lemo with half of the blocks skipped

  lemo profile --model MODEL --context 65536 --modes skip:0.3 sparse:keys=8192 --no-peer --html profile.html
      two modes of lemo, also as a page with bars, layers and memory

  lemo profile --model MODEL --context 8192 --data books/ --recompute none
      on text instead of random tokens, nothing recomputed

A step is one optimizer step: forward, loss, backward, AdamW. Each way of training is timed without the profiler, and
then recorded with it; the table states both, and how much of the step the parts account for. Modes are phases as
lemo finetune --schedule takes them. Policies that see the text choose other blocks in random tokens than in text.
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "profile",
        help="a step's time and memory by part, next to dense LoRA",
        description="Profile training steps: time and memory by part and by layer, of lemo and of dense LoRA.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    add_model(parser)
    add_data(parser, required=False)
    parser.add_argument(
        "--context",
        type=int,
        help=f"tokens per window (default: {AS_CALIBRATED}, else {_DEFAULTS.context}, {AS_THE_MODEL})",
    )
    parser.add_argument("--batch", type=int, default=1, help="windows per step")
    parser.add_argument(
        "--modes",
        nargs="+",
        action="extend",
        metavar="PHASE",
        help=f"of lemo (default: dense, and skip with what the calibration keeps, else {_DEFAULTS.keep:g})",
    )
    parser.add_argument("--no-peer", action="store_true", help="leave transformers and PEFT out")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, and as many recorded")
    parser.add_argument(
        "--block-size", type=int, help=f"tokens per block (default: {AS_CALIBRATED}, else {_DEFAULTS.block_size})"
    )
    parser.add_argument("--recompute", default="full", help="none, attention or full (of the peer: none or all layers)")
    parser.add_argument("--lora-rank", type=int, default=8, help="rank of the adapter")
    parser.add_argument("--calibration", type=path_name, help="folder written by lemo calibrate")
    parser.add_argument("--html", type=path_name, metavar="FILE", help="write a page, too")
    add_common(parser)
    parser.set_defaults(run=run)


def _documents(args: argparse.Namespace, config: Any) -> Any:
    """Those of --data, or random tokens."""
    if args.data:
        return load_data(args, config)
    import numpy as np

    from lemo.data import Documents

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 4 * args.context * args.batch, dtype=np.int64)
    return Documents.from_arrays([tokens[i::4] for i in range(4)], [0] * 4, ["random tokens"])


def _complete(args: argparse.Namespace) -> None:
    """Options that are not given: as the calibration was made, or the defaults."""
    taken = calibrated(args, ("context", "block_size") if args.modes else ("context", "block_size", "keep"))
    say_calibrated(args, taken)
    keep = taken.pop("keep", _DEFAULTS.keep)
    if args.context is None:
        args.context = taken.get("context") or default_context(args, _DEFAULTS.context)
    if args.block_size is None:
        args.block_size = taken.get("block_size", _DEFAULTS.block_size)
    args.modes = args.modes or ["dense", f"skip:{keep:g}"]


def run(args: argparse.Namespace) -> int:
    from lemo.predictors import model_fingerprint
    from lemo.predictors.store import check_calibrated_for
    from lemo.study.profile import profile_modes
    from lemo.study.profile_page import as_text, profile_page
    from lemo.training.run_folder import environment

    _complete(args)
    for mode in args.modes:
        if len(parse_schedule(mode)) != 1:
            raise ValueError(
                f"--modes {mode}: expected single phases, as in skip:0.5; give several separated by spaces"
            )
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps}: expected at least 1")
    settings = FinetuneSettings(
        schedule=",".join(args.modes),  # so that one that is refused is before others are measured
        context=args.context,
        batch=args.batch,
        block_size=args.block_size,
        recompute=args.recompute,
        lora_rank=args.lora_rank,
        calibration=args.calibration,
    )
    model = load_model(args, args.context, to_train=True)
    if args.calibration is not None:  # before the peer is profiled, which has no use for it
        check_calibrated_for(args.calibration, model_fingerprint(model))
    documents = _documents(args, model.config)
    peer = not args.no_peer
    profiles = profile_modes(model, documents, settings, args.modes, peer=peer, steps=args.steps, report=say)
    print(as_text(profiles))
    if args.html:
        about = {
            "model": args.model,
            "data": args.data or "random tokens",
            "context": args.context,
            "batch": args.batch,
        }
        about |= {"recompute": args.recompute, "rank": args.lora_rank, "steps": args.steps}
        about |= environment(next(model.parameters()).device)
        write_text(Path(args.html), profile_page(f"lemo profile: {Path(args.model).name}", profiles, about))
        say(f"wrote {args.html}")
    return 0 if any(not p.error for p in profiles) else 1
