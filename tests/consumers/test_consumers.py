"""A C99 and a C++17 project find the installed library with CMake and with pkg-config, link it and run operations,
be it a shared library, a static one or the one in a wheel; another project has the library inside of it and stays as it
was."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.installations import ROOT, Installation, run

HERE = Path(__file__).parent
INSTALLATIONS = ("shared", "static", "wheel_installation")


def needed(program: Path) -> str:
    return run("readelf", "--dynamic", program)


@pytest.mark.parametrize("installation", INSTALLATIONS, indirect=True)
@pytest.mark.parametrize("project", ["c99", "cpp17"])
def test_cmake_project(project: str, installation: Installation, version: str, tmp_path: Path) -> None:
    options = (f"-Dlemo_DIR={installation.cmake}", "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "-S", HERE / project, "-B", tmp_path, *options)
    run("cmake", "--build", tmp_path)
    assert run(tmp_path / "consumer").strip() == f"lemo {version} ok"
    assert ("liblemo.so" in needed(tmp_path / "consumer")) == (not installation.static)


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="pkg-config is not installed")
@pytest.mark.parametrize("installation", INSTALLATIONS, indirect=True)
@pytest.mark.parametrize(
    ("compiler", "source"), [(("CC", "cc", "-std=c99"), "c99/main.c"), (("CXX", "c++", "-std=c++17"), "cpp17/main.cpp")]
)
def test_pkg_config(
    compiler: tuple[str, str, str], source: str, installation: Installation, version: str, tmp_path: Path
) -> None:
    variable, usual, standard = compiler
    arguments = ("--cflags", "--libs", *(["--static"] if installation.static else []), "lemo")
    flags = shlex.split(run("pkg-config", *arguments, PKG_CONFIG_PATH=str(installation.pkgconfig)))
    assert ("-DLEMO_STATIC" in flags) == installation.static
    program = tmp_path / "consumer"
    warnings = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")
    run(*shlex.split(os.environ.get(variable, usual)), standard, *warnings, HERE / source, *flags, "-o", program)
    assert run(program, LD_LIBRARY_PATH=str(installation.library)).strip() == f"lemo {version} ok"
    assert ("liblemo.so" in needed(program)) == (not installation.static)
    assert run("pkg-config", "--modversion", "lemo", PKG_CONFIG_PATH=str(installation.pkgconfig)).strip() == version


@pytest.mark.parametrize("installation", INSTALLATIONS, indirect=True)
def test_nothing_names_the_folder_it_was_built_in(installation: Installation) -> None:
    texts = [path for path in installation.library.rglob("*") if path.suffix in (".cmake", ".pc")]
    assert len(texts) >= 5
    for path in texts:
        text = path.read_text()
        assert str(ROOT) not in text, path
        assert "/before" not in text, path


@pytest.mark.parametrize(("wanted", "found"), [("own", True), ("9.0", False)])
def test_versions_that_are_accepted(
    wanted: str, found: bool, shared: Installation, version: str, tmp_path: Path
) -> None:
    wanted = version.rpartition(".")[0] if wanted == "own" else wanted
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(other LANGUAGES CXX)\n"
        f"find_package(lemo {wanted} CONFIG REQUIRED)\n"
    )
    command = ["cmake", "-S", str(tmp_path), "-B", str(tmp_path / "build"), f"-Dlemo_DIR={shared.cmake}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == found, done.stderr
    assert found or wanted in done.stderr


def test_install_has_headers_and_one_library(prefix: Path) -> None:
    headers = {path.name for path in (prefix / "include" / "lemo").iterdir()}
    assert headers == {path.name for path in (ROOT / "cpp" / "include" / "lemo").iterdir()}
    assert [path.name for path in prefix.rglob("*.so*")] == ["liblemo.so"]


def test_module_refuses_a_static_library(tmp_path: Path) -> None:
    options = ("-DLEMO_PYTHON=ON", "-DBUILD_SHARED_LIBS=OFF", "-DLEMO_CUDA=OFF")
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path), f"-DPython_EXECUTABLE={sys.executable}", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "LEMO_PYTHON=ON needs the shared library" in done.stderr


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
    project = HERE / "subproject"
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


def test_a_project_around_it_links_and_runs(source: Path, version: str, tmp_path: Path) -> None:
    project = HERE / "subproject"
    run("cmake", "-S", project, "-B", tmp_path, f"-DLEMO_SOURCE={source}")
    run("cmake", "--build", tmp_path, "--target", "consumer", "--parallel", "2")
    assert run(tmp_path / "consumer").strip() == f"lemo {version} ok"
