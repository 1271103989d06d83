"""Compilers are the user's choice in every test that builds something, whatever libraries do to the environment. The
version is the headers', which state it for everything else. Several processes (pytest -n 2) share the work by files."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path
from typing import Any

import pytest

# They build in the same folders, which only one process at a time may do.
_BUILDERS = ("tests/consumers/", "tests/examples/test_cpp_example.py")
_COMPILERS = {name: os.environ.get(name) for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """PEFT sets CC and CXX to gcc where BOFT is used; gcc links C++ programs without libm."""
    for name, value in _COMPILERS.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def pytest_collection_finish() -> None:
    """Trainers collect garbage after every run, which took half a second for the modules alone: they stay anyway."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, which makes the fixtures of the module once. Files are taken in the usual
    order: those that build begin early, for they take long."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "builders" if nodeid.startswith(_BUILDERS) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def version() -> str:
    """major.minor.patch, as cpp/include/lemo/types.h states it."""
    header = Path(__file__).resolve().parents[1] / "cpp" / "include" / "lemo" / "types.h"
    return ".".join(re.findall(r"#define LEMO_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header.read_text()))
