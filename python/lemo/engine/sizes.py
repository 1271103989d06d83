"""Sizes in bytes as people write them, and what known GPUs hold. Imports neither torch nor transformers."""

from __future__ import annotations

import math
import re
from typing import Any

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}IB": 1 << 10 * n for n, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}B": 1000**n for n, prefix in enumerate("KMGT", 1)},
}
_MIB = 1 << 20
_SIZE = r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][0-9]+)?)\s*([A-Za-z]*)\s*"

# GiB that torch reports for the GPU (`torch.cuda.get_device_properties`), less than what the vendor's name promises.
GPUS = {
    "a100": 79.1,
    "a100-40gb": 39.4,
    "a10": 22.1,
    "a6000": 47.5,
    "b200": 178.3,
    "h100": 79.1,
    "h200": 139.8,
    "l4": 22.0,
    "l40s": 44.4,
    "rtx3090": 23.6,
    "rtx4090": 23.5,
    "rtx5090": 31.4,
}


def parse_bytes(value: Any) -> int:
    """Bytes of an integer, or of a text like 40GiB, 512MiB or 40e9. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    found = re.fullmatch(_SIZE, value) if isinstance(value, str) else None
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"expected a number of bytes, like 40GiB, 512MiB or 40000000000; got {value!r}")
    size = float(found[1]) * _UNITS[found[2].upper()]
    if size >= 1 << 63:
        raise ValueError(f"expected less than 2^63 bytes; got {value!r}")
    return round(size)


def format_bytes(size: int) -> str:
    """In GiB, or MiB below one."""
    return f"{size / 2**30:.2f} GiB" if size >= 1 << 30 else f"{size / _MIB:.1f} MiB"


def rounded_up(size: int) -> str:
    """The least whole number of MiB that holds `size`, as `parse_bytes` reads it."""
    return f"{-(-size // _MIB)}MiB"


def gpu_bytes(text: str) -> int:
    """Memory of a GPU, by its name or as a size. Raises ValueError."""
    name = re.sub(r"[\s_]", "", text.lower())
    if name in GPUS:
        return math.floor(GPUS[name] * 2**30)
    try:
        size = parse_bytes(text)
    except ValueError:
        raise ValueError(f"{text!r} is neither a size like 80GiB nor one of {', '.join(sorted(GPUS))}") from None
    if size < 1 << 30:
        bare = " (a number without a unit like GiB is bytes)" if text.strip().isdecimal() else ""
        raise ValueError(f"expected the memory of a GPU, at least 1GiB; got {text!r}{bare}")
    return size


def left_for_steps(gpu: int) -> int:
    """What a step may take of a GPU's memory: the CUDA context takes about 1 GiB, and 5 % is for what an estimate
    cannot know, as fragmentation."""
    return math.floor(0.95 * gpu) - (1 << 30)
