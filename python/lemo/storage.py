"""Files and folders that are either complete or absent, whatever happens while they are written.

A folder is written under a hidden temporary name, every file of it is flushed to the disk, and only then does one
rename give it its name. A process killed at any moment leaves what was there before as it was; what it had half-written
keeps the temporary name and is never read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEMPORARY = ".writing-"

# The messages by which torch and safetensors report ENOSPC.
_DISK_FULL_TEXTS = ("No space left", "os error 28", "file write failed", "unexpected pos")


# ---- digests ---------------------------------------------------------------------------------------------------------


def content_digest(values: dict[str, Any]) -> str:
    """Hex digest of JSON values, whatever their order and spacing in a file; a "digest" among them does not count."""
    counted = {k: v for k, v in values.items() if k != "digest"}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def with_digest(values: dict[str, Any]) -> str:
    """JSON text of values and their `content_digest`, which tells a reader whether they were changed since."""
    return json.dumps(values | {"digest": content_digest(values)}, indent=1)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------------


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replaced_name(target: Path) -> Path:
    """Where `write_folder` keeps the previous folder while the new one takes its name."""
    return target.with_name(f".replaced-{target.name}")


def is_leftover(path: Path) -> bool:
    """Whether this was left half-written by a process that was stopped."""
    return path.name.startswith(TEMPORARY)


def write_folder(target: Path, write: Callable[[Path], None], *, overwrite: bool = False) -> None:
    """Creates `target`, filled by `write(folder)`, completely or not at all.

    overwrite: an existing folder keeps its name until the new one is complete; without it, the rename fails if there
    is a folder that holds anything. Whatever is raised, what was half-written is removed and everything else is as
    before.
    """
    temporary = target.parent / f"{TEMPORARY}{target.name}-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        inside = sorted(temporary.rglob("*"))
        for path in [p for p in inside if p.is_file()] + [p for p in inside if p.is_dir()] + [temporary]:
            flush(path)
        _publish(temporary, target, overwrite)
        flush(target.parent)
    except Exception:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    if not (overwrite and target.exists()):
        os.rename(temporary, target)
        return
    old = replaced_name(target)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content, completely or not at all. Raises OSError; the previous file is intact then."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


# ---- errors ----------------------------------------------------------------------------------------------------------


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk was full, also if a library turned the system's error into a message."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(text in str(link) for text in _DISK_FULL_TEXTS):
            return True
        link = link.__cause__ or link.__context__
    return False


def free_space(folder: Path) -> str:
    """ " (N MiB free now)", or nothing if that cannot be found out."""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:.0f} MiB free now)"
    except OSError:
        return ""
