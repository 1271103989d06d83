"""How results are judged against the oracle."""

from __future__ import annotations

import math

import torch
from support import oracle
from torch import Tensor

FP32_ROUNDINGS = 16 * torch.finfo(torch.float32).eps


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; NaN anywhere is infinite. Infinities equal themselves."""
    a, b = actual.double(), exact.double()
    difference = (a - b).abs().masked_fill(a == b, 0.0)
    return float("inf") if difference.isnan().any() else difference.max().item() if difference.numel() else 0.0


def largest_of(exact: Tensor) -> float:
    """The largest finite absolute value: the LSE of a query that sees nothing is -infinity."""
    finite = exact[exact.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def bits(t: Tensor) -> Tensor:
    """For comparing where NaN equals itself."""
    return t.contiguous().view(torch.uint8) if t.dim() else t


def check_single(case, device: str = "cpu") -> None:
    """fp32 kernels: the error is a few roundings of the largest value, or twice that of plain torch in fp32 where the
    case makes numbers that large exponents lose."""
    tensors = case.inputs(device, torch.float32)
    before = {name: t.clone() for name, t in tensors.items()}
    actual, exact = case.run(tensors), case.expect(tensors)
    plain = exact
    if getattr(case, "magnitude", 1.0) != 1.0:
        with oracle.precision(torch.float32):
            plain = case.expect(tensors)
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        assert result.shape == exact[name].shape, name
        largest = largest_of(exact[name])
        allowed = 2 * error(plain[name], exact[name]) + 1e-5 * largest + 1e-6
        assert error(result, exact[name]) <= allowed, name
    for name, t in tensors.items():
        assert torch.equal(bits(t), bits(before[name])), f"the input {name} was changed"


def check_half(case, dtype: torch.dtype, device: str = "cuda") -> None:
    """fp16 and bf16 kernels: at most twice the error of plain torch in that dtype, plus one rounding of the largest.

    Where the exact result is zero because two fp32 sums cancel, as for the query of a document of one token, neither
    of these leaves room for the order of those sums: a few fp32 roundings of numbers near 1 do.
    """
    tensors = case.inputs(device, dtype)
    actual, exact = case.run(tensors), case.expect(tensors)
    with oracle.precision(dtype):
        plain = case.expect(tensors)
    assert actual.keys() == exact.keys()
    for name, result in actual.items():
        assert result.shape == exact[name].shape, name
        largest = largest_of(exact[name])
        yardstick = error(plain[name], exact[name])
        assert math.isfinite(yardstick), f"{name}: plain torch overflows, so that this case would prove nothing"
        allowed = 2 * yardstick + torch.finfo(dtype).eps * largest + FP32_ROUNDINGS
        assert error(result, exact[name]) <= allowed, f"{name}: {error(result, exact[name]):.3g} > {allowed:.3g}"
