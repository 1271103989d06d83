"""The differentiable operations: gradients that reach the leaves agree with the oracle's."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from lemo import ops
from support import cases, oracle
from support.attention_cases import Attention
from support.cases import PACKINGS, Draw, Loss, leaf
from support.compare import error


def close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    assert actual.shape == exact.shape
    assert error(actual, exact) <= 1e-5 * exact.abs().max().item() + 1e-6


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("packing", ["documents", "kept_of_both", "more_queries"])
@pytest.mark.parametrize("storage", ["packed", "rows"])
@pytest.mark.parametrize("function", ["attention", "attention_forward"])
def test_attention(packing, storage, function) -> None:
    case = Attention(packing, 4, 2, 80, storage)
    t = case.inputs("cpu", torch.float32)
    q, k, v = leaves(t["q"], t["k"], t["v"])
    keys = case.key_rows(t)
    if function == "attention":
        out = ops.attention(q, k, v, t["cu_seqlens"], case.max_seqlen, rows=t.get("rows"), **keys)
    else:
        lists = (t["cu_seqlens"], t.get("rows"), case.max_seqlen, case.dim**-0.5)
        out = ops.attention_forward(q, k, v, *lists, **keys)[0]
    out.backward(t["dout"])
    exact = case.expect(t)
    for actual, name in ((out, "out"), (q.grad, "dq"), (k.grad, "dk"), (v.grad, "dv")):
        close(actual.detach(), exact[name])


def test_attention_accepts_a_gradient_of_any_strides() -> None:
    case = Attention("documents")
    t = case.inputs("cpu", torch.float32)
    q, k, v = leaves(t["q"], t["k"], t["v"])
    ops.attention(q, k, v, t["cu_seqlens"], case.max_seqlen).sum().backward()  # an expanded scalar
    ones = t | {"dout": torch.ones_like(t["dout"])}
    close(q.grad, case.expect(ones)["dq"])


@pytest.mark.parametrize("packing", ["documents", "chunks"])
def test_attention_with_given_output(packing) -> None:
    case = Attention(packing, given=True)
    t = case.inputs("cpu", torch.float32)
    q, k, v = leaves(t["q"], t["k"], t["v"])
    weights = {n: t[n] for n in ("key_weights", "row_slots", "row_slots_k") if n in t} | case.key_rows(t)
    out = ops.attention(q, k, v, t["cu_seqlens"], case.max_seqlen, out=t["out"], lse=t["lse"], **weights)
    assert torch.equal(out, t["out"])
    out.backward(t["dout"])
    exact = case.expect(t)
    for actual, name in ((q.grad, "dq"), (k.grad, "dk"), (v.grad, "dv")):
        close(actual, exact[name])


WITH_OPTIONS = Attention("chunks", 4, 2, 32, "rows", window=150, softcap=3.0, sinks=True)


@pytest.mark.parametrize("function", ["attention", "attention_forward"])
def test_attention_with_options(function) -> None:
    case = WITH_OPTIONS
    t = case.inputs("cpu", torch.float32)
    q, k, v, sinks = leaves(t["q"], t["k"], t["v"], t["sinks"])
    options = case.key_rows(t) | {"sinks": sinks}
    if function == "attention":
        out = ops.attention(q, k, v, t["cu_seqlens"], case.max_seqlen, rows=t["rows"], **options)
    else:
        where = (t["cu_seqlens"], t["rows"], case.max_seqlen, case.dim**-0.5)
        out = ops.attention_forward(q, k, v, *where, **options)[0]
    out.backward(t["dout"])
    exact = case.expect(t)
    assert exact["dsinks"].abs().min() > 1e-3
    close(out.detach(), exact["out"])
    for actual, name in ((q, "dq"), (k, "dk"), (v, "dv"), (sinks, "dsinks")):
        close(actual.grad, exact[name])


def test_sinks_of_any_precision_are_trained_in_it() -> None:
    case = Attention("documents", sinks=True)
    t = case.inputs("cpu", torch.float32)
    sinks = t["sinks"].bfloat16().requires_grad_()
    out = ops.attention(t["q"], t["k"], t["v"], t["cu_seqlens"], case.max_seqlen, sinks=sinks)
    out.backward(t["dout"])
    exact = case.expect(t | {"sinks": sinks.detach().float()})["dsinks"]
    assert sinks.grad.dtype == torch.bfloat16
    torch.testing.assert_close(sinks.grad.double(), exact, rtol=2**-8, atol=1e-3)


def test_a_sink_of_minus_infinity_is_none() -> None:
    case = Attention("more_queries")  # some see no key
    t = case.inputs("cpu", torch.float32)
    without = case.run(t)
    sinks = torch.full((case.heads,), float("-inf"))
    found = dataclasses.replace(case, sinks=True).run(t | {"sinks": sinks})
    assert not found.pop("dsinks").any()
    assert without.keys() == found.keys() and all(torch.equal(without[n], found[n]) for n in found)


@pytest.mark.parametrize("separate_rows", [False, True])
def test_chunks_of_queries_give_the_whole(separate_rows) -> None:
    """Each chunk of a document's queries over the keys up to its end: the output and dq are the whole's, dk and dv add
    up to it."""
    torch.manual_seed(0)
    n, cuts, dim = 421, (0, 64, 200, 333, 421), 32
    leaf_inputs = [torch.randn(n, h, dim) for h in (4, 2, 2)]
    whole, parts = leaves(*leaf_inputs), leaves(*leaf_inputs)
    dout, dlse = torch.randn(n, 4, dim), torch.randn(4, n)
    cu = torch.tensor([0, n], dtype=torch.int32)
    out, lse = ops.attention_forward(*whole, cu, None, n, 0.2)
    torch.autograd.backward((out, lse), (dout, dlse))
    q, k, v = parts
    outs, lses = [], []
    for a, b in itertools.pairwise(cuts):
        size, end = (torch.tensor([0, length], dtype=torch.int32) for length in (b - a, b))
        if separate_rows:  # the rows of the whole tensors, by number
            rows, rows_k = torch.arange(a, b, dtype=torch.int32), torch.arange(b, dtype=torch.int32)
            o, s = ops.attention_forward(
                q, k, v, size, rows, b - a, 0.2, cu_seqlens_k=end, rows_k=rows_k, max_seqlen_k=b
            )
            assert not o[:a].any() and not o[b:].any()
            o = o[a:b]
        else:
            o, s = ops.attention_forward(q[a:b], k[:b], v[:b], size, None, b - a, 0.2, cu_seqlens_k=end, max_seqlen_k=b)
        outs.append(o)
        lses.append(s)
    close(torch.cat(outs).detach(), out.detach())
    close(torch.cat(lses, 1).detach(), lse.detach())
    torch.autograd.backward((torch.cat(outs), torch.cat(lses, 1)), (dout, dlse))
    for part, all_at_once in zip(parts, whole, strict=True):
        close(part.grad, all_at_once.grad)


def test_equal_keys_of_their_own_change_no_bit() -> None:
    case = Attention("long", 4, 2, 64)
    t = case.inputs("cpu", torch.float32)
    lists = (t["cu_seqlens"], None, case.max_seqlen, 0.125)
    shared = ops.attention_forward(t["q"], t["k"], t["v"], *lists)
    keys = {"cu_seqlens_k": t["cu_seqlens"].clone(), "max_seqlen_k": case.max_seqlen}
    own = ops.attention_forward(t["q"], t["k"], t["v"], *lists, **keys)
    more = (t["cu_seqlens"], None, None, None, case.max_seqlen, 0.125)
    gradients = [
        ops.attention_backward(t["dout"], t["q"], t["k"], t["v"], *shared, *more, **given) for given in ({}, keys)
    ]
    for one, other in zip((*shared, *gradients[0][:3]), (*own, *gradients[1][:3]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("with_rows", [False, True])
def test_norm(norm, with_rows) -> None:
    case = cases.Norm("documents", 72, norm, rows=with_rows, residual=with_rows, bias=True)
    t = case.inputs("cpu", torch.float32)
    names = [n for n in ("x", "residual", "weight", "bias") if n in t]
    own = dict(zip(names, leaves(*(t[n] for n in names)), strict=True))
    y = ops.norm(own["x"], own["weight"], own["bias"], norm, case.eps, rows=t.get("rows"), residual=own.get("residual"))
    y.backward(t["dy"])
    ref = {n: leaf(t[n]) for n in names}
    exact, _ = oracle.gather_norm(
        ref["x"], t.get("rows"), ref.get("residual"), ref["weight"], ref["bias"], norm, case.eps
    )
    exact.backward(t["dy"].double())
    close(y.detach(), exact.detach())
    for n in names:
        close(own[n].grad, ref[n].grad)


def test_norm_passes_the_gradient_of_its_packed_rows() -> None:
    case = cases.Norm("batch", 64)
    t = case.inputs("cpu", torch.float32)
    x, ref = *leaves(t["x"]), leaf(t["x"])
    y, s = ops.gather_norm(x, t["rows"], None, t["weight"], None, "rms", 1e-5)
    (y.sum() + s.square().sum()).backward()
    y, s = oracle.gather_norm(ref, t["rows"], None, t["weight"], None, "rms", 1e-5)
    (y.sum() + s.square().sum()).backward()
    close(x.grad, ref.grad)


def test_gather() -> None:
    case = cases.Rows("documents", 40, weighted=True, padding=3)
    t = case.inputs("cpu", torch.float32)
    x, ref = *leaves(t["x"]), leaf(t["x"])
    ops.gather(x, t["rows"], t["weights"], t["slots"]).backward(t["y"])
    oracle.gather(ref, t["rows"], t["weights"], t["slots"]).backward(t["y"].double())
    close(x.grad, ref.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_loss(reduction) -> None:
    case = Loss(70, 96, 520, bias=True, rank=8, softcap=30.0, reduction=reduction, dweight=True)
    t = case.inputs("cpu", torch.float32)
    names = ("hidden", "weight", "bias", "lora_a", "lora_b")
    own = dict(zip(names, leaves(*(t[n] for n in names)), strict=True))
    options = {"softcap": 30.0, "reduction": reduction, "lora_scale": 0.5}
    loss = ops.linear_cross_entropy_loss(targets=t["targets"], **own, **options)
    assert loss.shape == () and loss.dtype == torch.float32
    (3 * loss).backward()
    exact = case.expect(t)
    close(loss.detach(), exact["loss"])
    for n in names:
        close(own[n].grad, 3 * exact[f"d{n}"])


def test_linear_cross_entropy_loss_of_a_frozen_head_makes_no_weight_gradient() -> None:
    draw = Draw("cpu", torch.float32)
    hidden = draw.normal(10, 8).requires_grad_()
    weight = draw.normal(12, 8)
    loss = ops.linear_cross_entropy_loss(hidden, weight, draw.integers(12, 10))
    assert [saved.shape for saved in loss.grad_fn.saved_tensors if saved is not None] == [hidden.shape]
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass, got a second"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_valid_target_means_zero_gradients(reduction) -> None:
    draw = Draw("cpu", torch.float32)
    shapes = {"hidden": (10, 8), "weight": (12, 8), "lora_a": (4, 8), "lora_b": (12, 4)}
    own = {name: draw.normal(*shape).requires_grad_() for name, shape in shapes.items()}
    loss = ops.linear_cross_entropy_loss(**own, targets=torch.full((10,), -100), reduction=reduction)
    assert loss == 0
    (loss / 0).backward()  # by the number of targets, as the Trainer divides
    assert all(value.grad.count_nonzero() == 0 for value in own.values())
    loss = ops.linear_cross_entropy_loss(**own, targets=torch.arange(10), reduction=reduction)
    (loss / 0).backward()
    assert not any(value.grad.isfinite().all() for value in own.values())


def test_the_loss_can_be_scaled_in_place() -> None:
    draw = Draw("cpu", torch.float32)
    hidden, weight = draw.normal(10, 8).requires_grad_(), draw.normal(12, 8)
    grads = []
    for scale in (1, 3):
        loss = ops.linear_cross_entropy_loss(hidden, weight, torch.arange(10))
        loss *= scale
        grads.append(torch.autograd.grad(loss, hidden)[0])
    torch.testing.assert_close(grads[1], 3 * grads[0])


def test_evaluation_saves_nothing() -> None:
    draw = Draw("cpu", torch.float32)
    loss = ops.linear_cross_entropy_loss(draw.normal(10, 8), draw.normal(12, 8), draw.integers(12, 10))
    assert not loss.requires_grad


@pytest.mark.parametrize("packing", ["keep_all", "documents", "batch"])
def test_keeping_everything_is_dense(packing) -> None:
    """Rows that name every token at its own place give what no rows give, bit by bit."""
    p = PACKINGS[packing]
    rows = torch.arange(p.tokens, dtype=torch.int32)
    x = Draw("cpu", torch.float32).normal(p.tokens, 64)
    with_rows = ops.gather_norm(x, rows, None, None, None, "rms", 1e-5)
    assert torch.equal(with_rows[0], ops.gather_norm(x, None, None, None, None, "rms", 1e-5)[0])
    assert torch.equal(with_rows[1], x) and torch.equal(ops.gather(x, rows), x)
    q = x.view(p.tokens, 2, 32)
    cu = torch.tensor(p.starts, dtype=torch.int32)
    a, b = (ops.attention_forward(q, q, q, cu, r, max(p.lengths), 0.2) for r in (None, rows))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
