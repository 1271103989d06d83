"""A C99 and a C++17 project find the installed library with find_package, link lemo::lemo and run operations."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library installed from a CPU-only build, kept between test runs in LEMO_TEST_BUILD_DIR or build/consumers."""
    build = Path(os.environ.get("LEMO_TEST_BUILD_DIR", ROOT / "build" / "consumers"))
    prefix = tmp_path_factory.mktemp("prefix")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run("cmake", "-S", ROOT, "-B", build, *generator, "-DLEMO_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}")
    run("cmake", "--build", build, "--parallel", "2")
    run("cmake", "--install", build, "--prefix", prefix)
    return prefix


@pytest.mark.parametrize("project", ["c99", "cpp17"])
def test_project_builds_and_runs(project: str, prefix: Path, tmp_path: Path) -> None:
    source = Path(__file__).parent / project
    run("cmake", "-S", source, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", tmp_path)
    assert run(tmp_path / "consumer").strip() == "lemo 0.1.0 ok"


def test_another_version_is_refused(prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(other LANGUAGES CXX)\nfind_package(lemo 9.0 CONFIG REQUIRED)\n"
    )
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "9.0" in done.stderr


def test_install_has_headers_and_one_library(prefix: Path) -> None:
    headers = {path.name for path in (prefix / "include" / "lemo").iterdir()}
    assert headers == {path.name for path in (ROOT / "cpp" / "include" / "lemo").iterdir()}
    assert [path.name for path in prefix.glob("lib*/*.so*")] == ["liblemo.so"]
