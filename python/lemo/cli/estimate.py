"""lemo estimate: what fits, before anything is run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lemo.cli.common import DTYPES, INTERPOLATE, Formatter, add_common, load_config, path_name, say
from lemo.cli.finetune import MEMORY, add_settings, complete_settings, given_settings
from lemo.cli.recorded import calibrated, say_calibrated
from lemo.engine.sizes import GPUS, gpu_bytes
from lemo.training.settings import FinetuneSettings

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

Options that decide the memory of a step are those of lemo finetune, and mean the same. Only the model's
configuration is read, no weights. A schedule needs what its most memory-intensive phase
needs: the last phase of default is dense, so its peak is a dense step's; low-memory avoids that.

GPUs (--gpu): a size, or {", ".join(sorted(GPUS))}. What a GPU holds is
what torch reports; 1 GiB and 5 % of it are left for the CUDA context and fragmentation.
"""

# What --gpu compares, if no schedule is given.
_MODES = "dense,backward:{keep}:weighted,skip:{keep},sparse:keys=8192,sparse:keys=8192:keep={keep}"

_TEXTS = {
    "schedule": "preset or phases, as for lemo finetune (default: as there, by --context, and of a run with "
    "--answers-only whole-documents, which has to be named here; --gpu: each mode)",
    "policy": "how blocks are chosen, as for lemo finetune",
    "calibration": "folder written by lemo calibrate; if it is there, --context, --block-size and --keep are its own "
    "unless given, as for lemo finetune",
}


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
    parser.add_argument(
        "--context", type=int, help="tokens per window (default: as --calibration was made; none with --gpu)"
    )
    parser.add_argument("--gpu", help="a GPU's name or memory: prints the longest context that fits it")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and activations (default: bfloat16, as on a GPU; on the CPU a run takes float32)",
    )
    parser.add_argument("--interpolate-positions", action="store_true", default=None, help=INTERPOLATE)
    add_settings(parser, lambda name: name in MEMORY and name != "context", _TEXTS)
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.gpu is None and (taken := calibrated(args, ("context",))):
        args.context = taken["context"]
        say_calibrated(args, taken)
    _check(args)
    config = load_config(args.model, None, False)
    _check_calibration(args, config)
    result = [_longest(args, config)] if args.gpu is not None else []
    if args.context is not None:
        # Without the option, the estimate says that what lies beyond the model's positions needs it.
        stretched = bool(args.interpolate_positions)
        result.append(_estimate(args, load_config(args.model, args.context if stretched else None, stretched)))
    if args.json:
        print(json.dumps(result[0] if len(result) == 1 else {"longest": result[0], "estimate": result[1]}, indent=1))
    else:
        print("\n\n".join(str(r) for r in result))
    return 0


def _check_calibration(args: argparse.Namespace, config: Any) -> None:
    """Raises CalibrationError for one of another model, as far as its shapes tell: no weights are read here."""
    from lemo.predictors.fingerprint import config_fingerprint
    from lemo.predictors.store import check_calibrated_for

    if args.calibration is None:
        return
    if not Path(args.calibration).is_dir():
        say(f"{args.calibration} does not exist yet: --block-size and --keep are the defaults unless given")
        return
    check_calibrated_for(args.calibration, config_fingerprint(config))


def _check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that are missing, or that would have no effect."""
    if args.context is None and args.gpu is None:
        raise ValueError("give --context (the memory of its steps), --gpu (the longest context that fits), or both")
    names = (
        *("recompute", "memory_budget", "offload", "recompute_layers", "policy", "lora_dropout"),
        "interpolate_positions",
    )
    useless = [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) is not None]
    if useless and args.context is None:
        raise ValueError(
            f"{', '.join(useless)}: no effect on the longest context, which is shown with everything recomputed, "
            "without and with offload, and with segments of layers that run again: leave it out, or give --context"
        )


def _estimate(args: argparse.Namespace, config: Any) -> Any:
    from lemo import estimate

    given = given_settings(args, MEMORY)
    complete_settings(given, args)
    settings = FinetuneSettings(**given | _CALIBRATED)
    windows = [stage.window for stage in settings.stages()]
    model, element = _adapted(args, config, settings)
    lemo_config = settings.lemo_config()
    return estimate(model, lemo_config, settings.context, settings.batch, windows=windows, element=element)


def _longest(args: argparse.Namespace, config: Any) -> Any:
    from lemo import longest

    given = given_settings(args, set(MEMORY) - {"context", "recompute", "memory_budget", "offload", "recompute_layers"})
    if "schedule" in given:
        complete_settings(given, args, ("block_size", "keep"))
    else:
        taken = calibrated(args, ("block_size", "keep"))
        given |= taken
        if args.context is None:  # or the estimate says it
            say_calibrated(args, taken)
        given["schedule"] = _MODES.format(keep=given.get("keep", FinetuneSettings.keep))
    # A context in which every phase has windows of a block: the longest is looked for.
    settings = FinetuneSettings(context=1 << 30, **given | _CALIBRATED)
    try:
        gpu = gpu_bytes(args.gpu)
    except ValueError as error:
        raise ValueError(f"--gpu: {error}") from None
    windows = [stage.window for stage in settings.stages()]
    model, element = _adapted(args, config, settings)
    return longest(model, gpu, settings.lemo_config(), settings.batch, windows=windows, element=element)


# Policies that predict need a calibration to be named; memory does not depend on what is in it.
_CALIBRATED = {"calibration": "calibration"}


def _adapted(args: argparse.Namespace, config: Any, settings: FinetuneSettings) -> tuple[Any, int]:
    """An empty copy of the model with the adapter of a run, and bytes of an activation."""
    import torch
    from transformers import AutoModelForCausalLM

    from lemo.engine import families
    from lemo.training.finetune import with_adapter

    families.of(config)  # a model of another kind is refused before it is built
    dtype = torch.bfloat16 if args.dtype in (None, "auto") else getattr(torch, args.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False, **families.loading(config)
        )
        return with_adapter(model, settings), dtype.itemsize
