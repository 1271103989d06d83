"""setuptools' build backend, plus CUTLASS's headers as a build requirement where the CUDA backend can be built."""

import os
import shutil
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that are the same)


def _cuda_requirements() -> list[str]:
    wanted = os.environ.get("LEMO_CUDA", "AUTO").upper()
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if wanted in ("OFF", "0", "FALSE", "NO") or "LEMO_CUTLASS_DIR" in os.environ or (wanted == "AUTO" and not nvcc):
        return []
    return ["nvidia-cutlass>=4.2,<4.3"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _cuda_requirements()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _cuda_requirements()
