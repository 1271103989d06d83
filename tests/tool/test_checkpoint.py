"""Folders that are complete or absent."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from lemo.training.checkpoint import (
    MANIFEST,
    CheckpointError,
    Checkpoints,
    compare_settings,
    locked,
    read_manifest,
    write_folder,
    write_text,
)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def filler(content: str):
    def write(folder: Path) -> None:
        (folder / "weights").write_text(content)
        (folder / "sub").mkdir()
        (folder / "sub" / "state").write_text(content * 2)

    return write


def test_saves_keeps_the_last_and_reads_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 100):
        checkpoints.save(step, filler(str(step)), {"lr": 0.1})
    found = checkpoints.find()
    assert [c.step for c in found.checkpoints] == [10, 100] and not found.ignored
    assert found.checkpoints[-1].settings == {"lr": 0.1}
    assert (found.checkpoints[-1].folder / "sub" / "state").read_text() == "100100"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-100"]


@pytest.mark.parametrize("damage", ["truncate", "change", "remove", "manifest", "manifest-cut"])
def test_damaged_folders_are_reported_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, filler("one"))
    folder = checkpoints.save(2, filler("two"))
    if damage == "truncate":
        (folder / "weights").write_text("t")
    elif damage == "change":
        (folder / "weights").write_text("owt")
    elif damage == "remove":
        (folder / "sub" / "state").unlink()
    elif damage == "manifest":
        (folder / MANIFEST).unlink()
    else:
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:20])
    found = checkpoints.find()
    assert [c.step for c in found.checkpoints] == [1]
    assert len(found.ignored) == 1 and "checkpoint-2" in found.ignored[0]
    checkpoints.save(2, filler("again"))  # redoing the step replaces the damaged folder
    assert [c.step for c in checkpoints.find().checkpoints] == [1, 2]


class _DiskFull:
    """Raises ENOSPC once `after` bytes were written through Path.write_text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        left = [after]
        real = Path.write_text

        def write_text(path: Path, data: str, *args, **kwargs):
            left[0] -= len(data)
            if left[0] < 0:
                real(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return real(path, data, *args, **kwargs)

        monkeypatch.setattr(Path, "write_text", write_text)


@pytest.mark.parametrize("after", [0, 4, 12, 20])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, filler("one"))
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        _DiskFull(patch, after)
        with pytest.raises(CheckpointError, match=r"no space left.*checkpoint-2.*earlier checkpoints are intact"):
            checkpoints.save(2, filler("two"))
        with pytest.raises(CheckpointError, match="previous file is intact"):
            _DiskFull(patch, 0)
            write_text(tmp_path / "checkpoint-1" / "weights", "other")
    assert tree(tmp_path) == before
    assert [c.step for c in checkpoints.find().checkpoints] == [1]


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        import torch

        checkpoints = Checkpoints(mount, keep=1)
        checkpoints.save(1, lambda f: torch.save(torch.zeros(1000), f / "small.pt"))
        before = tree(mount)
        with pytest.raises(CheckpointError, match="no space left"):
            checkpoints.save(2, lambda f: torch.save(torch.zeros(1_000_000), f / "large.pt"))
        assert tree(mount) == before
    finally:
        # Lazily: the failed writer may still hold its file open.
        subprocess.run(["umount", "-l", mount], check=True)


# Each of these is a moment at which the writing process is killed, as the name of the function it dies in.
@pytest.mark.parametrize("moment", ["write", "file_digest", "flush", "rename", "after-rename", "rmtree"])
def test_kill_9_at_any_moment(tmp_path: Path, moment: str) -> None:
    script = textwrap.dedent(
        """
        import os, signal, shutil, sys
        from pathlib import Path
        import lemo.training.checkpoint as c
        from lemo import storage
        root, moment = Path(sys.argv[1]), sys.argv[2]
        die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        checkpoints = c.Checkpoints(root, keep=1)
        checkpoints.save(1, lambda f: (f / "weights").write_text("one"))
        def write(folder):
            (folder / "weights").write_text("two")
            if moment == "write":
                (folder / "more").write_text("half"); die()
        rename, rmtree = os.rename, shutil.rmtree
        if moment in ("file_digest", "flush"):
            setattr(storage, moment, die)
        elif moment == "rename":
            os.rename = die
        elif moment == "after-rename":
            os.rename = lambda *a: (rename(*a), die())
        elif moment == "rmtree":
            shutil.rmtree = lambda path, **k: die() if "old-" in str(path) else rmtree(path, **k)
        checkpoints.save(2, write)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), moment], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoints = Checkpoints(tmp_path, keep=1)
    found = checkpoints.find()
    assert found.checkpoints, "a complete checkpoint must always be there"
    last = found.checkpoints[-1]
    assert (last.folder / "weights").read_text() == {1: "one", 2: "two"}[last.step]
    read_manifest(last.folder)
    assert last.step == (2 if moment in ("after-rename", "rmtree") else 1)
    if moment != "after-rename":
        assert found.ignored
    checkpoints.remove_leftovers()
    assert not checkpoints.find().ignored
    assert [c.step for c in checkpoints.find().checkpoints][-1] == last.step


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", filler("a"))
    with pytest.raises(CheckpointError, match="never overwritten"):
        write_folder(tmp_path / "a", filler("b"))
    assert (tmp_path / "a" / "weights").read_text() == "a"
    with pytest.raises(CheckpointError, match=r"cannot write.*boom"):
        write_folder(tmp_path / "b", lambda folder: (_ for _ in ()).throw(RuntimeError("boom")))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_settings_are_compared_by_name() -> None:
    compare_settings({"lr": 1, "steps": 2}, {"steps": 2, "lr": 1})
    with pytest.raises(CheckpointError, match=r"lr: the run has 1, now 2; seed"):
        compare_settings({"lr": 1, "seed": 3}, {"lr": 2, "seed": 4})


def test_a_run_folder_has_one_writer(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(CheckpointError, match="another process"), locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass
    assert os.access(tmp_path / "run", os.W_OK)
