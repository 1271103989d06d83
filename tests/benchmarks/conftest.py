"""Modules of benchmarks/, as its scripts import each other."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
