"""lemo finetune: train a LoRA adapter with token elimination."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lemo.cli.common import (
    AS_THE_MODEL,
    DATA_OPTIONS,
    Formatter,
    absolute,
    add_common,
    add_data,
    add_model,
    default_context,
    device_of,
    load_data,
    load_model,
    offload,
    path_name,
    recompute_layers,
    say,
    size,
    stretches,
)
from lemo.cli.recorded import AS_CALIBRATED, calibrated, say_calibrated
from lemo.training.settings import (
    FinetuneSettings,
    check_defaults_matter,
    default_schedule,
    spelled_out,
    uses_default_keep,
)

_EPILOG = """\
examples:
  lemo finetune --model MODEL --data books/ --context 16384 --steps 300 --out run
      half of the blocks skipped for most of the steps, then an exact phase; no calibration needed

  lemo finetune --model MODEL --data books/ --context 16384 --calibration calibration --out run
      blocks chosen by the predictors that `lemo calibrate` trained; --block-size and --keep, and --context if left
      out, are those of the calibration

  lemo finetune --model MODEL --data notes.jsonl --context 65536 --keep 0.3 --schedule low-memory --out run
      nothing ever needs a dense step's memory

  lemo finetune --model MODEL --data books/ --context 131072 --memory-budget 74GiB --offload auto --out run
      every layer saves as much as fits; what does not fit waits in host memory

  lemo finetune --out run --resume
      resume an interrupted run; its settings are in run/run.json. If model, data or calibration were moved:
      --resume --model NEW (--data NEW, --calibration NEW), accepted if their contents are the same

schedules (--schedule): a preset, or phases MODE[:NUMBER][:POLICY][:shared][:weighted][:NAME=VALUE][@SHARE]
  default      skip in most of the steps, then dense: the most steps for the time spent
  long-context a quarter of each window, exact, in most of the steps, then whole windows with sparse:0.25. Without
               --schedule this is taken from --context 32768 on, if no --keep, --policy or --calibration asks for tokens
               to be left out. Its steps are short: more of them fit into the same time
  extension    the same with an eighth of each window: taken in place of long-context when --interpolate-positions
               stretches the model to its new length
  whole-documents
               sparse:0.25 in most of the steps, then dense: taken in place of both with --answers-only, because part of
               a window may hold an answer without what it is about
  low-memory   skip, then backward (exact forward pass, gradients through kept tokens): peak memory stays low
  skip         only skip: cheapest; trains for a model with tokens missing, so expect a worse adapter
  backward     only backward, unbiased gradient: for short adaptations in which every step must see the exact model
  dense        nothing eliminated
  for instance --schedule skip:0.3@0.7,skip:0.6@0.2,dense@0.1 or skip:0.5:sampled:shared@0.8,dense@0.2
  mode sparse keeps every token and leaves out pairs of query and key tiles, most of the cost at long contexts:
  sparse:0.25 attends to a quarter of the earlier keys, sparse:keys=8192 to so many, sparse:mass=0.9 to as many as hold
  that share of attention; sparse:keys=8192:keep=0.3 leaves tokens out as well
  dense:window=1/4@0.9,dense@0.1 trains on a quarter of each window first, at shifted places and with the positions that
  it has in the whole: what one can do without lemo, and as good as elimination in our study of adaptation; try it, too.
  Other modes take window= as well: sparse:0.25:window=1/2@0.7,dense@0.3
policies (--policy, for skip phases): predictors (the paper's: needs --calibration), update_norm (the default without a
  calibration), sampled, random, exact (slow: for comparison). In a schedule, :shared after sampled or random makes one
  draw for all layers of a step; sampled:shared, with the predictors' scores, is the default with --calibration

several GPUs: torchrun --nproc-per-node 4 -m lemo finetune ... (the same options). Each process takes the GPU of its
rank and its own windows: a step has batch x accumulate x processes of them. Resumed in as many processes, a run is the
same to the last bit; in another number, each makes more or fewer passes, and only random choices and roundings differ.

The run folder: run.json (settings), log.jsonl (loss, tokens/s, kept ratio per layer, memory), checkpoint-*/ (the last
few, always complete), adapter/ (a PEFT adapter, when done). lemo report RUN makes a table and pictures of it.
"""

# Options that are settings of the run: unset ones keep the run's value on --resume, and the defaults otherwise.
_SETTINGS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "context": ("tokens per window", int, "run"),
    "steps": ("optimizer steps", int, "run"),
    "batch": ("windows per forward pass, in each process", int, "run"),
    "accumulate": ("forward passes per step", int, "run"),
    "seed": ("of the adapter's first weights, the order of the data and every random choice", int, "run"),
    "held_out": ("fraction of the data kept from training and evaluated densely", float, "run"),
    "schedule": ("preset or phases, see below (default: by --context and the data)", str, "elimination"),
    "keep": ("fraction of the blocks a layer keeps", float, "elimination"),
    "policy": ("how blocks are chosen, see below", str, "elimination"),
    "calibration": ("folder written by lemo calibrate", path_name, "elimination"),
    "block_size": ("tokens per block", int, "elimination"),
    "recompute": ("what is saved for backward: none (all), attention, full (least memory), auto", str, "elimination"),
    "memory_budget": (
        "memory a step may take, like 40GiB: every layer saves as much as fits (in place of --recompute)",
        size,
        "elimination",
    ),
    "offload": (
        "keep saved rows in host memory: all, a number of layers, auto (as few as --memory-budget needs), or a size "
        "like 64GiB (likewise, within so much host memory)",
        offload,
        "elimination",
    ),
    "recompute_layers": (
        "run segments of layers again, which then save almost nothing: a number of layers, least (memory), auto (as "
        "few as --memory-budget needs) or none",
        recompute_layers,
        "elimination",
    ),
    "lr": ("learning rate", float, "optimizer"),
    "lr_schedule": ("constant, linear or cosine, after the warm-up", str, "optimizer"),
    "warmup": ("steps over which the learning rate rises", int, "optimizer"),
    "weight_decay": ("of AdamW", float, "optimizer"),
    "max_grad_norm": ("gradients are scaled down to this norm, 0 = never", float, "optimizer"),
    "lora_rank": ("rank of the adapter", int, "LoRA"),
    "lora_alpha": ("scale of the adapter is alpha / rank", float, "LoRA"),
    "lora_dropout": ("dropout before the adapter", float, "LoRA"),
}
# What decides the memory of a step, among these and those below: lemo estimate has them, too. (Of a policy or a
# calibration that is the schedule that is taken if none is named.)
MEMORY = (
    *("context", "batch", "schedule", "keep", "policy", "calibration", "block_size", "recompute", "memory_budget"),
    *("offload", "recompute_layers", "lora_rank", "lora_dropout", "dora", "lora_targets", "modules_to_save"),
)
# The same, as options without a value, and as lists of names.
_SWITCHES = {
    "dora": ("DoRA: the norms of the adapted weights train as well", "LoRA"),
    "rslora": ("rsLoRA: the adapter's scale is alpha / sqrt(rank)", "LoRA"),
    "cuda_graphs": ("layers run as CUDA graphs: for small models, with windows of one document", "elimination"),
}
_LISTS = {
    "lora_targets": "linear layers to adapt, or all-linear (default: those of attention)",
    "modules_to_save": "modules that train as a whole and are saved with the adapter: all whose names end so, like "
    "lm_head or model.norm (norm alone would be those of the layers as well)",
}


# What is written during a run, and how often: text, default and least value. Unset ones keep the run's value on
# --resume, as settings do, but others may be given, since they do not decide the result.
_SAVING = {
    "save_every": ("steps between checkpoints, 0 = none", 50, 0),
    "keep_checkpoints": ("complete checkpoints that stay on the disk", 2, 1),
    "log_every": ("steps per line of the log", 1, 1),
    "evaluate_every": ("steps between held-out evaluations, 0 = at the end", 0, 0),
    "maps": ("steps whose kept blocks are recorded for lemo report --html, 0 = none", 8, 0),
}


def add_settings(
    parser: argparse.ArgumentParser, wanted: Callable[[str], bool], texts: Mapping[str, str] = MappingProxyType({})
) -> None:
    """The options of those settings that are wanted, in groups. texts: of some, in place of their own."""
    groups: dict[str, Any] = {}
    defaults = {f.name: f.default for f in dataclasses.fields(FinetuneSettings)}
    for name, (text, kind, group) in _SETTINGS.items():
        if group not in groups and any(wanted(n) for n, (*_, g) in _SETTINGS.items() if g == group):
            groups[group] = parser.add_argument_group(group)
        if wanted(name):
            shown = "" if defaults[name] in (None, False) or name == "schedule" else f" (default: {defaults[name]})"
            if name in ("context", "block_size", "keep"):
                fewer = f", {AS_THE_MODEL}" if name == "context" else ""
                shown = f" (default: {AS_CALIBRATED}, else {defaults[name]}{fewer})"
            groups[group].add_argument("--" + name.replace("_", "-"), type=kind, help=texts.get(name, text + shown))
    groups["elimination"].add_argument("--dense", action="store_true", help="the same run without elimination")
    for name, (text, group) in _SWITCHES.items():
        if wanted(name):
            option = "--" + name.replace("_", "-")
            groups[group].add_argument(option, action="store_true", default=None, help=text)
    for name, text in _LISTS.items():
        if wanted(name):
            groups["LoRA"].add_argument(
                "--" + name.replace("_", "-"), nargs="+", action="extend", metavar="NAME", help=text
            )


def given_settings(
    args: argparse.Namespace, names: Iterable[str] = (*_SETTINGS, *_SWITCHES, *_LISTS)
) -> dict[str, Any]:
    """Those that were given. Raises ValueError for --dense next to another schedule."""
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.dense:
        if args.schedule not in (None, "dense"):
            raise ValueError(f"--dense and --schedule {args.schedule} contradict each other; give one of them")
        given["schedule"] = "dense"
    return given | {name: tuple(given[name]) for name in _LISTS if name in given}


def complete_settings(
    given: dict[str, Any], args: argparse.Namespace, of_calibration: Iterable[str] = ("context", "block_size", "keep")
) -> None:
    """Adds what a new run takes if the options do not say it. of_calibration: what --calibration decides, then. Raises
    ValueError for options that change nothing, and CalibrationError."""
    taken = calibrated(args, of_calibration)
    given |= {name: taken[name] for name in ("context", "block_size") if name in taken}
    if "memory_budget" in given:
        given.setdefault("recompute", "auto")
    if "schedule" not in given:
        context = given.get("context", FinetuneSettings.context)
        stretched = bool(args.interpolate_positions) and stretches(args.model, context)
        answers_only = bool(getattr(args, "answers_only", False))  # lemo estimate reads no data
        asked = (args.keep, args.policy, args.calibration)
        given["schedule"] = default_schedule(context, *asked, stretched, answers_only)
    check_defaults_matter(given["schedule"], args.keep, args.policy)
    if args.policy not in (None, "predictors", "sampled") or not uses_default_keep(given["schedule"]):
        taken.pop("keep", None)
    given |= taken
    for name, value in taken.items():
        setattr(args, name, value)
    say_calibrated(args, taken)


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "finetune",
        help="train a LoRA adapter with token elimination",
        description="Train a LoRA adapter on long documents, skipping tokens in the layers in which they matter least.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument(
        "--out", type=path_name, required=True, metavar="RUN", help="run folder, new, or existing with --resume"
    )
    parser.add_argument("--resume", action="store_true", help="resume from the last complete checkpoint of RUN")
    add_model(parser, required=False)
    add_data(parser, required=False)
    add_settings(parser, lambda name: True)
    saving = parser.add_argument_group("saving")
    for name, (text, default, _) in _SAVING.items():
        saving.add_argument("--" + name.replace("_", "-"), type=int, help=f"{text} (default: {default})")
    add_common(parser)
    parser.set_defaults(run=run)


# The sources of the run's inputs: kept in run.json so that --resume needs no other argument.
_INPUTS = ("model", "tokenizer", "data", *DATA_OPTIONS, "interpolate_positions", "dtype")


def _settings(args: argparse.Namespace) -> FinetuneSettings:
    given = given_settings(args, (*_SETTINGS, *_SWITCHES, *_LISTS))
    if not args.resume:
        missing = [f"--{n}" for n in ("model", "data") if getattr(args, n) is None]
        if missing:
            raise ValueError(f"{' and '.join(missing)} needed to start a run (see lemo finetune --help)")
        complete_settings(given, args)
    if "calibration" in given:
        given["calibration"] = os.path.abspath(given["calibration"])
    if args.resume:
        return _resumed_settings(args, given)
    settings = FinetuneSettings(**given)
    if "context" not in given:
        settings = dataclasses.replace(settings, context=default_context(args, settings.context))
    return settings


def _take_saving(args: argparse.Namespace, saved: dict[str, Any]) -> None:
    """How often the run saves, logs and evaluates, for options that are not given. saved: see `run_settings`."""
    from lemo.training.checkpoint import CheckpointError
    from lemo.training.run_folder import RUN_FILE

    for name, value in saved.get("saving", {}).items():
        if name not in _SAVING or getattr(args, name) is not None:
            continue
        least = _SAVING[name][2]
        if type(value) is not int or value < least:
            raise CheckpointError(
                f"{Path(args.out) / RUN_FILE} is damaged: {name} of saving is {value!r}, expected a number of at least "
                f"{least}; give --{name.replace('_', '-')}"
            )
        setattr(args, name, value)


def _resumed_settings(args: argparse.Namespace, given: dict[str, Any]) -> FinetuneSettings:
    """The run's own settings and inputs, and what it saves, except for new places of model, data and calibration.

    Their contents are compared with the run's fingerprints once they have been read.
    """
    from lemo.training.checkpoint import compare_settings
    from lemo.training.processes import world_size
    from lemo.training.run_folder import PLACES, accumulate_in, run_settings, saved_settings

    saved = run_settings(args.out)
    before = saved_settings(saved, args.out)
    _take_saving(args, saved)
    calibration = given.pop("calibration", before.calibration)
    accumulate = accumulate_in(world_size(), before, saved)
    if given.get("accumulate") == accumulate:
        del given["accumulate"]
    if "schedule" in given:
        given["schedule"] = spelled_out(given["schedule"])
    compare_settings({n: getattr(before, n) for n in given}, given)
    inputs = saved.get("inputs", {})
    named = {n: getattr(args, n) for n in _INPUTS if getattr(args, n) is not None}
    # Naming what the default resolved to changes nothing; the loaded model's dtype is compared with the run's.
    if "dtype" in named and named["dtype"] in ("auto", saved.get("dtype")):
        del named["dtype"]
    fixed = {n: named[n] for n in named if n not in PLACES}
    compare_settings({n: inputs.get(n) for n in fixed}, fixed)
    for name in _INPUTS:
        setattr(args, name, named.get(name, inputs.get(name)))
    if not isinstance(args.model, str) or not isinstance(args.data, list):
        raise ValueError(f"{args.out}/run.json does not name model and data: give --model and --data")
    for option, place in [("model", args.model), *(("data", str(source)) for source in args.data)]:
        _check_there(args.out, option, place)
    if calibration is not None:
        _check_there(args.out, "calibration", calibration)
    return dataclasses.replace(before, calibration=calibration, accumulate=accumulate)


def _check_there(out: str, option: str, place: str) -> None:
    """Raises ValueError if an input of the run is gone, for instance because its folder was moved."""
    name, equals, where = place.partition("=")
    path = where if equals and "/" not in name and not os.path.exists(place) else place
    on_the_hub = path.startswith("hf:") if option == "data" else not os.path.isabs(path)
    if not on_the_hub and not os.path.exists(path) and not glob.glob(path, recursive=True):
        raise ValueError(
            f"--{option} {place}: no such file or folder. If the run's {option} was moved, name its new place: lemo "
            f"finetune --out {out} --resume --{option} NEW; its content is compared with the run's fingerprint"
        )


def run(args: argparse.Namespace) -> int:
    from lemo.training.finetune import finetune
    from lemo.training.processes import Processes
    from lemo.training.windows import tokens_read

    for name, (*_, least) in _SAVING.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    processes = Processes.join(device_of(args.device))
    args.quiet = args.quiet or not processes.first
    model, documents, settings = processes.together(lambda: _load(args))
    if not (args.resume or args.dense) and args.schedule is None:
        say(f"--schedule {settings.schedule}: {spelled_out(settings.schedule)}")
        if (read := tokens_read(settings)) < 1:
            say(f"its steps read {read:.0%} of the tokens of dense ones: in the same time, more --steps can be taken")
    say(f"{documents.num_tokens} tokens in {len(documents)} documents")
    saving = {name: getattr(args, name) for name in _SAVING}
    result = finetune(
        model,
        documents,
        settings,
        args.out,
        identity={"inputs": {n: getattr(args, n) for n in _INPUTS}, "saving": saving},
        resume=args.resume,
        **saving,
        progress=not args.quiet,
        report=say,
    )
    processes.leave()
    if processes.first:
        print(result.adapter)
    return 0


def _load(args: argparse.Namespace) -> tuple[Any, Any, FinetuneSettings]:
    """Model, documents and settings of the run, new or resumed; `args` then names all of its inputs."""
    from lemo.training.run_folder import check_new

    for name in ("model", "tokenizer"):
        if getattr(args, name) is not None:
            setattr(args, name, absolute(getattr(args, name)))
    if args.data is not None:
        args.data = [absolute(source) for source in args.data]
    settings = _settings(args)
    for name, (_, default, _) in _SAVING.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    if args.resume is False:
        if (Path(args.out) / "run.json").exists():
            raise ValueError(
                f"--out {args.out} holds a run already; continue it with --resume, or choose another folder"
            )
        check_new(Path(args.out))  # before model and data are read, which may take long
    if settings.calibration and not Path(settings.calibration).is_dir():
        raise ValueError(f"--calibration {settings.calibration}: no such folder; make it with lemo calibrate")
    model = load_model(args, settings.context, to_train=True)
    return model, load_data(args, model.config), settings
