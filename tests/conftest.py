"""Compilers are the user's choice in every test that builds something, whatever libraries do to the environment. The
version is the headers', which state it for everything else."""

import os
import re
from pathlib import Path

import pytest

_COMPILERS = {name: os.environ.get(name) for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """PEFT sets CC and CXX to gcc where BOFT is used; gcc links C++ programs without libm."""
    for name, value in _COMPILERS.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="session")
def version() -> str:
    """major.minor.patch, as cpp/include/lemo/types.h states it."""
    header = Path(__file__).resolve().parents[1] / "cpp" / "include" / "lemo" / "types.h"
    return ".".join(re.findall(r"#define LEMO_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header.read_text()))
