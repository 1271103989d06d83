"""A short run of the fuzz driver with fixed seeds; `make fuzz` runs for FUZZ_SECONDS."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from lemo._native import core

HERE = Path(__file__).resolve().parent
BUILD = Path(os.environ.get("LEMO_TEST_BUILD_DIR", HERE.parents[1] / "build")) / "fuzz"


@pytest.fixture(scope="module")
def driver() -> Path:
    """Built with the address and undefined-behaviour sanitizers, and kept between test runs. Optimized, the driver's
    templates would take as long to compile as the library, for a run of seconds."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [*generator, "-DFUZZ_DRIVER_OPTIONS=-O0"]
    for command in (["-S", HERE, "-B", BUILD, *options], ["--build", BUILD, "--parallel", "2"]):
        done = subprocess.run(["cmake", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "fuzz"


def test_random_calls_of_the_c_interface(driver: Path) -> None:
    done = subprocess.run([driver, "2001", "2000"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    # Every operation was accepted, refused, and short of memory.
    lines = [line for line in done.stdout.splitlines() if "invalid argument" in line]
    assert {line.split()[0] for line in lines} == set(core().fields)
    assert all("ok" in line and "backend error" in line for line in lines)
