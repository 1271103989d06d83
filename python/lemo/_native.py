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


def call(name: str, device: torch.device, arguments: Mapping[str, object], *, deterministic: bool = False) -> None:
    """Runs ``lemo_<name>`` on the current stream of ``device``, with as much workspace as it asks for.

    arguments: the fields of the argument struct in the header's order (blocks spread into offsets, documents and
    block_size). Raises ValueError (argument), NotImplementedError (no such kernel), FloatingPointError (scores) or
    RuntimeError (device), with the argument's name, what was expected and what was given.
    """
    if device.type not in _DEVICES:
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    values = [_value(key, value, device) for key, value in arguments.items()]

    def allocate(size: int) -> Tensor:
        # The caching allocator hands the memory to later work of the same stream only, so that dropping it is safe.
        return torch.empty(size, dtype=torch.uint8, device=device)

    exec_ = _exec(device, deterministic or wants_determinism())
    getattr(core(), name)(exec_, allocate, *values)


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
    return (value.data_ptr(), dtype, value.shape, value.stride())


def _exec(device: torch.device, deterministic: bool) -> tuple[int, ...]:
    if device.type == "cpu":
        return (0, 0, 0, int(deterministic), torch.get_num_threads())
    index = device.index if device.index is not None else torch.cuda.current_device()
    return (1, index, _current_stream(index), int(deterministic), 0)


# Without the Stream object around it, which costs more than the rest of a call.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)
