"""Builds liblemo and lemo._C with CMake. The Python package is an installation prefix: the module at its root, and lib/
and include/ as `cmake --install` makes them, for C and C++ programs that link the library (`python -m lemo --help`).

Environment: LEMO_CUDA=AUTO|ON|OFF (default AUTO: on where nvcc and the CUTLASS headers are found),
LEMO_CUDA_ARCHITECTURES="90a;80", LEMO_CUTLASS_DIR, LEMO_BUILD_DIR (kept between builds), MAX_JOBS, CMAKE_ARGS;
LEMO_VERSION_LABEL=cu130 appends +cu130 to the version.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The version that cpp/include/lemo/types.h states, and the label."""
    header = (ROOT / "cpp" / "include" / "lemo" / "types.h").read_text(encoding="utf-8")
    number = ".".join(re.findall(r"#define LEMO_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header))
    label = os.environ.get("LEMO_VERSION_LABEL", "")
    return f"{number}+{label}" if label else number


class CleanBuild(build_py):
    """Runs first. setuptools would put into a wheel what an earlier build has left behind, deleted modules included."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Runs CMake in place of a compiler call; the extension's only source is CMakeLists.txt."""

    def build_extension(self, ext: Extension) -> None:
        packages = [Path(self.get_ext_fullpath(ext.name)).resolve().parent]
        if self.editable_mode:  # setuptools copies the module it asked for and nothing else
            packages.append(ROOT / "python" / "lemo")
        folder = Path(os.environ.get("LEMO_BUILD_DIR", Path(self.build_temp) / "lemo")).resolve()
        settings = {"CMAKE_BUILD_TYPE": "Release", "CMAKE_INSTALL_LIBDIR": "lib", "LEMO_PYTHON": "ON"}
        settings["Python_EXECUTABLE"] = sys.executable
        names = ("LEMO_CUDA", "LEMO_CUDA_ARCHITECTURES", "LEMO_CUTLASS_DIR")
        settings |= {name: os.environ[name] for name in names if name in os.environ}
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *(f"-D{k}={v}" for k, v in settings.items())]
        configure += ["-U_Python_*", "-UPYTHON_*", "-Upybind11_DIR"]  # what a kept folder knows of another Python
        if shutil.which("ninja") and not (folder / "Makefile").exists():
            configure += ["-G", "Ninja"]
        jobs = os.environ.get("MAX_JOBS", str(min(os.cpu_count() or 1, 8)))
        subprocess.run([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))], check=True)
        subprocess.run(["cmake", "--build", str(folder), "--parallel", jobs], check=True)
        for package in packages:
            install = ["cmake", "--install", str(folder), "--prefix", str(package)]
            subprocess.run(install, check=True)
            subprocess.run([*install, "--component", "python"], check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "lemo"
        installed = [path for name in ("include", "lib") for path in (package / name).rglob("*") if path.is_file()]
        return [*super().get_outputs(), *map(str, installed)]


setup(
    version=version(),
    ext_modules=[Extension("lemo._C", sources=["CMakeLists.txt"])],
    cmdclass={"build_py": CleanBuild, "build_ext": CMakeBuild},
)
