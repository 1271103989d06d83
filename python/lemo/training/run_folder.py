"""What a run is: its identity in `run.json` and in every checkpoint, and whether it can be resumed.

The identity is what decides the numbers: the settings, and fingerprints of model, data and calibration. The paths
of model, data and calibration do not: a run may resume from other places with the same content. Nor do the versions of
the libraries and the number of threads, except in the last bits: resuming with others is allowed, but reported and
recorded. What is saved, and how often, is recorded for a resumed run to take unless it is given something else.

`run.json` carries a digest of itself, and checkpoints hold the identity under which they were written, so that a run is
never continued under settings that were changed in the file.
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lemo.storage import content_digest, is_leftover, with_digest
from lemo.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    Checkpoints,
    Found,
    compare_settings,
    write_text,
)
from lemo.training.processes import Processes
from lemo.training.settings import FinetuneSettings, recorded

RUN_FILE, ADAPTER = "run.json", "adapter"
PLACES = ("model", "tokenizer", "data")  # inputs that may lie elsewhere; the settings' calibration may as well
_NEEDED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
)

Report = Callable[[str], None]


def run_checkpoints(out: Path | str, keep: int = 2) -> Checkpoints:
    """The checkpoints of a run folder; those that lack a part of the training state do not count."""
    return Checkpoints(out, keep, _files_of)


def _files_of(manifest: dict[str, Any]) -> list[str]:
    """What a checkpoint has to list; every process that wrote it had its own random state."""
    processes = processes_of(_part(manifest, "settings"))
    ranks = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    return [*_NEEDED, *ranks]


def processes_of(saved: dict[str, Any]) -> int:
    """How many processes a run has, by its identity."""
    return saved.get("processes", 1)


def accumulate_in(processes: int, before: FinetuneSettings, saved: dict[str, Any]) -> int:
    """Passes of a step in each of `processes`, if a run resumes in so many: those of all processes stay as many.

    before: the settings in what `run_settings` returned, `saved`. Raises ValueError if they cannot be divided.
    """
    was = processes_of(saved)
    passes = before.accumulate * was
    if passes % processes:
        raise ValueError(
            f"the run makes {passes} forward passes a step (--accumulate {before.accumulate} in {was} processes), "
            f"which {processes} processes cannot divide; resume with a number of processes that divides {passes}"
        )
    return passes // processes


def environment(device: torch.device) -> dict[str, Any]:
    """What moves the last bits of a result: versions, and the device or the number of threads."""
    import lemo

    versions = {name: importlib.metadata.version(name) for name in ("transformers", "peft")}
    where: dict[str, Any] = {"threads": torch.get_num_threads()}
    if device.type == "cuda":
        where = {"gpu": torch.cuda.get_device_name(device)}
    return {"lemo": lemo.__version__, "torch": torch.__version__, **versions, **where}


# ---- run.json --------------------------------------------------------------------------------------------------------


def run_settings(folder: Path | str) -> dict[str, Any]:
    """What `run.json` of a run folder holds. Raises CheckpointError."""
    path = Path(folder) / RUN_FILE
    try:
        saved = json.loads(path.read_bytes())
    except OSError:
        outer = path.parent.parent
        inside = path.parent.name == ADAPTER or path.parent.name.startswith("checkpoint-")
        hint = f"start a run with lemo finetune --out {folder}"
        if inside and (outer / RUN_FILE).is_file():
            hint = f"did you mean {outer}?"
        elif (adapter := _adapter_of(path.parent)) is not None:
            hint = f"{adapter} is an adapter, which lemo evaluate --adapter {adapter} measures"
        raise CheckpointError(f"{folder}: no readable {RUN_FILE}, so it is not a run folder; {hint}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it is not JSON{_copy_of_settings(Path(folder))}") from None
    if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
        raise CheckpointError(f"{path} is damaged: it has no settings{_copy_of_settings(Path(folder))}")
    parts = (("inputs", dict), ("saving", dict), ("events", list))
    if damaged := [name for name, kind in parts if not isinstance(saved.get(name, kind()), kind)]:
        raise CheckpointError(f"{path} is damaged: {' and '.join(damaged)} not as lemo writes it")
    processes = processes_of(saved)
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise CheckpointError(f"{path} is damaged: processes is {processes!r}, expected a number of at least 1")
    return saved


def _adapter_of(folder: Path) -> Path | None:
    """The adapter that a folder is, or has as a run folder has it, also if its `run.json` is gone."""
    return next((f for f in (folder, folder / ADAPTER) if (f / "adapter_config.json").is_file()), None)


def _copy_of_settings(folder: Path) -> str:
    complete = Checkpoints(folder, required=_NEEDED).find().checkpoints
    if not complete:
        return "; start a new run in another folder"
    return f"; {complete[-1].folder}/lemo_manifest.json holds the same values under settings"


def saved_settings(saved: dict[str, Any], out: Path | str) -> FinetuneSettings:
    """The settings in what `run_settings` returned. Raises CheckpointError naming what is wrong with them."""
    try:
        return FinetuneSettings.from_json(saved["settings"])
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{Path(out) / RUN_FILE}: {error}") from error


def write_run(out: Path, values: dict[str, Any]) -> None:
    """Write `run.json` with its digest, completely or not at all."""
    write_text(out / RUN_FILE, with_digest(values))


# ---- comparing -------------------------------------------------------------------------------------------------------


def _part(identity: dict[str, Any], name: str) -> dict[str, Any]:
    part = identity.get(name)
    return part if isinstance(part, dict) else {}


def _what_must_be_equal(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity as one level of names, so that an error can name the field; places and versions are left out."""
    nested = ("settings", "inputs", "saving", "environment", "model_fingerprint")
    flat = {k: v for k, v in identity.items() if k not in nested}
    flat |= {f"model_fingerprint.{k}": v for k, v in _part(identity, "model_fingerprint").items()}
    flat |= {k: v for k, v in _part(identity, "settings").items() if k != "calibration"}
    if isinstance(flat.get("schedule"), str):  # runs of earlier versions have the names of presets
        flat["schedule"] = recorded(flat["schedule"])
    if isinstance(flat.get("accumulate"), int):
        # The same windows make a step, whichever process reads them.
        flat["accumulate x processes"] = flat.pop("accumulate") * flat.pop("processes", 1)
    return flat | {k: v for k, v in _part(identity, "inputs").items() if k not in PLACES}


def _compare(saved: dict[str, Any], now: dict[str, Any], what: str, note: str = "") -> None:
    """Raise CheckpointError naming every field of the identity in which `now` differs from `saved`."""
    try:
        saved = {"processes": 1, **saved}  # not recorded before runs could have several
        ours = _what_must_be_equal({k: v for k, v in saved.items() if k in now})
        compare_settings(ours, _what_must_be_equal(now), what)
    except CheckpointError as error:
        places = moved(saved, now)
        elsewhere = f" (read from another place than before: {_as_text(places)})" if places else ""
        raise CheckpointError(f"{note}{error}{elsewhere}") from None


def _places(identity: dict[str, Any]) -> dict[str, Any]:
    inputs = _part(identity, "inputs")
    return {n: inputs.get(n) for n in PLACES} | {"calibration": _part(identity, "settings").get("calibration")}


def moved(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """{name: {"was", "now"}} of the inputs that lie elsewhere than they did."""
    before, after = _places(saved), _places(now)
    return {n: {"was": before[n], "now": after[n]} for n in before if before[n] != after[n]}


def _changed_environment(saved: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    before, after = _part(saved, "environment"), _part(now, "environment")
    names = sorted(before.keys() | after.keys()) if before else []
    return {n: {"was": before.get(n), "now": after.get(n)} for n in names if before.get(n) != after.get(n)}


def _as_text(changes: dict[str, Any]) -> str:
    return ", ".join(f"{name} was {c['was']}, is now {c['now']}" for name, c in changes.items())


# ---- starting and continuing -----------------------------------------------------------------------------------------


def check_new(out: Path) -> None:
    """Raises CheckpointError unless a run can start in this folder: it does not exist yet, or holds nothing."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file, expected a folder; choose another --out")
    others = sorted(p.name for p in out.iterdir() if p.name != ".lock" and not is_leftover(p)) if out.exists() else []
    if others:
        raise CheckpointError(f"{out} is not empty (it holds {others[0]}) and is not a run; choose another --out")


def start_run(out: Path, identity: dict[str, Any]) -> None:
    """Write `run.json` into an empty run folder. Only while holding its lock. Raises CheckpointError.

    What a process killed at this very point left behind is removed: nothing had begun.
    """
    check_new(out)
    Checkpoints(out).remove_leftovers()
    write_run(out, {**identity, "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "events": []})


def check_same(processes: Processes, identity: dict[str, Any]) -> None:
    """Raises ValueError, in every process, unless all of them train the same model in the same way on the same data."""
    mine = _what_must_be_equal(json.loads(json.dumps(identity)))
    first = processes.gather(mine)[0]

    def compare() -> None:
        different = sorted(n for n in first.keys() | mine.keys() if first.get(n) != mine.get(n))
        if different:
            raise ValueError(
                f"process {processes.rank} differs from process 0 in {', '.join(different)}; start every process with "
                "the same command, model, data and calibration"
            )

    processes.together(compare)


def check_identity(out: Path, identity: dict[str, Any]) -> None:
    """Raises CheckpointError unless the run folder holds a run of this identity. Reads `run.json` alone."""
    _compare(run_settings(out), json.loads(json.dumps(identity)), "the run")


def continue_run(out: Path, identity: dict[str, Any], checkpoints: Checkpoints, report: Report) -> Checkpoint | None:
    """The checkpoint to resume from, or None if there is none yet. Only while holding the folder's lock.

    Raises CheckpointError if these settings would have computed something else so far. Places and versions
    that differ are reported and recorded in `run.json`.
    """
    now, found = json.loads(json.dumps(identity)), checkpoints.find()
    saved, last = _checked(out, now, found, report)
    for line in found.ignored:
        report(f"not used: {line}")
    if found.stopping:
        raise CheckpointError(f"cannot continue in {out}: {'; '.join(found.stopping)}")
    adapter = out / ADAPTER
    if adapter.is_symlink() or adapter.exists():
        raise CheckpointError(f"{adapter} is not a complete adapter, and in the way of one; move it elsewhere first")
    checkpoints.remove_leftovers()
    _record_changes(out, saved, last, now, report)
    return last


def is_complete(out: Path) -> bool:
    """Whether the run is done. Other checks of a complete run: `check_complete`."""
    return (out / ADAPTER / "adapter_model.safetensors").is_file()


def check_complete(out: Path, identity: dict[str, Any], checkpoints: Checkpoints, report: Report) -> None:
    """Raises CheckpointError unless a complete run was one under these settings. Writes nothing."""
    _checked(out, json.loads(json.dumps(identity)), checkpoints.find(), report)


def _checked(out: Path, now: dict[str, Any], found: Found, report: Report) -> tuple[dict[str, Any], Checkpoint | None]:
    """What `run.json` holds and the last checkpoint, both of which agree with `now`. Raises CheckpointError."""
    saved = run_settings(out)
    last = found.checkpoints[-1] if found.checkpoints else None
    path, note = out / RUN_FILE, ""
    if "digest" not in saved:
        note = f"{path} has no digest of itself, so not every change in it can be noticed"
    elif saved["digest"] != content_digest(saved):
        note = f"{path} was changed after the run began"
        if last is None:
            raise CheckpointError(
                f"{note}, and there is no checkpoint that records what it held: undo the change, or start a new run in "
                "another folder"
            )
    check_identity(out, now)
    if last is not None:
        _compare(last.settings, now, last.folder.name, f"{note}: " if note else "")
    if note:
        report(f"{note}; going by what {last.folder.name} holds" if last else note)
    return saved, last


def _record_changes(
    out: Path, saved: dict[str, Any], last: Checkpoint | None, now: dict[str, Any], report: Report
) -> None:
    places, versions = moved(saved, now), _changed_environment(last.settings if last else saved, now)
    if places:
        report(f"the same content at another place: {_as_text(places)}")
    if versions:
        report(
            f"WARNING: the run resumes in another environment: {_as_text(versions)}. The results may "
            "differ in the last bits from those of an unchanged environment"
        )
    was, count = processes_of(last.settings if last else saved), processes_of(now)
    if was != count:
        report(
            f"WARNING: the run resumes in {count} processes instead of {was}. Every step is over the same windows, but "
            "the result is not the one that the run would have had: blocks that are drawn and dropout are drawn by "
            "process, and sums are made in another order"
        )
    if not places and not versions and was == count and saved.get("digest") == content_digest(saved):
        return
    event: dict[str, Any] = {"event": "resume", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    event |= {"step": last.step if last else 0, "moved": places, "environment": versions}
    event |= {"processes": {"was": was, "now": count}} if was != count else {}
    kept = {k: v for k, v in saved.items() if k in ("environment", "saving") or k not in ("digest", *now)}
    write_run(out, {**now, **kept, "events": [*saved.get("events", []), event]})
