"""What folders named on the command line record, for options that are not given: a run's, or a calibration's.

A constant in their place would measure or train something else than the folder is about, without a word.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemo.cli.common import DATA_OPTIONS, say, stretches

if TYPE_CHECKING:
    from lemo.training.positions import Positions

# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """What an adapter is known to be trained for. folder: of what says so, its run or itself; stretched: the context to
    which the model's positions were stretched, or None."""

    folder: str
    context: int
    stretched: int | None


@dataclass(frozen=True)
class Trained(Recorded):
    """How a run trained its adapter. tokenizer, dtype: None if they are what they would be anyway; options: those that
    decided how its data were read; fingerprint: of the model, or None."""

    tokenizer: str | None
    dtype: str | None
    options: tuple[str, ...]
    fingerprint: dict[str, Any] | None


def run_of(adapter: str) -> Path | None:
    """The run folder of the adapter `[NAME=]FOLDER`, which is then RUN/adapter or RUN/checkpoint-N."""
    from lemo.training.adapters import adapter_name
    from lemo.training.run_folder import ADAPTER, RUN_FILE

    folder = Path(adapter_name(adapter)[1]).resolve()
    of_a_run = folder.name == ADAPTER or folder.name.startswith("checkpoint-")
    return folder.parent if of_a_run and (folder.parent / RUN_FILE).is_file() else None


def trained_model(adapters: Sequence[str]) -> tuple[str, str]:
    """(the model that the adapters `[NAME=]FOLDER` were trained on, what says so): their runs, or what PEFT wrote into
    their settings. Raises ValueError, asking for --model, if they name none or differ in it."""
    named: dict[str, tuple[str, str]] = {}  # by where it is, however it is written
    for adapter in adapters:
        model, source = _model_of(adapter)
        named.setdefault(os.path.realpath(model) if os.path.exists(model) else model, (model, source))
    if len(named) > 1:
        text = ", ".join(f"{source}: {model}" for model, source in named.values())
        raise ValueError(f"the adapters were trained on different models ({text}): give --model")
    return next(iter(named.values()))


def _model_of(adapter: str) -> tuple[str, str]:
    from lemo.training.adapters import adapter_name, base_model
    from lemo.training.run_folder import RUN_FILE

    if (run := run_of(adapter)) is not None:
        with _damage_explained():
            model = _inputs(run)[1].get("model")
        if isinstance(model, str):
            return model, str(run / RUN_FILE)
    folder = adapter_name(adapter)[1]
    model = base_model(folder)
    if model is None:
        raise ValueError(f"{folder} does not name the model that it was trained on: give --model")
    return model, os.path.join(folder, "adapter_config.json")


@contextlib.contextmanager
def _damage_explained() -> Iterator[None]:
    """A damaged record of an adapter's run is an error, and the message says how to do without it."""
    from lemo.training.checkpoint import CheckpointError

    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}. To measure an adapter without what its run records, copy it out of the run folder"
        ) from error


def _inputs(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what run.json holds, its inputs). Raises CheckpointError if the names among them are none."""
    from lemo.training.checkpoint import CheckpointError
    from lemo.training.run_folder import RUN_FILE, run_settings

    saved = run_settings(run)
    inputs = saved.get("inputs", {})
    names = ("model", "tokenizer", "dtype")
    if damaged := [n for n in names if not (inputs.get(n) is None or isinstance(inputs[n], str))]:
        raise CheckpointError(f"{run / RUN_FILE} is damaged: among its inputs are not names: {', '.join(damaged)}")
    return saved, inputs


def recorded(adapters: Sequence[str], model: str) -> list[Recorded]:
    """What the runs of the adapters `[NAME=]FOLDER` record, or the adapters themselves if they lie elsewhere; nothing
    for those that do not say. model: that of the command. Raises CheckpointError or ValueError for damaged records."""
    from lemo.training.adapters import adapter_name
    from lemo.training.positions import read_positions

    found: dict[tuple[str, int | None], Recorded] = {}  # a run once, unless its adapters differ in their positions
    for adapter in adapters:
        folder = adapter_name(adapter)[1]
        positions, run = read_positions(folder), run_of(adapter)
        if run is not None:
            one: Recorded = trained(run, model, positions)
        elif positions is not None:
            one = Recorded(folder, positions.context, _stretched(positions, model))
        else:
            continue
        found.setdefault((one.folder, one.stretched), one)
    return list(found.values())


def _stretched(positions: Positions, model: str) -> int | None:
    return positions.longest if stretches(model, positions.longest) else None


def trained(run: Path, model: str, positions: Positions | None) -> Trained:
    """What the run records. model: that of the command; positions: what the adapter says. Raises CheckpointError for a
    damaged run.json, ValueError if run and adapter contradict each other."""
    from lemo.training.positions import POSITIONS_FILE
    from lemo.training.run_folder import RUN_FILE, saved_settings

    with _damage_explained():
        saved, inputs = _inputs(run)
        context = saved_settings(saved, run).context
    stretched = context if inputs.get("interpolate_positions") and stretches(model, context) else None
    if positions is not None:
        # A run in Python, or of a study, may get a model that is stretched already, and only the adapter knows.
        ours = _stretched(positions, model)
        if positions.context != context or stretched not in (None, ours):
            raise ValueError(
                f"{run / RUN_FILE} is of a run with a context of {context} tokens, and the adapter there of one with a "
                f"context of {positions.context} and positions stretched to {positions.longest} ({POSITIONS_FILE}): to "
                "measure an adapter of another run, copy it out of the run folder"
            )
        stretched = ours
    tokenizer, dtype = inputs.get("tokenizer"), inputs.get("dtype")
    fingerprint = saved.get("model_fingerprint")
    known = isinstance(fingerprint, dict) and isinstance(fingerprint.get("config"), dict)
    return Trained(
        folder=str(run),
        context=context,
        stretched=stretched,
        tokenizer=None if tokenizer == inputs.get("model") else tokenizer,
        dtype=None if dtype == "auto" else dtype,
        options=tuple(name for name in DATA_OPTIONS if inputs.get(name)),
        fingerprint=fingerprint if known else None,
    )


def agreed(runs: Sequence[Recorded], field: str, option: str) -> Any:
    """The value of a field that all runs have, None without runs. Raises ValueError, asking for the option, if they
    differ."""
    values = [getattr(run, field) for run in runs]
    if len(set(values)) > 1:
        text = ", ".join(f"{run.folder}: {value or 'the default'}" for run, value in zip(runs, values, strict=True))
        raise ValueError(f"the runs of the adapters differ in {option} ({text}): give {option}")
    return values[0] if values else None


def agreed_positions(runs: Sequence[Recorded], asked: bool) -> int | None:
    """The context to which all runs stretched the model's positions, or None. Raises ValueError if they differ. asked:
    for stretched positions, so that runs which did not stretch them are measured with those of the others."""
    runs = [run for run in runs if run.stretched is not None] if asked else runs
    unstretched = any(run.stretched is None for run in runs)
    if len({run.stretched for run in runs}) > 1:
        text = ", ".join(
            f"{run.folder}: {f'stretched to {run.stretched} tokens' if run.stretched else 'not stretched'}"
            for run in runs
        )
        raise ValueError(
            f"the adapters were trained on different positions ({text}): measure them in separate calls"
            f"{', or all with those that are stretched (--interpolate-positions)' if unstretched and not asked else ''}"
        )
    return runs[0].stretched if runs else None


# ---- calibrations ----------------------------------------------------------------------------------------------------

AS_CALIBRATED = "as --calibration was made"  # in the help of options, as their default


def calibrated(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those options among context, block_size and keep that are not given, as the calibration of --calibration was made
    with; none if there is no such folder, or for what it does not record. Raises CalibrationError for a damaged one."""
    from lemo.predictors.store import calibrated_with

    if args.calibration is None or not Path(args.calibration).is_dir():
        return {}
    values = calibrated_with(args.calibration)
    return {name: values[name] for name in names if getattr(args, name, None) is None and values[name] is not None}


def say_calibrated(args: argparse.Namespace, taken: Mapping[str, Any]) -> None:
    if taken:
        say(f"{as_options(taken)}: as {args.calibration} was calibrated")


def as_options(values: Mapping[str, Any]) -> str:
    """As they would be written on the command line, with commas."""

    def text(value: Any) -> str:
        if isinstance(value, list):
            return " ".join(shlex.quote(text(one)) for one in value)
        return f"{value:g}" if isinstance(value, float) else str(value)

    return ", ".join(f"--{name.replace('_', '-')} {text(value)}" for name, value in values.items())
