"""Schemas, fake kernels and compilation: what torch expects of a custom operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lemo import ops
from lemo.engine.layout import Blocks, Kept
from support import attention_cases, cases
from support.cases import PACKINGS, name_of
from support.elementwise_cases import ReLU, Rotary, SwiGLU
from support.tile_cases import SelectTiles, TileScores
from torch.utils._python_dispatch import TorchDispatchMode

SOME = [
    cases.Rows("documents", 24, weighted=True, base=True, padding=2),
    cases.Rows("keep_none", 24),
    cases.Norm("documents", 24, "layer", residual=True, bias=True, extra=True),
    cases.Norm("ragged", 24, rows=False),
    Rotary(9, 3, 16, "fused", named=True),
    SwiGLU(5, 24, "fused"),
    ReLU(5, 24, "fused"),
    attention_cases.Attention("documents", 4, 2, 16, "strided"),
    attention_cases.Attention("documents", 2, 1, 16, "rows", given=True),
    attention_cases.Attention("more_queries", 2, 1, 16),
    attention_cases.Attention("chunks", 2, 1, 16, "rows", given=True),
    attention_cases.Attention("chunks", 2, 1, 16, "rows", window=70, softcap=3.0, sinks=True),
    cases.Scores("documents", 4, 2, 16),
    cases.Predict("documents", 24),
    cases.Loss(20, 16, 40, bias=True, rank=4, dweight=True, segment=8),
    cases.Loss(20, 16, 40, softcap=4.0),
    TileScores("documents", 4, 2, 16, storage="strided"),
    TileScores("kept", 2, 1, 16, storage="rows"),
    SelectTiles((300, 0, 700), 512, 0.9, 0.8, 1, 1, strip=4),
]


class Calls(TorchDispatchMode):
    """Collects the calls of lemo operations with copies of their arguments, views kept as views."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lemo":
            self.found.append((func, tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))


def calls_of(run) -> list[tuple]:
    with Calls() as calls:
        run()
    assert calls.found
    return calls.found


def select_everywhere() -> None:
    b = PACKINGS["documents"].blocks("cpu")
    scores = torch.rand(b.num_blocks, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    for mode in ("threshold", "budget", "sample", "poisson"):
        ops.select_blocks(scores, b.offsets, b.documents, b.block_size, b.num_tokens, mode, 0.5, 0.3, 1, 0, 7)


def test_every_operation_is_in_the_table() -> None:
    found = [calls_of(lambda case=case: case.run(case.inputs("cpu", torch.float32))) for case in SOME]
    names = {
        func._schema.name.removeprefix("lemo::") for calls in [*found, calls_of(select_everywhere)] for func, _ in calls
    }
    registered = {n.removeprefix("lemo::") for n in torch._C._dispatch_get_all_op_names() if n.startswith("lemo::")}
    assert names == {n.split(".")[0] for n in registered}


@pytest.mark.parametrize("case", SOME, ids=name_of)
def test_opcheck(case) -> None:
    tensors = case.inputs("cpu", torch.float32)
    for func, args in calls_of(lambda: case.run(tensors)):
        torch.library.opcheck(func, args)


def test_opcheck_select() -> None:
    for func, args in calls_of(select_everywhere):
        torch.library.opcheck(func, args)


@pytest.mark.parametrize("op", ["gather", "gather_norm", "swiglu", "attention_forward"])
def test_opcheck_with_gradients(op) -> None:
    table: dict[str, Any] = {"gather": SOME[0], "gather_norm": SOME[2], "swiglu": SwiGLU(5, 24)}
    case = (table | {"attention_forward": attention_cases.Attention("documents", 2, 1, 16, sinks=True, window=20)})[op]
    for func, args in calls_of(lambda: case.run(case.inputs("cpu", torch.float32))):
        if func._schema.name == f"lemo::{op}":
            floats = [isinstance(a, torch.Tensor) and a.is_floating_point() and len(a) > 1 for a in args]
            assert sum(floats) >= 2 - (op == "gather")
            args = [a.requires_grad_() if float_ else a for a, float_ in zip(args, floats, strict=True)]
            torch.library.opcheck(func, tuple(args))


def test_opcheck_rotary_with_a_gradient() -> None:
    for func, (x, *tables) in calls_of(lambda: (case := Rotary(9, 3, 16)).run(case.inputs("cpu", torch.float32))):
        torch.library.opcheck(func, (x.requires_grad_(), *tables))


def layer(x: torch.Tensor, w: torch.Tensor, kept: Kept, targets: torch.Tensor) -> torch.Tensor:
    """One small layer and a loss from every differentiable operation."""
    h = ops.norm(x, w[0], None, "rms", 1e-5, rows=kept.rows)
    q, k, v = ((h @ (w + i)).view(-1, 2, 8) for i in range(3))
    angle = torch.arange(x.shape[0])[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)
    q, k = (ops.rotary(t, angle.cos(), angle.sin(), kept.rows) for t in (q, k))
    out = ops.attention(q, k, v, kept.cu_seqlens, kept.max_seqlen)
    y = ops.gather(x, kept.rows, kept.weights, kept.row_slots) + ops.swiglu(out.flatten(1), h @ w)
    return ops.linear_cross_entropy_loss(y, w, targets)


def layer_inputs() -> tuple:
    generator = torch.Generator().manual_seed(0)
    blocks = Blocks.from_lengths([20, 9], 8)
    x, w = torch.randn(29, 16, generator=generator), torch.randn(16, 16, generator=generator) / 4
    return x, w, Kept.everything(blocks), torch.randint(16, (29,), generator=generator)


def test_compile_a_layer_and_its_gradient() -> None:
    x, w, kept, targets = layer_inputs()
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        loss = function(*leaves, kept, targets)
        loss.backward()
        results.append([loss.detach(), *(t.grad for t in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def step(x: torch.Tensor, weights: list[torch.Tensor], blocks: Blocks) -> tuple[torch.Tensor, ...]:
    """Scores, selection and the in-place operations, sizes by capacity: no data-dependent shape."""
    layout = (blocks.offsets, blocks.documents, blocks.block_size)
    predicted, _, _ = ops.predict(x, *weights, *layout)
    q = x.view(-1, 2, 8)
    exact, _ = ops.block_scores(q, q, *layout, 0.3)
    rule = ("budget", 0.5, 0.0, 1, 0, 0)
    _, _, _, _, rows, _, _, info = ops.select_blocks(predicted + exact, *layout, blocks.num_tokens, *rule)
    y, s = ops.gather_norm(x, rows, None, None, None, "rms", 1e-5)
    x = ops.scatter_add_(x.clone(), rows, y)
    dx = torch.zeros_like(x)
    ops.gather_norm_backward_(dx, rows, y, s, None, None, "rms", 1e-5)
    return x, dx, info


def test_compile_selection_and_in_place_operations() -> None:
    x, w, kept, _ = layer_inputs()
    weights = [w[:8], w[:8, :8].contiguous(), w[8:, :8].contiguous()] * 2
    expected = step(x, weights, kept.source)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for result, exact in zip(compiled(x, weights, kept.source), expected, strict=True):
        torch.testing.assert_close(result, exact)


def test_compile_to_native_code() -> None:
    """Inductor keeps the strides that the kernels were promised."""

    def run(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return ops.gather(x.transpose(0, 1).contiguous() * 2, rows)

    x, rows = torch.randn(8, 12), torch.arange(0, 12, 2, dtype=torch.int32)
    torch.testing.assert_close(torch.compile(run, fullgraph=True)(x, rows), run(x, rows))


def test_compile_with_changing_sizes() -> None:
    def run(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return ops.gather(x, rows) * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, kept in ((12, 5), (30, 7), (31, 31)):
        x, rows = torch.randn(tokens, 8), torch.arange(kept, dtype=torch.int32)
        assert torch.equal(compiled(x, rows), run(x, rows))


# --- calls that go past the dispatcher, and those that must not ------------------------------------------------------


def test_a_profiler_and_a_mode_see_the_operators() -> None:
    x, rows = torch.randn(5, 8), torch.arange(3, dtype=torch.int32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.gather(x, rows)
        ops.swiglu(x.requires_grad_(), x).sum().backward()
    seen = {event.key for event in profile.key_averages()}
    assert seen >= {"lemo::gather", "lemo::swiglu", "lemo::swiglu_backward"}
    assert [func._schema.name for func, _ in calls_of(lambda: ops.gather(x, rows))] == ["lemo::gather"]


def test_what_the_dispatcher_refuses_or_converts() -> None:
    x, rows = torch.randn(5, 8), torch.arange(3, dtype=torch.int32)
    same = ops.gather_norm(x, rows, None, None, None, "rms", 1.0)
    converted = ops.gather_norm(x, rows, None, None, None, "rms", 1)
    torch.testing.assert_close(converted, same, rtol=0, atol=0)
    named = ops.gather_norm_backward(dy=x, s=x, weight=None, ds_extra=None, norm="rms", eps=1.0)
    torch.testing.assert_close(named, ops.gather_norm_backward(x, x, None, None, "rms", 1.0), rtol=0, atol=0)
    with pytest.raises((RuntimeError, TypeError), match="ds_extra"):  # optional, but without a default
        ops.gather_norm_backward(dy=x, s=x, weight=None, norm="rms", eps=1.0)
    with pytest.raises((RuntimeError, TypeError), match="wieghts"):
        ops.gather(x, rows, wieghts=None)


def test_a_torch_without_a_private_function_leaves_every_call_to_the_dispatcher() -> None:
    from types import SimpleNamespace

    from lemo.ops._autograd import watchers

    assert [watches() for watches in watchers(SimpleNamespace(a=lambda: 0), ["a"])] == [0]
    assert all(watches() for watches in watchers(SimpleNamespace(a=lambda: 0), ["a", "b.c"]))
