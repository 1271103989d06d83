"""Small files of which a bit is flipped: what a run, its log, a checkpoint or a calibration then says, and believes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lemo.predictors import CalibrationError, PredictorSet
from lemo.storage import content_digest
from lemo.training.checkpoint import MANIFEST, CheckpointError, Checkpoints, locked, read_manifest
from lemo.training.plots import summary
from lemo.training.run_folder import (
    check_complete,
    continue_run,
    run_checkpoints,
    run_settings,
    saved_settings,
    start_run,
)
from lemo.training.run_log import RunLog, read_log
from lemo.training.settings import FinetuneSettings

NEEDED: tuple[str, ...] = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
NEEDED += ("rng_state.pth", "trainer_state.json")


def flips(path: Path, stride: int = 1) -> Iterator[None]:
    """The file with one bit of it flipped, every `stride`-th in turn; afterwards it is as it was."""
    content = path.read_bytes()
    for place in range(0, 8 * len(content), stride):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        yield
    path.write_bytes(content)


IDENTITY = {
    "settings": FinetuneSettings(steps=4).to_json(),
    "data_sha256": "0a1b",
    "environment": {"torch": "2.13"},
    "inputs": {"model": "/m", "data": ["/d"], "joined": None},
}


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """A run folder with all that is needed, and as little of it as there can be."""
    out = tmp_path / "run"
    with locked(out):
        start_run(out, IDENTITY)
    for step in (1, 2):
        run_checkpoints(out).save(step, lambda f: [(f / n).write_text(n) for n in NEEDED] and None, IDENTITY)
    return out


def test_every_bit_of_a_manifest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    settings = {"lr": 0.01, "seed": 1, "data": ["a"], "calibration": None, "joined": True}
    for step in (1, 2):
        checkpoints.save(step, lambda folder: (folder / "weights").write_text("w"), settings)
    manifest = json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())
    for place, _ in enumerate(flips(tmp_path / "checkpoint-2" / MANIFEST)):
        try:
            read_manifest(tmp_path / "checkpoint-2")
        except CheckpointError as error:
            assert "checkpoint-2" in str(error)
        else:  # another way of writing the same values, as e and E in a number
            assert json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text()) == manifest
            continue
        if place % 17 == 0:
            found = checkpoints.find()
            assert [c.step for c in found.checkpoints] == [1]
            assert "checkpoint-2" in " ".join(found.ignored + found.stopping)


def test_bits_of_run_json(small_run: Path) -> None:
    before, checkpoints = json.loads((small_run / "run.json").read_text()), run_checkpoints(small_run)
    refused = said = 0
    for _ in flips(small_run / "run.json", 7):
        lines: list[str] = []
        try:
            saved = run_settings(small_run)
            settings = saved_settings(saved, small_run)
            identity = IDENTITY | {"settings": settings.to_json()}
            check_complete(small_run, identity, checkpoints, lines.append)
        except CheckpointError as error:
            assert "run.json" in str(error) or "the run has" in str(error)
            refused += 1
            continue
        assert settings == FinetuneSettings(steps=4).spelled_out()
        if json.loads((small_run / "run.json").read_bytes()) != before:
            assert len(lines) == 1 and "run.json" in lines[0]
            said += 1
    assert refused > 500 and said > 20


def test_bits_of_a_log(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.write(event="start", step=0)
    phase = {"index": 0, "mode": "skip", "keep": 0.5, "policy": None}
    numbers = {"lr": 0.1, "tokens_per_second": 2.5, "peak_memory_bytes": 4096}
    log.write(step=1, loss=1.5, **numbers, phase=phase, kept=[0.5, 1.0])
    log.write(event="held-out", step=1, perplexity=9.5, interval=[9.0, 10.0])
    whole = read_log(log.path)
    assert len(whole) == 3
    damaged = 0
    for _ in flips(log.path, 3):
        lines: list[str] = []
        records = read_log(log.path, lines.append)
        assert 1 <= len(records) <= 3 and sum(r in whole for r in records) >= 1
        assert len(records) == 3 or len(lines) == 1
        damaged += len(lines)
        summary(records)
    assert damaged > 300


def test_bits_of_a_calibrations_config(calibration_folder: Path, tmp_path: Path) -> None:
    """The folder is refused, or nothing in it is another number."""
    folder = shutil.copytree(calibration_folder, tmp_path / "c")
    path = folder / "lemo_config.json"
    config = json.loads(path.read_text()) | {"report": {}}
    config["digest"] = content_digest(config)
    path.write_text(json.dumps(config))
    refused = 0
    for _ in flips(path, 13):
        try:
            PredictorSet.load(folder)
        except CalibrationError:
            refused += 1
        else:
            now = json.loads(path.read_text())
            assert {**now, "digest": 0} == {**config, "digest": 0} or "digest" not in now
    assert refused > 500


def test_a_run_of_which_nothing_is_left_but_its_settings(small_run: Path) -> None:
    for step in (1, 2):
        shutil.rmtree(small_run / f"checkpoint-{step}")
    lines: list[str] = []
    with locked(small_run):
        assert continue_run(small_run, IDENTITY, run_checkpoints(small_run), lines.append) is None
    assert not lines and os.listdir(small_run)
