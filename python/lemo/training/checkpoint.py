"""A run's checkpoints: folders with a manifest, each complete or absent (see `lemo.storage`).

The manifest lists every file with size and digest, and has a digest of its content. A folder that was damaged after it
was written does not match its manifest, and a damaged manifest does not match its own digest: either is reported, and
the next older checkpoint is used. What a killed process left half-written is never read, and is reported.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lemo import storage
from lemo.storage import TEMPORARY, content_digest, with_digest

MANIFEST = "lemo_manifest.json"
_STEP = re.compile(r"0|[1-9][0-9]*", re.ASCII)
_FORMAT = 2  # 1 had no digest of the manifest itself


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or continued; nothing that was there before has changed."""


class ForeignFormat(CheckpointError):
    """A checkpoint of another version of lemo: not damaged, but not readable here."""


# ---- one folder and its manifest -------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def write_folder(
    target: Path, write: Callable[[Path], None], extra: dict[str, Any] | None = None, *, manifest: bool = True
) -> None:
    """Creates `target`, filled by `write(folder)`, completely or not at all.

    extra: kept in the manifest. manifest: False leaves the folder as `write` made it. Raises CheckpointError if
    `target` exists already or cannot be written; what was half-written is removed and everything else is as before.
    """
    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already and is never overwritten; remove it or choose another folder")

    def fill(folder: Path) -> None:
        write(folder)
        if manifest:
            files = {
                str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": storage.file_digest(p)}
                for p in _files(folder)
            }
            content = {"format": _FORMAT, "files": files, **(extra or {})}
            (folder / MANIFEST).write_text(with_digest(content))

    try:
        storage.write_folder(target, fill)
    except Exception as error:
        if storage.is_disk_full(error):
            raise CheckpointError(
                f"no space left on the disk while writing {target}{storage.free_space(target.parent)}; earlier "
                "checkpoints are intact. Free space and run again with --resume"
            ) from error
        raise CheckpointError(f"cannot write {target}: {error}; earlier checkpoints are intact") from error


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content, completely or not at all. Raises CheckpointError."""
    try:
        storage.write_text(path, text)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; the previous file is intact") from error


def _manifest_content(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        raise CheckpointError(f"{folder}: no readable {MANIFEST}, so it is not known to be complete") from None
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{folder}: {MANIFEST} holds no fields, so the folder is not known to be complete")
    intact = manifest.get("digest") == content_digest(manifest)
    if manifest.get("format") != _FORMAT and (intact or "digest" not in manifest):
        raise ForeignFormat(
            f"{folder}: written by another version of lemo (format {manifest.get('format')}, this one reads {_FORMAT})"
        )
    if not intact:
        raise CheckpointError(f"{folder}: {MANIFEST} is not what was written (its own digest differs)")
    return manifest


# Names of files that a complete folder lists, of any or of one with this manifest.
Required = Sequence[str] | Callable[[dict[str, Any]], Sequence[str]]


def read_manifest(folder: Path, required: Required = ()) -> dict[str, Any]:
    """The manifest of a complete folder. Raises CheckpointError naming what is missing or damaged."""
    manifest = _manifest_content(folder)
    try:
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}: {MANIFEST} does not list files with their sizes and digests") from None
    for name in required(manifest) if callable(required) else required:
        if name not in files:
            raise CheckpointError(f"{folder}: {MANIFEST} lists no {name}, without which the run cannot be continued")
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, expected {size}")
        try:
            digest = storage.file_digest(path)
        except OSError as error:
            raise CheckpointError(f"{folder}: {name} cannot be read ({error.strerror})") from None
        if digest != sha256:
            raise CheckpointError(f"{folder}: {name} is not what was written (its digest differs)")
    return manifest


# ---- a run's checkpoints ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    step: int
    folder: Path
    settings: dict[str, Any]


@dataclass
class Found:
    """Complete checkpoints, oldest first, and a line on everything that was not used.

    stopping: the lines for which resuming would destroy something: checkpoints of another version of lemo,
    and things that are in the way of checkpoints to come.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    stopping: list[str] = field(default_factory=list)


class Checkpoints:
    """The folders `checkpoint-STEP` of one run, of which the last `keep` stay.

    required: files without which a folder is not a checkpoint, whatever its manifest lists.
    """

    def __init__(self, root: Path | str, keep: int = 2, required: Required = ()) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1 checkpoint")
        self.root, self.keep, self.required = Path(root), keep, required

    def folder(self, step: int) -> Path:
        return self.root / f"checkpoint-{step}"

    def save(self, step: int, write: Callable[[Path], None], settings: dict[str, Any] | None = None) -> Path:
        """Write `checkpoint-STEP` with `write(folder)`, then drop all but the last `keep`."""
        target = self.folder(step)
        if target.is_dir():
            try:
                read_manifest(target, self.required)
            except CheckpointError:
                _remove(target)  # damaged: it could not be continued from, and this step is being redone
        write_folder(target, write, {"step": step, "settings": settings or {}})
        # Later ones are damaged, or this step would not be done again; they must not push out what was just written.
        for old in [s for s in self._steps() if s <= step][: -self.keep]:
            # Renamed first: a process killed while deleting leaves no folder that looks like a checkpoint.
            doomed = self.root / f"{TEMPORARY}old-{old}-{os.getpid()}"
            os.rename(self.folder(old), doomed)
            _remove(doomed)
        return target

    def _steps(self) -> list[int]:
        """Steps of the folders that are named as `save` names them."""
        names = [p.name.removeprefix("checkpoint-") for p in self.root.glob("checkpoint-*") if p.is_dir()]
        return sorted(int(n) for n in names if _STEP.fullmatch(n))

    def _others(self) -> Iterator[tuple[str, bool]]:
        """(line, whether it is in the way) on everything called checkpoint-* that `save` did not write."""
        for path in sorted(self.root.glob("checkpoint-*")):
            ours = _STEP.fullmatch(path.name.removeprefix("checkpoint-")) is not None
            if path.is_dir() and ours:
                continue
            if not ours:
                yield f"{path}: not the name of a checkpoint (checkpoint-STEP without leading zeros)", False
            elif path.is_symlink() and not path.exists():
                yield f"{path}: a symbolic link to {os.readlink(path)}, which does not exist", True
            else:
                yield f"{path}: not a folder, although named like one; move it elsewhere", True

    def find(self) -> Found:
        """Look at every folder; half-written and damaged ones are listed in `ignored`."""
        found = Found()
        for path in sorted(self.root.glob(f"{TEMPORARY}*")):
            found.ignored.append(f"{path.name}: left by a run that was stopped while writing")
        for line, in_the_way in self._others():
            (found.stopping if in_the_way else found.ignored).append(line)
        for step in self._steps():
            folder = self.folder(step)
            try:
                manifest = read_manifest(folder, self.required)
                if manifest.get("step") != step:
                    raise CheckpointError(f"{folder}: written at step {manifest.get('step')}, so it was renamed")
            except CheckpointError as error:
                (found.stopping if isinstance(error, ForeignFormat) else found.ignored).append(str(error))
                continue
            found.checkpoints.append(Checkpoint(step, folder, manifest.get("settings", {})))
        return found

    def remove_leftovers(self) -> None:
        """Delete what stopped runs left half-written. Only while holding the run's lock."""
        for path in self.root.glob(f"{TEMPORARY}*"):
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a folder or a file; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def compare_settings(saved: dict[str, Any], now: dict[str, Any], what: str = "the run") -> None:
    """Raise CheckpointError naming every field in which `now` differs from `saved`."""
    absent = object()
    names = sorted(set(saved) | set(now))
    different = [n for n in names if saved.get(n, absent) != now.get(n, absent)]
    if different:
        lines = [f"{n}: {what} has {saved.get(n)!r}, now {now.get(n)!r}" for n in different]
        raise CheckpointError(
            "cannot resume under other settings: " + "; ".join(lines) + ". Give the same settings, or start a new run"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder: a second process that wants it gets a CheckpointError. The lock dies with its process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointError(f"cannot write to {folder}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"another process is writing to {folder}; wait for it or choose another --out"
            ) from None
        yield
    finally:
        os.close(handle)
