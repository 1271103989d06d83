"""Modules of benchmarks/, as its scripts import each other, and small studies of quality."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.quality_study import BACKWARD, DENSE, HALF, cost_file

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "quality",
    "quality_data",
    "quality_figure",
    "quality_pages",
    "quality_results",
    "quality_schedules",
    "quality_stats",
    "quality_train",
    "summary",
)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """The module of a name, whatever else the tests have imported under it (tests/ops is a package `ops`)."""
    folder = ROOT / "benchmarks"
    monkeypatch.syspath_prepend(str(folder))

    def load(name: str) -> ModuleType:
        there = sys.modules.get(name)
        if there is not None and getattr(there, "__file__", None) != str(folder / f"{name}.py"):
            monkeypatch.delitem(sys.modules, name)
        return importlib.import_module(name)

    return load


@pytest.fixture
def q(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return SimpleNamespace(**{name.removeprefix("quality_"): importlib.import_module(name) for name in NAMES})


@pytest.fixture
def costs(tmp_path: Path) -> Path:
    at = {65536: {DENSE: 1000.0, HALF: 250.0, BACKWARD: 500.0}, 16384: {DENSE: 125.0}}
    return cost_file(tmp_path / "step-a.json", at | {262144: {DENSE: 10000.0, HALF: 2000.0}})


@pytest.fixture
def world(q: Any, tmp_path: Path, costs: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model, token files and a command; `trained` lists the runs that were really made."""
    model: Any = tiny.build()
    model.save_pretrained(tmp_path / "model")
    rng = np.random.default_rng(0)
    for name, n in (("train", 8000), ("adapt_code", 8000), ("dev_code", 2100), ("dev_law", 2100)):
        (tmp_path / "tokens").mkdir(exist_ok=True)
        rng.integers(0, 64, n).astype(np.uint16).tofile(tmp_path / "tokens" / f"{name}.bin")
    trained: list[Any] = []
    real = q.quality.train

    def train(task: Any, spec: Any, deadline: float) -> Any:
        trained.append(spec)
        return real(task, spec, deadline)

    monkeypatch.setattr(q.quality, "train", train)

    def command(*words: Any, setting: str = "B", status: int = 0) -> dict[str, Any]:
        given = ["--model", tmp_path / "model", "--setting", setting, "--costs", costs, "--study", tmp_path / "study"]
        given += ["--out", tmp_path / "quality.json", "--items", 2, *words]
        if "--tokens" not in words and setting != "C":
            given += ["--tokens", tmp_path / "tokens", "--adapt", "code"]
        assert q.quality.main(list(map(str, given))) == status
        return json.loads((tmp_path / "quality.json").read_text())

    return SimpleNamespace(command=command, trained=trained, folder=tmp_path)
