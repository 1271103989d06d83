"""lemo info: this installation, a calibration folder or a run folder."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lemo.cli.common import Formatter, add_common, path_name

if TYPE_CHECKING:
    from lemo.predictors import PredictorSet

_EPILOG = """\
examples:
  lemo info                     versions, backends, GPUs
  lemo info calibration         what a calibration holds: recall and thresholds, or covered mass; parameters
  lemo info run                 a run's settings, progress and checkpoints
"""


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info",
        help="versions and backends; or what a calibration or run folder holds",
        description="Show this installation, or what a calibration or run folder holds.",
        epilog=_EPILOG,
        formatter_class=Formatter,
    )
    parser.add_argument("folder", type=path_name, nargs="?", help="folder of lemo calibrate or lemo finetune")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_common(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.folder is None:
        values = installation()
    else:
        folder = Path(args.folder)
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        if (folder / "lemo_config.json").exists():
            values = calibration(folder)
        elif (folder / "run.json").exists():
            values = run_folder(folder)
        elif (folder / "adapter_config.json").exists():
            values = adapter(folder)
        else:
            inside = folder / "adapter"
            hint = f"; did you mean {inside}?" if (inside / "adapter_config.json").exists() else ""
            raise ValueError(
                f"{folder}: neither a calibration (lemo_config.json), a run (run.json) nor an adapter "
                f"(adapter_config.json){hint}"
            )
    if args.json:
        print(json.dumps(values, indent=1))
    else:
        print("\n".join(_lines(values)))
    return 0


def _lines(values: dict[str, Any], indent: int = 0) -> list[str]:
    lines = []
    for key, value in values.items():
        pad = " " * indent
        if isinstance(value, dict) and value:
            lines += [f"{pad}{key}:", *_lines(value, indent + 2)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{pad}{key}:", *_table(value, indent + 2)]
        else:
            shown = ", ".join(map(_cell, value)) if isinstance(value, list) else _cell(value)
            lines.append(f"{pad}{key}: {shown}")
    return lines


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: list[dict[str, Any]], indent: int) -> list[str]:
    names = list(rows[0])
    cells = [names, *([_cell(row.get(n, "")) for n in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return [" " * indent + "  ".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True)) for row in cells]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def installation() -> dict[str, Any]:
    """Versions, backends of the native library and the GPUs torch sees."""
    import torch

    import lemo
    from lemo.engine.families import FAMILIES

    values: dict[str, Any] = {"lemo": lemo.__version__, "python": platform.python_version()}
    values.update({p: _version(p) for p in ("torch", "transformers", "peft", "datasets", "tokenizers", "matplotlib")})
    try:
        from lemo import _C

        backends = [name for name, index in (("cpu", 0), ("cuda", 1)) if _C.has_backend(index)]
        values["native library"] = f"{_C.version()}, backends: {', '.join(backends)}"
    except ImportError as error:
        values["native library"] = f"cannot be loaded: {error}"
    values["models"] = [family.model_class for family in FAMILIES]
    gpus = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gpus.append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    values["GPUs"] = gpus or "none that torch can use"
    return values


def calibration(folder: Path) -> dict[str, Any]:
    """What a calibration folder holds. Raises CalibrationError for a damaged one."""
    from lemo.predictors import PredictorSet

    predictors = PredictorSet.load(folder)
    values: dict[str, Any] = {
        "calibration": str(folder),
        "model": predictors.fingerprint.get("config", {}),
        "target": predictors.target,
        "block size": predictors.block_size,
        "context": predictors.context,
        "parameters": predictors.num_parameters,
        "norm, pool": f"{predictors.norm}, {predictors.pool}",
    }
    report = dict(predictors.report)
    layers = report.pop("layers", None)
    if predictors.target == "mass":
        return values | _coverage(predictors, report, layers)
    values["report"] = report
    values["layers"] = [
        {
            "layer": i,
            "keep": predictors.keep[i],
            "threshold": predictors.thresholds[i],
            "parameters": predictors.layers[i].num_parameters,
            **(layers[i] if isinstance(layers, list) and i < len(layers) and isinstance(layers[i], dict) else {}),
        }
        for i in range(predictors.num_layers)
    ]
    return values


def _coverage(predictors: PredictorSet, report: dict[str, Any], layers: Any) -> dict[str, Any]:
    """What a calibration for mass measured: a table per density, a column per score."""
    from lemo.predictors.mass import no_choice

    mean, densities = report.pop("mean", {}), report.pop("densities", [])
    tables: dict[str, Any] = {}
    rows = [*layers, mean] if isinstance(layers, list) else []
    for d, density in enumerate(densities):
        if (reason := no_choice(report, d)) is not None:
            tables[f"density {density:g}"] = reason
            continue
        tables[f"covered mass at density {density:g}"] = [
            {"layer": i if i < len(rows) - 1 else "mean"} | {name: values[d] for name, values in row.items()}
            for i, row in enumerate(rows)
        ]
    report.pop("competing", None)
    return {"report": report, **tables}


def run_folder(folder: Path) -> dict[str, Any]:
    """Settings, progress and checkpoints of a run folder."""
    from lemo.training.phases import unreached_of
    from lemo.training.plots import last_step, steps_of
    from lemo.training.run_folder import is_complete, run_checkpoints, run_settings
    from lemo.training.run_log import LOG_FILE, read_log

    saved = run_settings(folder)
    records = read_log(folder / LOG_FILE)
    steps = steps_of(records)
    found = run_checkpoints(folder).find()
    values: dict[str, Any] = {
        "run": str(folder),
        "state": "complete" if is_complete(folder) else "not complete; resume with lemo finetune --out ... --resume",
        "steps": f"{steps[-1]['step'] if steps else 0} of {saved['settings'].get('steps', 'an unknown number')}",
        "checkpoints": [c.folder.name for c in found.checkpoints] or "none",
    }
    if missed := unreached_of(saved, last_step(records)):
        values["not reached"] = [f"{phase.name}, {phase.steps}" for phase in missed]
    if steps and steps[-1].get("memory"):
        values["what layers save"] = steps[-1]["memory"]
    if found.ignored or found.stopping:
        values["not used"] = found.ignored + found.stopping
    values.update({k: saved[k] for k in ("settings", "inputs", "saving", "events") if saved.get(k)})
    return values


def adapter(folder: Path) -> dict[str, Any]:
    """The fields of a PEFT adapter that identify it, and the positions that it needs if they were stretched."""
    from lemo.training.positions import read_positions

    positions = read_positions(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    names = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules")
    values = {"adapter": str(folder), **{n: config.get(n) for n in names}}
    return values if positions is None else values | {"trained for stretched positions": positions.to_json()}
