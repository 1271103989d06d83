"""Folders that are either complete or absent, whatever happens while they are written.

A folder is written under a hidden temporary name, every file of it is flushed to the disk, a manifest with sizes and
digests is added, and only then does one rename give it its name. A process killed at any moment leaves the previous
checkpoints as they were; what it had half-written keeps the temporary name, is never read, and is reported. A folder
that was damaged afterwards does not match its manifest, and a damaged manifest does not match its own digest: either
is reported, and the next older checkpoint is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "lemo_manifest.json"
_TEMPORARY = ".writing-"
_STEP = re.compile(r"0|[1-9][0-9]*", re.ASCII)
_FORMAT = 2  # 1 had no digest of the manifest itself


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or continued; nothing that was there before has changed."""


class ForeignFormat(CheckpointError):
    """A checkpoint of another version of lemo: not damaged, but not readable here."""


# ---- one folder, atomically ------------------------------------------------------------------------------------------


def content_digest(values: dict[str, Any]) -> str:
    """Hex digest of JSON values, whatever their order and spacing in a file; a "digest" among them does not count."""
    counted = {k: v for k, v in values.items() if k != "digest"}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


# What is left of ENOSPC once torch's and safetensors' writers have turned it into text of their own.
_DISK_FULL_TEXTS = ("No space left", "os error 28", "file write failed", "unexpected pos")


def _is_disk_full(error: BaseException) -> bool:
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(link) for text in _DISK_FULL_TEXTS):
            return True
        link = link.__cause__ or link.__context__
    return False


def write_folder(
    target: Path, write: Callable[[Path], None], extra: dict[str, Any] | None = None, *, manifest: bool = True
) -> None:
    """Create `target`, filled by `write(folder)`, completely or not at all.

    extra: kept in the manifest. manifest: False leaves the folder as `write` made it. Raises CheckpointError where
    `target` exists already or cannot be written; what was half-written is removed and everything else is as before.
    """
    target = Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already and is never overwritten; remove it or choose another folder")
    temporary = target.parent / f"{_TEMPORARY}{target.name}-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        files = _files(temporary)
        if manifest:
            entries = {str(p.relative_to(temporary)): {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in files}
            content = {"format": _FORMAT, "files": entries, **(extra or {})}
            (temporary / MANIFEST).write_text(json.dumps(content | {"digest": content_digest(content)}, indent=1))
            files.append(temporary / MANIFEST)
        for path in files:
            _fsync(path)
        for folder in [p for p in temporary.rglob("*") if p.is_dir()] + [temporary]:
            _fsync(folder)
        os.rename(temporary, target)
        _fsync(target.parent)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_disk_full(error):
            try:
                free = f" ({shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free now)"
            except OSError:
                free = ""
            raise CheckpointError(
                f"no space left on the disk while writing {target}{free}; earlier checkpoints are intact. "
                "Free space and run again with --resume"
            ) from error
        raise CheckpointError(f"cannot write {target}: {error}; earlier checkpoints are intact") from error


def write_text(path: Path, text: str) -> None:
    """Replace a file's content, completely or not at all."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text)
        _fsync(temporary)
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error.strerror}; the previous file is intact") from error


def is_leftover(path: Path) -> bool:
    """Whether this was left half-written by a process that was stopped."""
    return path.name.startswith(_TEMPORARY)


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


def read_manifest(folder: Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """The manifest of a complete folder. Raises CheckpointError naming what is missing or damaged.

    required: names of files that a complete folder lists.
    """
    manifest = _manifest_content(folder)
    try:
        files = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}: {MANIFEST} does not list files with their sizes and digests") from None
    for name in required:
        if name not in files:
            raise CheckpointError(f"{folder}: {MANIFEST} lists no {name}, without which the run cannot be continued")
    for name, (size, sha256) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{folder}: {name} has {path.stat().st_size} bytes, expected {size}")
        try:
            digest = _digest(path)
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

    stopping: those of the lines that say that going on would destroy something: checkpoints of another version of lemo,
    and things that are in the way of checkpoints to come.
    """

    checkpoints: list[Checkpoint] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    stopping: list[str] = field(default_factory=list)


class Checkpoints:
    """The folders `checkpoint-STEP` of one run, of which the last `keep` stay.

    required: files without which a folder is no checkpoint, whatever its manifest lists.
    """

    def __init__(self, root: Path | str, keep: int = 2, required: Sequence[str] = ()) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}, expected at least 1 checkpoint")
        self.root, self.keep, self.required = Path(root), keep, tuple(required)

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
            doomed = self.root / f"{_TEMPORARY}old-{old}-{os.getpid()}"
            os.rename(self.folder(old), doomed)
            _remove(doomed)
        return target

    def _steps(self) -> list[int]:
        """Steps of the folders that are named as `save` names them."""
        names = [p.name.removeprefix("checkpoint-") for p in self.root.glob("checkpoint-*") if p.is_dir()]
        return sorted(int(n) for n in names if _STEP.fullmatch(n))

    def _others(self) -> Iterator[tuple[str, bool]]:
        """(line, whether it is in the way) on everything called checkpoint-* that is no folder of `save`."""
        for path in sorted(self.root.glob("checkpoint-*")):
            ours = _STEP.fullmatch(path.name.removeprefix("checkpoint-")) is not None
            if path.is_dir() and ours:
                continue
            if not ours:
                yield f"{path}: not the name of a checkpoint (checkpoint-STEP without leading zeros)", False
            elif path.is_symlink() and not path.exists():
                yield f"{path}: a symbolic link to {os.readlink(path)}, which does not exist", True
            else:
                yield f"{path}: not a folder, though it has the name of one; move it elsewhere", True

    def find(self) -> Found:
        """Look at every folder; half-written and damaged ones are listed in `ignored`."""
        found = Found()
        for path in sorted(self.root.glob(f"{_TEMPORARY}*")):
            found.ignored.append(f"{path.name}: left by a run that was stopped while writing")
        for line, in_the_way in self._others():
            (found.stopping if in_the_way else found.ignored).append(line)
        for step in self._steps():
            folder = self.folder(step)
            try:
                manifest = read_manifest(folder, self.required)
                if manifest.get("step") != step:
                    raise CheckpointError(f"{folder}: written at step {manifest.get('step')}, so it has another's name")
            except CheckpointError as error:
                (found.stopping if isinstance(error, ForeignFormat) else found.ignored).append(str(error))
                continue
            found.checkpoints.append(Checkpoint(step, folder, manifest.get("settings", {})))
        return found

    def remove_leftovers(self) -> None:
        """Delete what stopped runs left half-written. Only while holding the run's lock."""
        for path in self.root.glob(f"{_TEMPORARY}*"):
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
