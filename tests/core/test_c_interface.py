"""What every call of the C interface promises: struct sizes, reserved fields, sizes that overflow, empty tensors, and
that a call which fails has changed nothing."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from support import capi
from support.capi import Call, make, view

ROWS, DIM, BIG = 40, 8, 2**61


def forward(**changes: object) -> Call:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(ROWS, 1, DIM, generator=generator)
    out, lse = torch.full_like(q, -7.0), torch.full((1, ROWS), -7.0)
    cu_seqlens = torch.tensor([0, ROWS], dtype=torch.int32)
    fields: dict[str, Any] = {
        "q": view(q),
        "k": view(q),
        "v": view(q),
        "cu_seqlens": view(cu_seqlens),
        "out": view(out),
    }
    fields |= {"lse": view(lse), "max_seqlen": ROWS, "scale": 0.3}
    call = Call("attention_forward", make(capi.AttentionForward, **(fields | changes)))
    call.tensors = (q, out, lse, cu_seqlens)
    return call


def test_struct_sizes_are_those_of_the_header(tmp_path: Path) -> None:
    """The Python mirror of the structs is right, so that the tests below speak of the real ones."""
    names = {"lemo_exec": capi.Exec, "lemo_blocks": capi.Blocks, "lemo_tensor": capi.Tensor}
    names |= {f"lemo_{operation}_args": kind for operation, kind in capi.ARGUMENTS.items()}
    source = tmp_path / "sizes.c"
    lines = "".join(f'printf("%zu ", sizeof({name}));' for name in names)
    source.write_text(f"#include <lemo/lemo.h>\n#include <stdio.h>\nint main(void) {{{lines} return 0;}}\n")
    include = Path(__file__).parents[2] / "cpp" / "include"
    subprocess.run(["cc", f"-I{include}", source, "-o", tmp_path / "sizes"], check=True)
    printed = subprocess.run([tmp_path / "sizes"], check=True, capture_output=True, text=True).stdout
    assert [int(size) for size in printed.split()] == [ctypes.sizeof(kind) for kind in names.values()]


def test_the_last_error_stays_where_it_is() -> None:
    """A pointer taken before a call, as in printf("%d %s", lemo_gather(...), lemo_last_error()), is still readable."""
    call = forward(window=-12345)
    address = ctypes.CFUNCTYPE(ctypes.c_void_p)(("lemo_last_error", call.lib))
    before = address()
    assert before is not None and call.run() == capi.INVALID
    assert address() == before
    assert ctypes.string_at(before) == b"attention_forward: window: expected at least 0 (0: no window), got -12345"


def test_older_and_newer_structs() -> None:
    """Shorter structs lack optional fields, whatever lies behind them; longer ones pass while their tail is zero."""

    class Newer(ctypes.Structure):
        _fields_ = (("known", capi.AttentionForward), ("tail", ctypes.c_char * 64))

    call = forward()
    call.allocate()
    newer = Newer(known=call.args)
    call.args = newer
    newer.known.struct_size = capi.AttentionForward.tile_offsets.offset
    newer.known.tile_offsets.ndim = 77  # not part of the caller's struct
    assert call.run() == capi.OK, call.message()
    newer.known.tile_offsets.ndim = 0
    newer.known.struct_size = ctypes.sizeof(newer)
    assert call.run() == capi.OK, call.message()
    ctypes.memset(ctypes.addressof(newer) + ctypes.sizeof(newer) - 1, 1, 1)
    assert call.run() == capi.UNSUPPORTED
    assert "byte" in call.message() and "update" in call.message()


@pytest.mark.parametrize("size", [0, 4, capi.AttentionForward.lse.offset + 20, capi.AttentionForward.lse.offset + 24])
def test_sizes_that_end_inside_of_a_field_are_refused(size: int) -> None:
    call = forward()
    call.args.struct_size = size
    assert call.run() == capi.INVALID
    assert "struct_size" in call.message() and str(size) in call.message()


def test_an_older_exec_cannot_be_cancelled() -> None:
    call = forward()
    call.allocate()
    call.exec.struct_size = capi.Exec.cancel.offset
    call.exec.cancel = capi.CancelFunction(lambda _: 1)
    assert call.run() == capi.OK, call.message()


def test_reserved_fields_are_zero() -> None:
    x = torch.zeros(4, 1, DIM)
    lists = capi.blocks(torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32), 4)
    lists.reserved = 1
    scores = torch.zeros(1)
    call = Call("scores", make(capi.Scores, q=view(x), k=view(x), blocks=lists, scale=1.0, scores=view(scores)))
    for status in (call.run(), call.workspace()[0]):
        assert status == capi.INVALID and "blocks.reserved" in call.message()
    call.args.blocks.reserved = 0
    call.args.reserved = 12345
    assert call.run() == capi.INVALID
    assert call.message() == "scores: args.reserved: expected 0, got 12345; zero-initialize the struct"


def predict(**changes: object) -> Call:
    x, w1, w2, w3, scores = torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 2), torch.ones(3, 2), torch.zeros(1)
    offsets, documents = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    fields: dict[str, Any] = {
        "x": view(x),
        "blocks": capi.blocks(offsets, documents, 2),
        "eps": 1e-5,
        "scores": view(scores),
    }
    for which in "qk":
        fields |= {f"w{which}1": view(w1), f"w{which}2": view(w2), f"w{which}3": view(w3)}
    call = Call("predict", make(capi.Predict, **(fields | changes)))
    call.tensors = (x, w1, w2, w3, scores, offsets, documents)
    return call


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((BIG, 2), (0, 1)),  # more elements than PTRDIFF_MAX bytes hold, in 8 bytes of memory
        ((2**62, 2), (0, 1)),  # more than int64 counts
        ((3, 2), (2**62, 1)),  # the last element lies beyond the address space
        ((3, 2), (2**63 - 1, 1)),
    ],
)
def test_a_tensor_beyond_the_address_space_is_refused(shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
    memory = torch.ones(64)
    wild = view(memory, shape, stride)
    call = predict(wq3=wild, wk3=wild)
    for status in (call.run(), call.workspace()[0]):
        assert status == capi.INVALID
        assert "wq3" in call.message() and "PTRDIFF_MAX" in call.message()


@pytest.mark.parametrize("columns", [2**58, 2**60])
def test_a_workspace_beyond_the_address_space_is_refused(columns: int) -> None:
    """Every tensor fits the address space, but not what the operation needs of several of them."""
    memory, offsets = torch.ones(64), torch.tensor([0, 2], dtype=torch.int32)
    wild = view(memory, (columns, 1), (0, 1))
    many = capi.blocks(offsets, torch.tensor([0, 1], dtype=torch.int32), 2)
    many.offsets.shape[0] = 2**30  # for the workspace alone data is not read
    narrow = view(memory, (1, 2), (2, 1))
    call = predict(wq2=narrow, wk2=narrow, wq3=wild, wk3=wild)
    call.args.blocks = many
    call.args.scores = view(memory, (2**30 - 1,))
    status, size = call.workspace()
    assert status == capi.INVALID and size == 12345
    assert "wq3" in call.message() and "PTRDIFF_MAX" in call.message()


def test_an_output_whose_extent_overflows_is_no_output_without_overlap() -> None:
    """Strides times sizes wrap around to something that looks free of overlap."""
    call = forward()
    call.allocate()
    out = call.args.out
    out.stride[:3] = (2**62 + DIM, DIM, 1)
    call.args.out = out
    assert call.run() == capi.INVALID
    assert "out" in call.message() and "PTRDIFF_MAX" in call.message()


def test_an_empty_tensor_at_null_is_present() -> None:
    """Allocators give NULL for 0 elements. Tile lists that are all empty leave each tile of 128 rows its own."""
    rows = 300
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(rows, 1, DIM, generator=generator) for _ in range(3))
    out, lse, cu_seqlens = torch.empty_like(q), torch.empty(1, rows), torch.tensor([0, rows], dtype=torch.int32)
    slots = rows // 128 + 1
    tile_offsets = torch.zeros(slots + 1, dtype=torch.int32)
    tiles = view(None, (0,))
    tiles.dtype = capi.DTYPES[torch.int32]
    fields: dict[str, Any] = {
        "q": view(q),
        "k": view(k),
        "v": view(v),
        "cu_seqlens": view(cu_seqlens),
        "out": view(out),
    }
    fields |= {"lse": view(lse), "tile_offsets": view(tile_offsets), "tiles": tiles}
    call = Call("attention_forward", make(capi.AttentionForward, max_seqlen=rows, scale=0.3, **fields))
    call.allocate()
    assert call.run() == capi.OK, call.message()
    tile = torch.arange(rows) // 128
    seen = (tile[:, None] == tile) & torch.ones(rows, rows, dtype=torch.bool).tril()
    s = (0.3 * q[:, 0] @ k[:, 0].T).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(out[:, 0], torch.softmax(s, -1) @ v[:, 0], rtol=1e-4, atol=1e-5)


def test_scores_take_memory_by_what_blocks_hold() -> None:
    """block_size is a bound. 4 tokens under the largest bound of all fit into an address space that is nearly used up;
    and where memory does run out, nothing has been written."""
    code = """
        import resource, torch
        from support import capi
        from support.capi import Call, make, view
        x, scores, table = torch.ones(4, 1, 8), torch.full((1,), -7.0), torch.full((1, 1), -7.0)
        offsets, documents = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
        lists = capi.blocks(offsets, documents, 2**31 - 1)
        arguments = dict(q=view(x), k=view(x), blocks=lists, scale=1.0, scores=view(scores), map=view(table))
        call = Call("scores", make(capi.Scores, **arguments))
        wide = view(x, (4, 2**26, 8), (0, 0, 1))  # 16 GiB of keys, in 8 floats
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, resource.RLIM_INFINITY))
        assert call.run() == capi.OK, call.message()
        assert scores.item() != -7 and table.item() != -7
        scores.fill_(-7), table.fill_(-7)
        call.args.q = call.args.k = wide
        assert call.run() == capi.BACKEND and "memory" in call.message(), call.message()
        assert scores.item() == -7 and table.item() == -7
    """
    run_python(code)


def run_python(code: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
