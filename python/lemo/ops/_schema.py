"""The torch library `lemo`: one place that declares operators and binds them to a backend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

library = torch.library.Library("lemo", "DEF")

# Kernels read strides as they are given, so a compiler must not choose others for them.
_TAGS = (getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order), torch.Tag.pt2_compliant_tag)


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Declares ``lemo::<schema>``: ``run`` serves CPU and CUDA tensors alike, ``fake`` only allocates the outputs."""
    name = schema.split("(", 1)[0]
    library.define(schema, tags=_TAGS)
    library.impl(name, run, "CPU")
    library.impl(name, run, "CUDA")
    torch.library.register_fake(f"lemo::{name}", fake, lib=library)


def need(name: str, tensor: Tensor, dimensions: str) -> None:
    """Raises ValueError unless the tensor has as many dimensions as ``dimensions`` ("T d") names: outputs are allocated
    from them before the library checks sizes, types and strides."""
    if tensor.dim() != len(dimensions.split()):
        wanted = ", ".join(dimensions.split())
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(tensor.shape)}")


def choice(name: str, value: str, known: dict[str, int]) -> int:
    """The number of a named option. Raises ValueError for an unknown one."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    return known[value]


NORMS = {"rms": 0, "layer": 1}
POOLS = {"mean": 0, "max": 1}
MODES = {"threshold": 0, "budget": 1, "sample": 2, "poisson": 3}
REDUCTIONS = {"mean": 0, "sum": 1}
