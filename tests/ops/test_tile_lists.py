"""Two-dimensional sparsity: attention in which a tile of queries sees only the key tiles of its list."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from lemo import ops
from lemo._native import constant
from lemo.ops.attention import transpose_tile_lists
from support import oracle
from support.compare import FP32_ROUNDINGS, error
from torch import Tensor

TILE_ROWS = constant("LEMO_TILE_ROWS")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@dataclass(frozen=True)
class Case:
    """Documents of `lengths` rows; a list holds every earlier tile with probability `density`."""

    lengths: tuple[int, ...]
    density: float = 0.5
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    rows: bool = False  # at original offsets: runs of 64 rows with gaps of 64

    def inputs(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        starts = [0]
        for n in self.lengths:
            starts.append(starts[-1] + n)
        count = starts[-1]
        slots = count // TILE_ROWS + len(self.lengths)
        lists: list[list[int]] = [[] for _ in range(slots)]
        seen = torch.zeros(count, count, dtype=torch.bool)
        for d, (begin, end) in enumerate(itertools.pairwise(starts)):
            for tile, at in enumerate(range(begin, end, TILE_ROWS)):
                kept = [b for b in range(tile) if torch.rand((), generator=generator) < self.density]
                lists[begin // TILE_ROWS + d + tile] = kept
                for b in [*kept, tile]:
                    first = begin + b * TILE_ROWS
                    seen[at : min(at + TILE_ROWS, end), first : min(first + TILE_ROWS, end)] = True
        flat = [b for kept in lists for b in kept]
        offsets = torch.tensor([0, *(len(kept) for kept in lists)]).cumsum(0)
        row = torch.arange(count)
        storage = row // 64 * 128 + row % 64 if self.rows else row
        draw = {
            name: torch.randn(int(storage.max()) + 1, heads, self.dim, generator=generator).to(dtype)
            for name, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads), ("dout", self.heads))
        }
        tensors = draw | {
            "cu_seqlens": torch.tensor(starts, dtype=torch.int32),
            "tile_offsets": offsets.to(torch.int32),
            "tiles": torch.tensor([*flat, -1, -1], dtype=torch.int32),  # two entries of padding
            "rows": storage.to(torch.int32),
            "seen": seen & torch.ones_like(seen).tril(),
        }
        return {name: t.to(device) for name, t in tensors.items()}

    def run(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        rows = t["rows"] if self.rows else None
        q, k, v = (t[name].clone().requires_grad_() for name in "qkv")
        arguments = (t["cu_seqlens"], rows, max(self.lengths), self.dim**-0.5, t["tile_offsets"], t["tiles"])
        out, lse = ops.attention_forward(q, k, v, *arguments)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), t["dout"])
        index = t["rows"].long()
        return {"out": out[index], "lse": lse, "dq": dq[index], "dk": dk[index], "dv": dv[index]}

    def expect(self, t: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        index, group = t["rows"].long(), self.heads // self.kv_heads
        q, k, v = (t[name][index].to(dtype).requires_grad_() for name in "qkv")
        wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        s = torch.einsum("ihd,jhd->hij", q, wide_k) * self.dim**-0.5
        s = s.masked_fill(~t["seen"], -math.inf)
        out = torch.einsum("hij,jhd->ihd", torch.softmax(s, -1), wide_v)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), t["dout"][index].to(dtype))
        return {"out": out.detach(), "lse": torch.logsumexp(s, -1).detach(), "dq": dq, "dk": dk, "dv": dv}


CASES = [
    Case((700, 130, 1, 300)),
    Case((1000,), heads=4, kv_heads=4, dim=16),
    Case((64,)),
    Case((513,), density=0.0),
    Case((513,), density=1.0, kv_heads=1),
    Case((640, 200), rows=True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu(case: Case) -> None:
    t = case.inputs("cpu", torch.float32)
    exact = case.expect(t)
    for name, result in case.run(t).items():
        assert error(result, exact[name]) <= 1e-5 * exact[name].abs().max().item() + 1e-6, name


@CUDA
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda(case: Case, dtype: torch.dtype, dim: int) -> None:
    case = Case(case.lengths, case.density, case.heads, case.kv_heads, dim, case.rows)
    t = case.inputs("cuda", dtype)
    exact, plain = case.expect(t), case.expect(t, dtype)
    for name, result in case.run(t).items():
        largest = exact[name].abs().max().item()
        allowed = 2 * error(plain[name], exact[name]) + torch.finfo(dtype).eps * largest + FP32_ROUNDINGS
        assert error(result, exact[name]) <= allowed, name


def test_lists_that_are_all_empty_and_hold_nothing() -> None:
    """A tensor of no elements has no address; it is a list all the same, not the absence of lists."""
    case = Case((513, 130), density=0.0)
    t = case.inputs("cpu", torch.float32)
    t["tiles"] = torch.empty(0, dtype=torch.int32)
    assert t["tiles"].data_ptr() == 0
    exact = case.expect(t)
    for name, result in case.run(t).items():
        assert error(result, exact[name]) <= 1e-5 * exact[name].abs().max().item() + 1e-6, name


def test_everything_listed_is_the_dense_result() -> None:
    case = Case((513, 130), density=1.0)
    t = case.inputs("cpu", torch.float32)
    dense, lse = oracle.attention(t["q"], t["k"], t["v"], t["cu_seqlens"].tolist(), case.dim**-0.5)
    result = case.run(t)
    assert error(result["out"], dense) < 1e-5 and error(result["lse"], lse) < 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_twice_is_the_same(case: Case) -> None:
    t = case.inputs("cpu", torch.float32)
    offsets, tiles = t["tile_offsets"], t["tiles"]
    there = transpose_tile_lists(offsets, tiles, t["cu_seqlens"])
    back_offsets, back_tiles = transpose_tile_lists(*there, t["cu_seqlens"])
    used = int(offsets[-1])
    assert torch.equal(back_offsets, offsets) and torch.equal(back_tiles[:used], tiles[:used])


def test_opcheck() -> None:
    t = Case((300, 70), dim=16).inputs("cpu", torch.float32)
    q, k, v = (t[name].requires_grad_() for name in "qkv")
    arguments = (q, k, v, t["cu_seqlens"], None, 300, 0.25, t["tile_offsets"], t["tiles"])
    torch.library.opcheck(torch.ops.lemo.attention_forward.default, arguments)
