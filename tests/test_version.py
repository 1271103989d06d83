"""The version is stated in cpp/include/lemo/types.h; whatever else names it reads it there, or is checked here."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import lemo
import pytest
from lemo.__main__ import folder, main

ROOT = Path(__file__).resolve().parents[1]


def test_package_and_library_have_the_headers_version(version: str) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert lemo.__version__ == version
    assert importlib.import_module("lemo._C").version() == version


@pytest.mark.parametrize("label", ["", "cu130"])
def test_distribution_reads_the_header(label: str, version: str) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in declared and "version" in declared["dynamic"]
    environment = os.environ | {"LEMO_VERSION_LABEL": label}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split()[-1] == (f"{version}+{label}" if label else version)


def test_citation_names_the_version(version: str) -> None:
    found = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert found == [version]


def test_python_m_lemo(version: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{version}\n"
    assert main(["--library-dir"]) == 0
    assert list(Path(capsys.readouterr().out.strip()).glob("liblemo.*"))
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "--cmake-dir" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["report", "--help"])  # a command of the tool
    assert "lemo report" in capsys.readouterr().out


def test_python_m_lemo_says_what_a_checkout_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lemo.__main__._PACKAGE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"--cmake-dir: expected lemo-config\.cmake in .*, found none"):
        folder("cmake-dir")
    assert main(["--library-dir"]) == 2
    assert capsys.readouterr().err.startswith("python -m lemo: --library-dir: expected liblemo.* in ")
