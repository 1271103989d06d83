"""Operations on arguments that hypothesis makes up: right ones, against plain torch, and right ones made wrong.

What is wrong for the C interface alone (pointers, struct sizes, overflow) is the matter of tests/fuzz.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lemo import ops
from ops.test_torch import SOME, calls_of, select_everywhere
from torch import Tensor

# Seeded and without a limit on time: the same examples everywhere, however slow the machine is.
QUICK = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(x: Tensor, gap: int) -> Tensor:
    """The same numbers with `gap` others between rows."""
    wider = torch.full((*x.shape[:-1], x.shape[-1] + gap), math.nan)
    wider[..., : x.shape[-1]] = x
    return wider[..., : x.shape[-1]]


lengths = st.lists(st.integers(0, 70), min_size=1, max_size=4)
seeds = st.integers(0, 1 << 20)
gaps = st.integers(0, 3)


def starts_of(documents: list[int]) -> Tensor:
    return torch.tensor([0, *documents]).cumsum(0).to(torch.int32)


@QUICK
@given(lengths, st.integers(1, 2), st.integers(1, 3), st.integers(1, 20), gaps, seeds)
def test_attention(documents: list[int], kv_heads: int, group: int, dim: int, gap: int, seed: int) -> None:
    count = sum(documents)
    q, k, v, dout = (normal(seed + i, count, kv_heads * (group if i in (0, 3) else 1), dim) for i in range(4))
    leaves = [wide(x, gap).requires_grad_() for x in (q, k, v)]
    longest = max(documents)
    out, _ = ops.attention_forward(*leaves, starts_of(documents), None, longest, dim**-0.5)
    grads = torch.autograd.grad(out, leaves, dout)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    pieces = [x.split(documents) for x in exact]
    expected = torch.cat([causal(*piece, dim**-0.5) for piece in zip(*pieces, strict=True)])
    for result, wanted in zip(
        (out, *grads), (expected, *torch.autograd.grad(expected, exact, dout.double())), strict=True
    ):
        torch.testing.assert_close(result, wanted.float(), rtol=1e-4, atol=1e-4)


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    s = s.masked_fill(~torch.ones(s.shape[1:], dtype=torch.bool).tril(), -math.inf)
    return torch.einsum("hij,jhd->ihd", torch.softmax(s, -1), v)


@QUICK
@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 60), st.integers(0, 3), st.booleans(), gaps, seeds)
def test_loss(tokens: int, d: int, classes: int, rank: int, capped: bool, gap: int, seed: int) -> None:
    hidden, weight, bias = normal(seed, tokens, d), normal(seed + 1, classes, d), normal(seed + 2, classes)
    lora = [normal(seed + 3, rank, d), normal(seed + 4, classes, rank)]
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(-1, classes, (tokens,), generator=generator)
    softcap = 2.0 if capped else 0.0
    leaves = [wide(x, gap).requires_grad_() for x in (hidden, weight)]
    arguments = {"bias": bias, "lora_a": lora[0], "lora_b": lora[1], "lora_scale": 0.5}
    loss = ops.linear_cross_entropy_loss(
        *leaves, targets, **arguments, softcap=softcap, reduction="sum", ignore_index=-1
    )
    z = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = z[0] @ z[1].T + 0.5 * z[0] @ lora[0].double().T @ lora[1].double().T + bias.double()
    logits = softcap * torch.tanh(logits / softcap) if capped else logits
    expected = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(loss, expected.float(), rtol=1e-4, atol=1e-4)
    for result, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, z), strict=True):
        torch.testing.assert_close(result, wanted.float(), rtol=1e-3, atol=1e-3)


@QUICK
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 4), st.sampled_from(["rms", "layer"]), gaps, seeds)
def test_rows(tokens: int, d: int, padding: int, kind: str, gap: int, seed: int) -> None:
    x, weight = normal(seed, tokens, d), normal(seed + 1, d)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(tokens, generator=generator)[: tokens // 2 + 1].sort().values
    rows = torch.cat((kept, kept.new_full((padding,), -1))).to(torch.int32)
    packed = torch.cat((x[kept], x.new_zeros(padding, d)))
    assert torch.equal(ops.gather(wide(x, gap), rows), packed)
    y, _ = ops.gather_norm(wide(x, gap), rows, None, weight, None, kind, 1e-5)
    s = packed.double()
    s = s - s.mean(1, keepdim=True) if kind == "layer" else s
    expected = s / (s.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-4)
    sums = ops.scatter_add_(x.clone(), rows, packed)
    assert torch.equal(sums, x.index_add(0, kept, x[kept]))


def bits(t: Tensor) -> bytes:
    """For comparing where NaN equals itself."""
    return t.detach().numpy().tobytes()


@functools.cache
def valid_calls() -> list[tuple[Any, tuple]]:
    """Every operation with arguments that are right."""
    found = [call for case in SOME for call in calls_of(lambda case=case: case.run(case.inputs("cpu", torch.float32)))]
    return found + calls_of(select_everywhere)


def filled(like: Tensor, value: int) -> Tensor:
    """With the value, or what is nearest to it in bytes."""
    return like.new_full(like.shape, min(max(value, 0), 255) if like.dtype == torch.uint8 else value)


def spoil(data: st.DataObject, value: Any) -> Any:
    """An argument that is most often wrong."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return data.draw(st.sampled_from([0, 1, -1, 1 << 20, -(1 << 31), type(value)(value + 1)]))
    changes = {
        "empty": lambda t: t[:0],
        "shorter": lambda t: t[:-1],
        "every other": lambda t: t[::2],
        "flat": lambda t: t.flatten(),
        "deeper": lambda t: t.unsqueeze(0),
        "transposed": lambda t: t.transpose(0, -1),
        "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
        "double": lambda t: t.double(),
        "half": lambda t: t.half(),
        "long": lambda t: t.long(),
        "scalar": lambda t: t.new_tensor(1),
        "one more": lambda t: t + 1,
        "one less": lambda t: t - 1,
        "reversed": lambda t: t.flip(0) if t.dim() else t,
        "huge": lambda t: filled(t, (1 << 31) - 1),
        "negative": lambda t: filled(t, -(1 << 31)),
    }
    return changes[data.draw(st.sampled_from(sorted(changes)))](value)


@pytest.mark.parametrize("number", range(len(valid_calls())))
@settings(QUICK, max_examples=25)
@given(data=st.data())
def test_wrong_arguments(number: int, data: st.DataObject) -> None:
    """Refused with a message, or accepted; the arguments are as before, but for what the operation writes in place."""
    operation, arguments = valid_calls()[number]
    place = data.draw(st.sampled_from([i for i, a in enumerate(arguments) if isinstance(a, Tensor | int | float)]))
    changed = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    changed[place] = spoil(data, changed[place])
    before = [a.clone() if isinstance(a, Tensor) else a for a in changed]
    written = {i for i, a in enumerate(operation._schema.arguments) if a.alias_info is not None}
    try:
        operation(*changed)
    except (ValueError, NotImplementedError, FloatingPointError) as error:
        assert "expect" in str(error), error
        written = set()
    except RuntimeError as error:
        # torch's own, about what cannot be allocated or is not a size.
        assert "lemo" not in str(error) or "out of host memory" in str(error), error
        written = set()
    for i, (now, then) in enumerate(zip(changed, before, strict=True)):
        if isinstance(now, Tensor) and i not in written:
            assert bits(now) == bits(then), operation._schema.arguments[i].name
