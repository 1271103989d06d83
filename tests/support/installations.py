"""What tests/consumers builds against, and how it runs commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON_FOLDERS = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Installation:
    """Where an installed library and its descriptions are."""

    library: Path
    cmake: Path
    pkgconfig: Path
    static: bool = False


def run(*command: object, **variables: str) -> str:
    """What a command prints; it has to succeed."""
    words = [str(part) for part in command]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def install(build: Path, prefix: Path, *options: str) -> Path:
    """Builds the library for the CPU in `build`, whose objects are kept, and installs it. The prefix is moved
    afterwards: nothing in it may depend on where it was installed."""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    run("cmake", "-S", ROOT, "-B", build, *generator, "-DLEMO_CUDA=OFF", "-DCMAKE_INSTALL_LIBDIR=lib", *options)
    run("cmake", "--build", build, "--parallel", "2")
    run("cmake", "--install", build, "--prefix", prefix.with_name("before"))
    return prefix.with_name("before").rename(prefix)


def described(prefix: Path, static: bool = False) -> Installation:
    library = prefix / "lib"
    return Installation(library, library / "cmake" / "lemo", library / "pkgconfig", static)
