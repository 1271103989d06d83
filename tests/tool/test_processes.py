"""Fine-tuning in several processes: windows are read once, one process writes, and a failure ends them all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lemo.cli import main
from lemo.storage import content_digest
from lemo.training.checkpoint import MANIFEST, CheckpointError
from lemo.training.processes import AnotherProcessFailed, Processes, refuse_engines, world_size
from lemo.training.run_folder import accumulate_in, check_same, run_checkpoints
from lemo.training.settings import FinetuneSettings
from safetensors.torch import load_file

SIZES = "--context 64 --block-size 8 --steps 4 --batch 1 --warmup 2 --lr 1e-2"
OPTIONS = [*SIZES.split(" "), "--save-every", "2", "--quiet", "--device", "cpu"]

# argv: what to do at step 2, a folder for the windows that were read, and the command.
SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    import torch
    import lemo.training.checkpoint as checkpoint
    from lemo.cli import main
    from lemo.data import PackedWindows
    fault, folder, *command = sys.argv[1:]
    torch.set_num_threads(1)
    rank, real = os.environ["RANK"], PackedWindows.__getitem__
    def read(self, i):
        with open(folder + "/windows-" + rank, "a") as f:
            print(i, file=f)
        return real(self, i)
    PackedWindows.__getitem__ = read
    write_folder = checkpoint.write_folder
    def failing(target, write, *args, **kwargs):
        if target.name == "checkpoint-4" and fault == "disk full":
            def write(folder):
                raise OSError(28, "No space left on device")
        if target.name == "checkpoint-4" and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return write_folder(target, write, *args, **kwargs)
    checkpoint.write_folder = failing
    sys.exit(main(command))
    """
)


@pytest.fixture(scope="module")
def two(run_scripts, tmp_path_factory: pytest.TempPathFactory):
    """two(*command, fault=): [(exit code, output)] of the command in two processes, and the windows each has read."""

    def run(*command: str, fault: str = "none") -> tuple[list[tuple[int, str]], list[list[int]]]:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1]), "WORLD_SIZE": "2"}
        folder = tmp_path_factory.mktemp("windows")
        ranks = [address | {"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": "2"} for r in range(2)]
        done = run_scripts(ranks, SCRIPT, fault, str(folder), *command)
        files = [folder / f"windows-{r}" for r in range(2)]
        return done, [[int(i) for i in f.read_text().split()] if f.exists() else [] for f in files]

    return run


@pytest.fixture(scope="module")
def command(model_folder: Path, text_folder: Path) -> list[str]:
    data = ["--model", str(model_folder), "--data", str(text_folder), "--held-out", "0.2"]
    return ["finetune", *data, *OPTIONS, "--schedule", "skip:0.5:random@0.5,dense@0.5", "--lora-dropout", "0.1"]


@pytest.fixture(scope="module")
def finished(two, command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("processes") / "run"
    done, _ = two(*command, "--out", str(out))
    assert [code for code, _ in done] == [0, 0], done
    assert str(out / "adapter") in done[0][1] and not done[1][1].strip(), done
    return out


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_two_processes_are_two_accumulated_passes(two, model_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    """Equal windows, equally weighted labels, the same evaluation: the same adapter."""
    data = ["--model", str(model_folder), "--data", str(text_folder), "--held-out", "0.2"]
    dense = ["finetune", *data, *OPTIONS, "--schedule", "dense:window=1/2@0.5,dense@0.5", "--batch", "2"]
    done, windows = two(*dense, "--out", str(tmp_path / "two"))
    assert [code for code, _ in done] == [0, 0], done
    assert sorted(windows[0] + windows[1]) == list(range(16))
    assert [i // 2 % 2 for i in windows[0]] == [0] * 8 and [i // 2 % 2 for i in windows[1]] == [1] * 8
    assert main([*dense, "--accumulate", "2", "--out", str(tmp_path / "one")]) == 0
    one, other = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    assert one.keys() == other.keys() and any(v.abs().max() > 1e-2 for n, v in one.items() if "lora_B" in n)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert a.get("event") == b.get("event") and a["step"] == b["step"]
        for name in {"loss", "perplexity"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-5)


def test_the_run_folder_has_one_writer_and_every_random_state(finished: Path) -> None:
    assert json.loads((finished / "run.json").read_text())["processes"] == 2
    assert [r["step"] for r in log(finished) if "loss" in r] == [1, 2, 3, 4]
    assert [r["event"] for r in log(finished) if "event" in r] == ["start", "held-out", "end"]
    for step in (2, 4):
        states = sorted(p.name for p in (finished / f"checkpoint-{step}").glob("rng_state*"))
        assert states == ["rng_state_0.pth", "rng_state_1.pth"]
    first, second = ((finished / "checkpoint-2" / f"rng_state_{r}.pth").read_bytes() for r in range(2))
    assert first != second  # dropout differs between the processes
    assert main(["info", str(finished)]) == 0


@pytest.mark.parametrize("fault", ["kill", "disk full"])
def test_a_stopped_run_resumes_bit_for_bit(two, command: list[str], finished: Path, tmp_path: Path, fault: str) -> None:
    out = tmp_path / "run"
    done, _ = two(*command, "--out", str(out), fault=fault)
    if fault == "kill":
        assert done[0][0] == -signal.SIGKILL
    else:
        assert done[0][0] == 2 and "no space left" in done[0][1] and done[1][0] == 1 and not done[1][1].strip(), done
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"] and not (out / "adapter").exists()
    done, windows = two("finetune", "--out", str(out), "--resume", "--quiet")
    assert [code for code, _ in done] == [0, 0], done
    assert "resuming from step 2" in done[0][1]
    assert sorted(windows[0] + windows[1]) == [4, 5, 6, 7]
    for name, value in adapter(finished).items():
        assert torch.equal(adapter(out)[name], value), name


def test_a_checkpoint_without_a_random_state_does_not_count(finished: Path, tmp_path: Path) -> None:
    """Its manifest is whole, but one process would resume with another state."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    folder = out / "checkpoint-4"
    (folder / "rng_state_1.pth").unlink()
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["files"]["rng_state_1.pth"]
    (folder / MANIFEST).write_text(json.dumps(manifest | {"digest": content_digest(manifest)}))
    found = run_checkpoints(out).find()
    assert [c.step for c in found.checkpoints] == [2] and "lists no rng_state_1.pth" in found.ignored[0]


def test_a_run_resumes_in_another_number_of_processes(
    two, command: list[str], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the same windows; that it is another run in its random choices is reported and recorded."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoint-4")
    assert main(["finetune", "--out", str(out), "--resume", "--device", "cpu"]) == 0
    assert "resumes in 1 processes instead of 2" in capsys.readouterr().err
    run = json.loads((out / "run.json").read_text())
    assert run["processes"] == 1 and run["settings"]["accumulate"] == 2
    assert run["events"][-1]["processes"] == {"was": 2, "now": 1}
    assert (out / "checkpoint-4" / "rng_state.pth").is_file()
    phases = {r["step"]: r["phase"] for r in log(out) if "loss" in r}
    assert phases == {r["step"]: r["phase"] for r in log(finished) if "loss" in r}
    for name, value in adapter(finished).items():  # dropout differs in the last two of four steps
        assert (adapter(out)[name] - value).norm() < 0.5 * value.norm(), name


def test_passes_that_cannot_be_divided_are_an_error() -> None:
    settings = FinetuneSettings(accumulate=3)
    assert accumulate_in(1, settings, {"processes": 2}) == 6 and accumulate_in(6, settings, {"processes": 2}) == 1
    with pytest.raises(ValueError, match=r"makes 6 forward passes a step .* which 4 processes cannot divide"):
        accumulate_in(4, settings, {"processes": 2})


class _Second(Processes):
    """The second of two processes; the first has another identity, and no failure."""

    def gather(self, value: Any) -> list[Any]:
        return [{"data_sha256": "a", "steps": 4} if isinstance(value, dict) else None, value]


def test_processes_with_different_data_are_refused() -> None:
    same = {"data_sha256": "a", "settings": {"steps": 4, "calibration": "/here"}, "environment": {"threads": 1}}
    check_same(_Second(1, 2), same)
    with pytest.raises(ValueError, match="process 1 differs from process 0 in data_sha256;"):
        check_same(_Second(1, 2), same | {"data_sha256": "b"})


def test_a_folder_that_is_not_empty_ends_both_with_one_message(two, command: list[str], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done, windows = two(*command, "--out", str(tmp_path))
    assert [code for code, _ in done] == [2, 1], done
    assert "is not empty" in done[0][1] and not done[1][1].strip() and windows == [[], []]
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_other_commands_run_in_one_process(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["info", str(model_folder)]) == 2
    assert "WORLD_SIZE is 2" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"ACCELERATE_USE_FSDP is set: .* keeps the whole model"):
        refuse_engines()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'two'"):
        world_size()


def test_a_failure_elsewhere_ends_this_process_too() -> None:
    class First(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, "no memory left"]

    with pytest.raises(AnotherProcessFailed, match="process 1 of 2 failed: no memory left"):
        First(0, 2).together(lambda: 3)


def test_one_process_needs_no_others() -> None:
    alone = Processes()
    assert alone.gather(3) == [3] and alone.on_first(lambda: 4) == 4 and "WORLD_SIZE" not in os.environ
    with pytest.raises(CheckpointError, match="mine"):
        alone.together(lambda: (_ for _ in ()).throw(CheckpointError("mine")))
