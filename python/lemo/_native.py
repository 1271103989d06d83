"""From torch tensors to the C interface: views, execution context and workspace. Knows no operation by name."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import ModuleType

import torch
from torch import Tensor

# lemo_dtype and lemo_device of cpp/include/lemo/types.h
_DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.uint8: 5,
}
_DEVICES = {"cpu": 0, "cuda": 1}
_ALIGNMENT = 256  # bytes, of the workspace


@functools.cache
def core() -> ModuleType:
    """The compiled module. Imported on first use: shapes and schemas need no library."""
    try:
        from lemo import _C
    except ImportError as error:
        raise ImportError(
            f"lemo._C: expected the compiled library beside the package, got: {error}; install with `pip install .`"
        ) from error
    return _C


def version() -> str:
    """Version of the compiled library, "major.minor.patch"."""
    return core().version()


def has_backend(device: str) -> bool:
    """True if the compiled library has kernels for "cpu" or "cuda" and such a device can be used."""
    return core().has_backend(_DEVICES[device])


def call(
    name: str,
    device: torch.device,
    arguments: Mapping[str, object],
    *,
    workspace: bool = False,
    deterministic: bool = False,
) -> None:
    """Runs ``lemo_<name>`` on the current stream of ``device``.

    arguments: the fields of the argument struct in the header's order (blocks spread into offsets, documents and
    block_size). Raises ValueError (argument), NotImplementedError (no such kernel), FloatingPointError (scores) or
    RuntimeError (device), with the argument's name, what was expected and what was given.
    """
    if device.type not in _DEVICES:
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    module = core()
    values = [_value(key, value, device) for key, value in arguments.items()]
    deterministic = deterministic or wants_determinism()
    if not workspace:
        getattr(module, name)(_exec(device, 0, 0, deterministic), *values)
        return
    size = getattr(module, f"{name}_workspace")(_exec(device, 0, 0, deterministic), *values)
    # The caching allocator hands the memory to later work of the same stream only, so dropping it at return is safe.
    buffer = torch.empty(size + _ALIGNMENT, dtype=torch.uint8, device=device)
    start = buffer.data_ptr() + -buffer.data_ptr() % _ALIGNMENT
    getattr(module, name)(_exec(device, start, size, deterministic), *values)


def wants_determinism() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _value(name: str, value: object, device: torch.device) -> object:
    if not isinstance(value, Tensor):
        return int(value) if isinstance(value, bool) else value
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    dtype = _DTYPES.get(value.dtype)
    if dtype is None:
        expected = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise ValueError(f"{name}: expected a dtype of {expected}, got {str(value.dtype).removeprefix('torch.')}")
    return (value.data_ptr(), dtype, tuple(value.shape), value.stride())


def _exec(device: torch.device, workspace: int, size: int, deterministic: bool) -> tuple[int, ...]:
    if device.type == "cpu":
        return (0, 0, 0, workspace, size, int(deterministic), torch.get_num_threads())
    index = device.index if device.index is not None else torch.cuda.current_device()
    return (1, index, torch.cuda.current_stream(index).cuda_stream, workspace, size, int(deterministic), 0)
