"""Cases of rotary positions, SwiGLU and ReLU, a part of the table in cases.py."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lemo import ops
from support import oracle
from support.draws import Draw, grads, leaf
from torch import Tensor


@dataclass(frozen=True)
class Rotary:
    """Forward, and back as the gradient goes.

    storage: "packed" rows, "fused" (heads among others of one projection) or "heads" (one head after another). named:
    rows of the tables by number, some twice, some padding (whose rows of x hold NaN); else T = M.
    """

    m: int
    heads: int
    dim: int
    storage: str = "packed"
    named: bool = False
    tables: str = "same"  # "same" (dtype of x) | "float32"

    def inputs(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        draw, positions = Draw(device, dtype, 10), 2 * self.m + 3 if self.named else self.m
        if self.storage == "heads":
            x = draw.normal(self.heads, self.m, self.dim).transpose(0, 1)
        else:
            more = 3 if self.storage == "fused" else 0
            x = draw.normal(self.m, self.heads + more, self.dim)[:, : self.heads]
        angle = draw.uniform(positions, self.dim // 2, high=7.0).repeat(1, 2)
        small = torch.float32 if self.tables == "float32" else dtype
        tensors = {"x": x, "cos": angle.cos().to(small), "sin": angle.sin().to(small)}
        if self.named:
            rows = draw.integers(positions, self.m).int()
            rows[2::5] = -1
            x[rows < 0] = float("nan")
            tensors["rows"] = rows
        return tensors

    def run(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        tables = (t["cos"], t["sin"], t.get("rows"))
        return {"out": ops.rotary(t["x"], *tables), "back": ops.rotary(t["x"], *tables, inverse=True)}

    def expect(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        tables = (t["cos"], t["sin"], t.get("rows"))
        x = leaf(t["x"].nan_to_num())
        out = oracle.rotary(x, *tables)
        (back,) = grads([out], [t["x"].nan_to_num()], x)
        return {"out": out.detach(), "back": back}


@dataclass(frozen=True)
class SwiGLU:
    """storage: "packed" rows, or "fused": gate and up are halves of one projection."""

    m: int
    f: int
    storage: str = "packed"
    scale: float = 2.0

    def inputs(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        draw = Draw(device, dtype, 11)
        both = draw.normal(self.m, 2 * self.f, scale=self.scale)
        gate, up = both.split(self.f, dim=1)
        if self.storage == "packed":
            gate, up = gate.contiguous(), up.contiguous()
        return {"gate": gate, "up": up, "dout": draw.normal(self.m, self.f)}

    def run(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        dgate, dup = ops.swiglu_backward(t["dout"], t["gate"], t["up"])
        gate, up = (
            torch.cat((t["gate"], t["up"]), 1).chunk(2, 1)
            if self.storage == "fused"
            else (t["gate"].clone(), t["up"].clone())
        )
        in_place = dict(zip(("dgate_", "dup_"), ops.swiglu_backward_(t["dout"], gate, up), strict=True))
        return {"out": ops.swiglu(t["gate"], t["up"]), "dgate": dgate, "dup": dup, **in_place}

    def expect(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        gate, up = leaf(t["gate"]), leaf(t["up"])
        out = oracle.swiglu(gate, up)
        dgate, dup = grads([out], [t["dout"]], gate, up)
        return {"out": out.detach(), "dgate": dgate, "dup": dup, "dgate_": dgate, "dup_": dup}


@dataclass(frozen=True)
class ReLU:
    """passes: the bits, as numbers. storage: "packed" rows, or "fused": columns among others."""

    m: int
    f: int
    storage: str = "packed"

    def inputs(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        draw, more = Draw(device, dtype, 12), 8 if self.storage == "fused" else 0
        x, dout = (draw.normal(self.m, self.f + more)[:, : self.f] for _ in range(2))
        x[:, 1::7] = 0.0
        return {"x": x, "dout": dout}

    def run(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        out, dx = map(spread, (t["x"], t["dout"]))
        bits = ops.relu_(out)
        assert ops.relu_backward_(dx, bits) is dx
        powers = 2 ** torch.arange(8, device=bits.device)
        unpacked = (bits[..., None].int() & powers != 0).flatten(1)
        assert not unpacked[:, self.f :].any()
        return {"out": out, "dx": dx, "passes": unpacked[:, : self.f].to(out.dtype)}

    def expect(self, t: dict[str, Tensor]) -> dict[str, Tensor]:
        x = leaf(t["x"])
        out = x.clamp(min=0.0)
        passes = (t["x"] > 0).double()
        return {"out": out.detach(), "dx": t["dout"].double() * passes, "passes": passes}


def spread(x: Tensor) -> Tensor:
    """A copy with the same strides."""
    whole = x.new_zeros(max(1, x.shape[0]), max(1, x.stride(0)))
    y = whole[: x.shape[0], : x.shape[1]]
    return y.copy_(x)


ROTARY = [
    *(Rotary(37, heads, 64, s, named=s != "packed") for heads in (1, 3, 8) for s in ("packed", "fused", "heads")),
    *(Rotary(50, 5, dim, "fused", tables=t) for dim in (16, 80, 96, 128, 256) for t in ("same", "float32")),
    *(Rotary(20, 4, dim, named=True, tables=t) for dim in (8, 24, 72) for t in ("same", "float32")),  # no vectors
    Rotary(1, 32, 128),
    Rotary(0, 2, 64, named=True),
    Rotary(3, 0, 64),
]
SWIGLU = [
    *(SwiGLU(m, f, s) for m, f in ((33, 8), (5, 264), (3, 1024), (2, 4104)) for s in ("packed", "fused")),
    SwiGLU(1, 64),
    SwiGLU(0, 64),
    SwiGLU(40, 256, scale=30.0),  # exponentials of all sizes
]
RELU = [
    *(ReLU(m, f, s) for m, f in ((33, 8), (5, 264), (3, 1024), (2, 4104)) for s in ("packed", "fused")),
    ReLU(1, 64),
    ReLU(0, 64),
]
