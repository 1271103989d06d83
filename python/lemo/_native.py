"""From torch tensors to the C interface: views, execution context and workspace. No operation is named here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from types import ModuleType

import torch
from torch import Tensor

# The names of torch's dtypes and devices in the C headers.
_DTYPES = {
    torch.float32: "LEMO_F32",
    torch.float16: "LEMO_F16",
    torch.bfloat16: "LEMO_BF16",
    torch.int32: "LEMO_I32",
    torch.int64: "LEMO_I64",
    torch.uint8: "LEMO_U8",
}
_UNKNOWN = "unknown dtype"  # what the library calls any other (cpp/src/checker.h)
_DEVICES = {"cpu": "LEMO_CPU", "cuda": "LEMO_CUDA"}

# Their numbers, filled when the library is loaded: every call looks up several.
_numbers: dict[torch.dtype | str, int] = {}


@functools.cache
def core() -> ModuleType:
    """The compiled module. Imported on first use: shapes and schemas need no library."""
    try:
        from lemo import _C
    except ImportError as error:
        raise ImportError(
            f"lemo._C: expected the compiled library next to the package, got: {error}; install with `pip install .`"
        ) from error
    _numbers.update({known: _C.constants[name] for known, name in (_DTYPES | _DEVICES).items()})
    return _C


@functools.cache
def constant(name: str) -> int:
    """The value of an enumerator or a constant of the C headers, such as "LEMO_TILE_ROWS"."""
    return core().constants[name]


@functools.cache
def choices(prefix: str) -> dict[str, int]:
    """The enumerators that begin with ``prefix`` by the rest of their names in lower case: {"rms": 0, "layer": 1}."""
    known = core().constants.items()
    return {name.removeprefix(prefix).lower(): value for name, value in known if name.startswith(prefix)}


@functools.cache
def fields(name: str) -> dict[str, str]:
    """The fields of lemo_<name>_args in order with their roles, as cpp/include/lemo/operations.h lists them; blocks are
    spread into offsets, documents and block_size."""
    return dict(core().fields[name])


def version() -> str:
    """Version of the compiled library, "major.minor.patch"."""
    return core().version()


def has_backend(device: str) -> bool:
    """True if the compiled library has kernels for "cpu" or "cuda" and such a device can be used."""
    return core().has_backend(constant(_DEVICES[device]))


def call(name: str, device: torch.device, arguments: Mapping[str, object], *, deterministic: bool = False) -> None:
    """Runs ``lemo_<name>`` on the current stream of ``device``, with as much workspace as it asks for.

    arguments: the fields of the argument struct by name, in any order; tensors that are left out are absent, and
    numbers 0, as in a struct that was zero-initialized. Raises ValueError (argument), NotImplementedError (no such
    kernel), FloatingPointError (scores) or RuntimeError (device), with the argument's name, what was expected and what
    was given.
    """
    known = fields(name)
    if not arguments.keys() <= known.keys():
        raise TypeError(f"{name}: expected fields of lemo_{name}_args, got {sorted(arguments.keys() - known.keys())}")
    values = [arguments.get(key, 0 if role == "value" else None) for key, role in known.items()]
    run(name, device, values, deterministic)


def run(name: str, device: torch.device, values: Sequence[object], deterministic: bool = False) -> None:
    """``call`` with the values of all fields of the argument struct, in order."""
    exec_ = _exec(device, deterministic or wants_determinism())
    operation, names = _operation(name)
    given = map(_value, names, values, repeat(device))

    def allocate(size: int) -> Tensor:
        # The caching allocator hands the memory to later work of the same stream only, so dropping it here is safe.
        return torch.empty(size, dtype=torch.uint8, device=device)

    try:
        operation(exec_, allocate, *given)
    except ValueError as error:
        raise ValueError(_with_dtype(str(error), dict(zip(names, values, strict=True)))) from None


def _with_dtype(message: str, values: Mapping[str, object]) -> str:
    """A message of the library, which has no name for most of torch's dtypes, with that of the argument it is about."""
    if _UNKNOWN not in message:
        return message
    about = next((v for n, v in values.items() if isinstance(v, Tensor) and f"{n}:" in message.split()), None)
    return message if about is None else message.replace(_UNKNOWN, str(about.dtype).removeprefix("torch."))


@functools.cache
def _operation(name: str) -> tuple[Callable[..., None], tuple[str, ...]]:
    return getattr(core(), name), tuple(fields(name))


def wants_determinism() -> bool:
    return torch._C._get_deterministic_algorithms()  # torch.are_deterministic_algorithms_enabled(), sooner


def _value(name: str, value: object, device: torch.device) -> object:
    if not isinstance(value, Tensor):
        return value
    if value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {value.device}")
    # The library refuses a dtype of no number, and alone knows which it expects of this argument.
    return (value.data_ptr(), _numbers.get(value.dtype, -1), value.shape, value.stride())


def _exec(device: torch.device, deterministic: bool) -> tuple[int, ...]:
    number, index = _place(device)
    if index is None:
        return (number, 0, 0, int(deterministic), torch.get_num_threads())
    index = torch.cuda.current_device() if index < 0 else index
    return (number, index, _current_stream(index), int(deterministic), 0)


@functools.cache  # asking a device for its type takes as long as the rest of `_exec`
def _place(device: torch.device) -> tuple[int, int | None]:
    """The number of the device's type, and its index: -1 for the current one, None for a type that has none."""
    if device.type not in _DEVICES:
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    core()
    if device.type == "cpu":
        return _numbers["cpu"], None
    return _numbers["cuda"], -1 if device.index is None else device.index


# The handle without a Stream object around it, which would cost more than the rest of a call.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)
