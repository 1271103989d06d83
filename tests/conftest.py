"""Compilers are the user's choice in every test that builds something, whatever libraries do to the environment."""

import os

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
