"""Builds liblemo and lemo._C with CMake and puts both, with the C headers, into the Python package.

Environment: LEMO_CUDA=AUTO|ON|OFF (default AUTO: on where nvcc and the CUTLASS headers are found),
LEMO_CUDA_ARCHITECTURES="90a;80", LEMO_BUILD_DIR (kept between builds), MAX_JOBS, CMAKE_ARGS.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake in place of a compiler call; the extension's only source is CMakeLists.txt."""

    def build_extension(self, ext: Extension) -> None:
        packages = [Path(self.get_ext_fullpath(ext.name)).resolve().parent]
        if self.editable_mode:  # setuptools copies the module it asked for, but not what lies beside it
            packages.append(ROOT / "python" / "lemo")
        build = Path(os.environ.get("LEMO_BUILD_DIR", Path(self.build_temp) / "lemo")).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build)),
            *("-DCMAKE_BUILD_TYPE=Release", "-DLEMO_PYTHON=ON", f"-DPython_EXECUTABLE={sys.executable}"),
        ]
        if shutil.which("ninja") and not (build / "Makefile").exists():
            configure += ["-G", "Ninja"]
        for name in ("LEMO_CUDA", "LEMO_CUDA_ARCHITECTURES", "LEMO_CUTLASS_DIR"):
            if name in os.environ:
                configure.append(f"-D{name}={os.environ[name]}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS", str(min(os.cpu_count() or 1, 8)))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", jobs], check=True)
        for package in packages:
            install = ["cmake", "--install", str(build), "--component", "python", "--prefix", str(package)]
            subprocess.run(install, check=True)

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("lemo._C")).parent
        return [*super().get_outputs(), str(package / "liblemo.so")]


setup(
    ext_modules=[Extension("lemo._C", sources=["CMakeLists.txt"])],
    cmdclass={"build_ext": CMakeBuild},
)
