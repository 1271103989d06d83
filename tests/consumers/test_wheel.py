"""The wheel in a new environment without a compiler: its name, where its modules come from, and a training run."""

from __future__ import annotations

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from support.installations import ROOT, run

_WHERE = """
import importlib.metadata, lemo, lemo._C
lines = open("/proc/self/maps").read().splitlines()
print(lemo.__file__, lemo._C.__file__, *{line.split()[-1] for line in lines if "liblemo" in line}, sep="\\n")
print(lemo.__version__, importlib.metadata.version("lemo"))
"""


@pytest.fixture
def machine(wheel_python: Path) -> dict[str, str]:
    """Variables of a machine that has no compiler, and a Python that sees the environment alone."""
    path = str(wheel_python.parent)
    assert [tool for tool in ("cc", "gcc", "g++", "clang", "nvcc", "cmake") if shutil.which(tool, path=path)] == []
    return {"PATH": path, "PYTHONPATH": "", "CC": "", "CXX": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def test_name_says_version_python_and_manylinux(wheel: Path, version: str) -> None:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"lemo-{re.escape(version)}-{python}-{python}-manylinux_\d+_\d+_\w+\.whl", wheel.name)


def test_licences_are_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {Path(name).name for name in archive.namelist() if re.search(r"/licenses/.", name)}
    assert found == {"LICENSE", "THIRD-PARTY-NOTICES"}


def test_modules_and_library_are_those_of_the_wheel(
    wheel_python: Path, machine: dict[str, str], version: str, tmp_path: Path
) -> None:
    *files, versions = run(wheel_python, "-c", _WHERE, **machine).splitlines()
    assert [Path(file).name.partition(".")[0] for file in files] == ["__init__", "_C", "liblemo"]
    for file in files:
        assert Path(file).is_relative_to(wheel_python.parents[1]), file
    assert versions.split() == [version, version]
    assert run(wheel_python, "-m", "lemo", "--version", **machine).strip() == version
    assert run(wheel_python.with_name("lemo"), "--version", **machine).strip() == f"lemo {version}"


def test_finetune_without_a_compiler(wheel_python: Path, machine: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    shutil.copy(re.__file__, text)
    data = ("--model", ROOT / "demo" / "model", "--data", text, "--context", 64, "--block-size", 16)
    out = tmp_path / "run"
    run(wheel_python.with_name("lemo"), "finetune", *data, "--steps", 2, "--lora-rank", 2, "--out", out, **machine)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (out / "adapter").iterdir()}
