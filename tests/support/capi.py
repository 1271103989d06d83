"""The C interface through ctypes, for what the Python module cannot say: sizes, reserved fields and wild shapes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from ctypes import c_float, c_int32, c_int64, c_uint64, c_void_p
from typing import Any

import torch
from lemo.__main__ import folder
from lemo._native import constant, core

OK, INVALID, UNSUPPORTED = (constant(f"LEMO_{name}") for name in ("OK", "INVALID_ARGUMENT", "UNSUPPORTED"))
SMALL, NUMERICAL = constant("LEMO_WORKSPACE_TOO_SMALL"), constant("LEMO_NUMERICAL")
BACKEND, INTERNAL, CANCELLED = (constant(f"LEMO_{name}") for name in ("BACKEND_ERROR", "INTERNAL_ERROR", "CANCELLED"))
DTYPES = {torch.float32: constant("LEMO_F32"), torch.int32: constant("LEMO_I32"), torch.int64: constant("LEMO_I64")}


def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(folder("library-dir") / "liblemo.so"))
    lib.lemo_last_error.restype = ctypes.c_char_p
    return lib


class Tensor(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("dtype", c_int32),
        ("ndim", c_int32),
        ("shape", c_int64 * 4),
        ("stride", c_int64 * 4),
    )


CancelFunction = ctypes.CFUNCTYPE(c_int32, c_void_p)


class Exec(ctypes.Structure):
    _fields_ = (
        ("struct_size", c_uint64),
        ("device", c_int32),
        ("device_index", c_int32),
        ("stream", c_void_p),
        ("workspace", c_void_p),
        ("workspace_size", c_uint64),
        ("deterministic", c_int32),
        ("num_threads", c_int32),
        ("cancel", CancelFunction),
        ("cancel_context", c_void_p),
    )


class Blocks(ctypes.Structure):
    _fields_ = (("offsets", Tensor), ("documents", Tensor), ("block_size", c_int32), ("reserved", c_int32))


TYPES = {
    "lemo_tensor": Tensor,
    "lemo_blocks": Blocks,
    "int32_t": c_int32,
    "int64_t": c_int64,
    "uint64_t": c_uint64,
    "float": c_float,
}


def struct(operation: str) -> type[ctypes.Structure]:
    """lemo_<operation>_args."""
    fields = [(name, TYPES[kind]) for name, kind in core().structs[operation]]
    return type(f"lemo_{operation}_args", (ctypes.Structure,), {"_fields_": (("struct_size", c_uint64), *fields)})


ARGUMENTS = {operation: struct(operation) for operation in core().structs}
AttentionForward, AttentionBackward = ARGUMENTS["attention_forward"], ARGUMENTS["attention_backward"]
Gather, Predict, Scores = ARGUMENTS["gather"], ARGUMENTS["predict"], ARGUMENTS["scores"]


def view(tensor: torch.Tensor | None, shape: Iterable[int] = (), stride: Iterable[int] = ()) -> Tensor:
    """A tensor's memory, with another shape and other strides if given; None is memory at NULL, of float32."""
    shape = tuple(shape) or (tuple(tensor.shape) if tensor is not None else ())
    stride = tuple(stride) or (tuple(tensor.stride()) if tensor is not None else (1,) * len(shape))
    out = Tensor(dtype=DTYPES[torch.float32 if tensor is None else tensor.dtype], ndim=len(shape))
    out.data = None if tensor is None else tensor.data_ptr()
    out.shape[: len(shape)] = shape
    out.stride[: len(stride)] = stride
    return out


def blocks(offsets: torch.Tensor, documents: torch.Tensor, block_size: int) -> Blocks:
    return Blocks(view(offsets), view(documents), block_size, 0)


def make(kind: type[ctypes.Structure], **fields: Any) -> Any:
    return kind(struct_size=ctypes.sizeof(kind), **fields)


class Call:
    """One operation with its workspace; `memory` keeps the workspace alive."""

    def __init__(self, name: str, args: ctypes.Structure, num_threads: int = 1) -> None:
        self.lib, self.name, self.args = library(), name, args
        self.exec = Exec(struct_size=ctypes.sizeof(Exec), num_threads=num_threads)
        self.memory: torch.Tensor | None = None
        self.tensors: tuple[torch.Tensor, ...] = ()  # what the arguments point into

    def message(self) -> str:
        return self.lib.lemo_last_error().decode()

    def workspace(self) -> tuple[int, int]:
        """(status, bytes)"""
        size = c_uint64(12345)
        status = getattr(self.lib, f"lemo_{self.name}_workspace")(
            ctypes.byref(self.exec), ctypes.byref(self.args), ctypes.byref(size)
        )
        return status, size.value

    def allocate(self) -> None:
        status, size = self.workspace()
        assert status == OK, self.message()
        self.memory = torch.empty(size + 256, dtype=torch.uint8)
        self.exec.workspace = (self.memory.data_ptr() + 255) // 256 * 256
        self.exec.workspace_size = size

    def run(self) -> int:
        return getattr(self.lib, f"lemo_{self.name}")(ctypes.byref(self.exec), ctypes.byref(self.args))
