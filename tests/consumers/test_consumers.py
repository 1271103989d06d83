"""A C99 and a C++17 project find the installed library with find_package, link lemo::lemo and run operations; another
has the library inside of it and stays as it was."""

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
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "9.0" in done.stderr


def test_install_has_headers_and_one_library(prefix: Path) -> None:
    headers = {path.name for path in (prefix / "include" / "lemo").iterdir()}
    assert headers == {path.name for path in (ROOT / "cpp" / "include" / "lemo").iterdir()}
    assert [path.name for path in prefix.glob("lib*/*.so*")] == ["liblemo.so"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the library is built from, and nothing else of this folder."""
    source = tmp_path_factory.mktemp("source")
    for name in ("cpp", "cmake", "cuda"):
        shutil.copytree(ROOT / name, source / name)
    shutil.copy(ROOT / "CMakeLists.txt", source)
    return source


@pytest.mark.parametrize("how", ["add_subdirectory", "FetchContent"])
@pytest.mark.parametrize(("build_type", "asserts"), [(None, True), ("Debug", True), ("Release", False)])
def test_inside_another_project(how: str, build_type: str | None, asserts: bool, source: Path, tmp_path: Path) -> None:
    """The project itself checks that no setting has changed (its CMakeLists.txt); its build type is its own."""
    project = Path(__file__).parent / "subproject"
    options = [f"-DLEMO_SOURCE={source}", f"-DFETCH={'ON' if how == 'FetchContent' else 'OFF'}"]
    options += [] if build_type is None else [f"-DCMAKE_BUILD_TYPE={build_type}"]
    run("cmake", "-S", project, "-B", tmp_path / "build", *options)
    run("cmake", "--build", tmp_path / "build", "--target", "own")
    assert subprocess.run([tmp_path / "build" / "own"]).returncode == (0 if asserts else 3)
    cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
    assert f"CMAKE_BUILD_TYPE:STRING={build_type or ''}\n" in cache
    assert not (tmp_path / "build" / "compile_commands.json").exists()
    run("cmake", "--install", tmp_path / "build", "--prefix", tmp_path / "installed")
    installed = [path.relative_to(tmp_path / "installed") for path in (tmp_path / "installed").rglob("*")]
    assert sorted(map(str, installed)) == ["bin", "bin/own"]


def test_a_project_around_it_links_and_runs(source: Path, tmp_path: Path) -> None:
    project = Path(__file__).parent / "subproject"
    run("cmake", "-S", project, "-B", tmp_path, f"-DLEMO_SOURCE={source}")
    run("cmake", "--build", tmp_path, "--target", "consumer", "--parallel", "2")
    assert run(tmp_path / "consumer").strip() == "lemo 0.1.0 ok"
