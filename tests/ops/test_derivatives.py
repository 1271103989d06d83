"""What operations say to autograd: gradients that are right or refused, changes in place that are seen."""

from __future__ import annotations

import pytest
import torch
from lemo import ops
from lemo.engine.elementwise import ReLU, SwiGLU
from lemo.engine.layout import Blocks
from support import oracle
from support.attention_cases import Attention
from support.cases import Draw
from support.compare import error
from torch.autograd import gradcheck, gradgradcheck

ROWS = torch.tensor([1, 4, -1, 7], dtype=torch.int32)  # -1 is padding


@pytest.fixture
def draw() -> Draw:
    return Draw("cpu", torch.float32)


def linear_in_all(function, inputs) -> None:
    """First and second derivatives of a function that is linear in every input: any step is exact, in fp32 too."""
    for check in (gradcheck, gradgradcheck):
        assert check(function, inputs, eps=0.5, atol=1e-4, rtol=1e-4)


# --- right any number of times ---


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")  # gradcheck prefers fp64, which the kernels do not have
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("public", [True, False])
def test_scatter_add(draw, with_base, public) -> None:
    def run(x, y, *base):
        x = x * 1.0  # its own tensor, which may be changed
        if public:
            return ops.scatter_add_(x, ROWS, y, *base)
        assert torch.ops.lemo.scatter_add_(x, ROWS, y, *base) is None
        return x

    inputs = [draw.normal(9, 3).requires_grad_(), *(draw.normal(4, 3).requires_grad_() for _ in range(1 + with_base))]
    linear_in_all(run, inputs)
    for one in range(len(inputs)):  # the others are constants
        own = [t.detach().requires_grad_(i == one) for i, t in enumerate(inputs)]
        out = run(*own)
        weights = torch.arange(27.0).view(9, 3)
        (got,) = torch.autograd.grad((out * weights).sum(), own[one])
        taken = torch.where(ROWS[:, None] >= 0, weights[ROWS.long()], 0)
        kept = weights.index_fill(0, ROWS[ROWS >= 0].long(), 0) if with_base else weights
        assert torch.equal(got, kept if one == 0 else taken)


def test_scatter_add_into_a_leaf_is_refused(draw) -> None:
    leaf = draw.normal(9, 3).requires_grad_()
    with pytest.raises(RuntimeError, match="leaf"):
        ops.scatter_add_(leaf, ROWS, draw.normal(4, 3))
    with torch.no_grad():
        assert ops.scatter_add_(leaf, ROWS, draw.normal(4, 3)) is leaf


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
def test_gather(draw) -> None:
    slots = torch.tensor([1, 0, -1, 1], dtype=torch.int32)
    inputs = (draw.normal(9, 3).requires_grad_(), draw.normal(2).requires_grad_())
    linear_in_all(lambda x, w: ops.gather(x, ROWS, w, slots), inputs)
    linear_in_all(lambda x: ops.gather(x, ROWS), inputs[:1])


@pytest.mark.filterwarnings("ignore:Input #:UserWarning")
@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0], dtype=torch.int32)])
def test_rope(draw, rows) -> None:
    angle = draw.normal(4, 3).repeat(1, 2)
    x = draw.normal(4 if rows is None else 2, 2, 6).requires_grad_()
    linear_in_all(lambda x: ops.rotary(x, angle.cos(), angle.sin(), rows), (x,))


def test_rotary_tables_have_no_derivative(draw) -> None:
    x, angle = draw.normal(4, 2, 6), draw.normal(4, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="no derivative in cos and sin"):
        ops.rotary(x, angle.cos(), angle.detach().sin()).sum().backward()


@pytest.mark.parametrize("storage", ["packed", "rows"])
@pytest.mark.parametrize("with_output", [False, True])
def test_the_gradient_of_lse(storage, with_output) -> None:
    case = Attention("documents", 4, 2, 80, storage)
    t = case.inputs("cpu", torch.float32)
    q, k, v = (t[n].clone().requires_grad_() for n in "qkv")
    out, lse = ops.attention_forward(q, k, v, t["cu_seqlens"], t.get("rows"), case.max_seqlen, case.dim**-0.5)
    dlse = Draw("cpu", torch.float32).normal(*lse.shape)
    rows = t["rows"].long() if "rows" in t else torch.arange(lse.shape[1])
    exact = [t[n].double().requires_grad_() for n in "qkv"]
    outs, lses = [], []
    for a, b in zip(t["cu_seqlens"][:-1].tolist(), t["cu_seqlens"][1:].tolist(), strict=True):
        own = rows[a:b]
        x, y, z = (e[own].transpose(0, 1) for e in exact)
        scores = (x @ y.repeat_interleave(2, 0).transpose(1, 2)) * case.dim**-0.5
        scores = scores.masked_fill(torch.ones(b - a, b - a).triu(1).bool(), float("-inf"))
        lses.append(scores.logsumexp(-1))
        outs.append((scores.softmax(-1) @ z.repeat_interleave(2, 0)).transpose(0, 1))
    loss, expected = (lse * dlse).sum(), (torch.cat(lses, 1) * dlse.double()).sum()
    if with_output:
        loss, expected = loss + out.square().sum(), expected + torch.cat(outs).square().sum()
    loss.backward()
    expected.backward()
    for got, want in zip((q, k, v), exact, strict=True):
        if want.grad is None:
            assert got.grad is None
        else:
            assert error(got.grad, want.grad) <= 1e-4 * want.grad.abs().max()


def test_the_gradient_of_lse_with_options() -> None:
    case = Attention("chunks", 4, 2, 32, "rows", window=150, softcap=3.0, sinks=True)
    t = case.inputs("cpu", torch.float32)
    names = ("q", "k", "v", "sinks")
    own = {n: t[n].clone().requires_grad_() for n in names}
    where = (t["cu_seqlens"], t["rows"], case.max_seqlen, case.dim**-0.5)
    out, lse = ops.attention_forward(own["q"], own["k"], own["v"], *where, **case.key_rows(t | own))
    dlse = Draw("cpu", torch.float32).normal(*lse.shape)
    exact = {n: t[n].double().requires_grad_() for n in names}
    packed = [exact[n][t["rows" if n == "q" else "rows_k"].long()] for n in "qkv"]
    ends = (t["cu_seqlens"].tolist(), case.dim**-0.5, None, t["cu_seqlens_k"].tolist())
    expected = oracle.attention(*packed, *ends, case.options(t | exact))
    ((lse * dlse).sum() + out.square().sum()).backward()
    ((expected[1] * dlse.double()).sum() + expected[0].square().sum()).backward()
    for n in names:
        assert error(own[n].grad, exact[n].grad) <= 1e-4 * exact[n].grad.abs().max()


# --- no second derivative: an error, and only where it is needed ---


def second_orders(draw: Draw) -> dict:
    x, w, targets = draw.normal(6, 16), draw.normal(16), draw.integers(11, 6)
    q, cu = draw.normal(12, 2, 8), torch.tensor([0, 12], dtype=torch.int32)
    rows = torch.tensor([2, 0, 5], dtype=torch.int32)
    gate, up = draw.normal(3, 4), draw.normal(3, 4)

    def norm_backward_in_place(dy, s):
        dx = torch.zeros(6, 16)
        ops.gather_norm_backward_(dx, None, dy, s, None, None, "rms", 1e-6)
        return dx

    return {
        "norm": (lambda x, w: ops.norm(x, w), (x, w)),
        "norm of rows": (lambda x: ops.norm(x, None, None, "layer", rows=rows), (x,)),
        "attention": (lambda q, k, v: ops.attention(q, k, v, cu, 12), (q, q + 1, q - 1)),
        "attention_forward": (lambda q: ops.attention_forward(q, q, q, cu, None, 12, 0.3)[0], (q,)),
        "lse": (lambda q: ops.attention_forward(q, q + 1, q, cu, None, 12, 0.3)[1], (q,)),
        "loss": (lambda h, w: ops.linear_cross_entropy_loss(h, w, targets), (x, draw.normal(11, 16))),
        "SwiGLU": (ops.swiglu, (gate, up)),
        "UnreadSwiGLU": (lambda gate, up: SwiGLU.apply(gate, up, False, False) * 1.0, (gate, up)),
        "ReLU": (lambda x: ReLU.apply(x * 1.0, True).square(), (gate,)),
        "ReLU in bits": (lambda x: ReLU.apply(x * 1.0, False).square(), (gate,)),
        "attention_backward": (
            lambda dout, q: ops.attention_backward(dout, q, q, q, q, torch.ones(2, 12), cu, None, None, None, 12, 0.3)[
                0
            ],
            (q, q + 1),
        ),
        "swiglu_backward": (lambda dout, gate: ops.swiglu_backward(dout, gate, up)[0], (gate, up)),
        "norm_backward": (lambda dy, s: ops.gather_norm_backward(dy, s, None, None, "rms", 1e-6)[0], (x, x + 1)),
        "norm_backward_": (norm_backward_in_place, (x, x + 1)),
    }


NAMES = list(second_orders(Draw("cpu", torch.float32)))
BACKWARD = [n for n in NAMES if "backward" in n]  # whose first derivative is a second one
MESSAGE = "has no second derivative.*create_graph"


@pytest.mark.parametrize("name", [n for n in NAMES if n not in BACKWARD])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("one", [0, -1])
def test_second_derivatives_are_refused(draw, name, constant, one) -> None:
    """Also where the incoming gradient is a constant, the loss has other terms, and None would be accepted."""
    function, inputs = second_orders(draw)[name]
    own = [t.clone().requires_grad_() for t in inputs]
    y = function(*own)
    y = y.sum() if constant else y.pow(3).sum()
    grads = torch.autograd.grad(y, own, create_graph=True)
    plain = torch.autograd.grad(y.detach() + function(*own).sum(), own)
    assert all(g.isfinite().all() for g in (*grads, *plain))  # first derivatives are still there
    penalty = own[one].square().sum() + sum(g.square().sum() for g in grads)
    with pytest.raises(RuntimeError, match=MESSAGE):
        torch.autograd.grad(penalty, own[one], allow_unused=True)


@pytest.mark.parametrize("name", BACKWARD)
def test_gradients_of_backward_operations_are_refused(draw, name) -> None:
    function, inputs = second_orders(draw)[name]
    expected = function(*inputs)
    for one in range(len(inputs)):
        own = [t.clone().requires_grad_(i == one) for i, t in enumerate(inputs)]
        y = function(*own)
        assert torch.equal(y, expected)
        with pytest.raises(RuntimeError, match=MESSAGE):
            (y.sum() + own[one].sum()).backward()


def test_a_graph_of_first_derivatives_is_no_error(draw) -> None:
    """create_graph alone, the gradient used as a number or another function's input."""
    x, w = draw.normal(6, 16).requires_grad_(), draw.normal(16).requires_grad_()
    results = []
    for create in (False, True):
        (g,) = torch.autograd.grad(ops.norm(x, w).square().sum(), x, create_graph=create)
        assert g.requires_grad == create
        scale = torch.ones((), requires_grad=True)
        (g.detach() * scale).sum().backward()
        results.append((g.detach(), scale.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- outputs without a gradient ---


def test_outputs_without_a_gradient_claim_none(draw) -> None:
    blocks = Blocks.from_lengths([20, 9], 8)
    layout = (blocks.offsets, blocks.documents, blocks.block_size)
    x, w = draw.normal(29, 16).requires_grad_(), draw.normal(16, 16).requires_grad_()
    q = x.view(-1, 2, 8)
    small = [w[:8], w[:8, :8].contiguous(), w[8:, :8].contiguous()] * 2
    probabilities = torch.full((blocks.num_blocks,), 0.5, requires_grad=True)
    select = ops.select_blocks(probabilities, *layout, 29, "sample", 0.5, 0.0, 1, 0, 0)
    targets = torch.randint(16, (29,))
    outputs = [
        *ops.block_scores(q, q, *layout, 0.3, False, True),
        *ops.predict(x, *small, *layout),
        *select,
        *ops.linear_cross_entropy(x, w, None, None, None, 1.0, targets, want_dweight=True),
        torch.ops.lemo.gather_norm(x, None, None, w[0], None, "rms", 1e-6, False)[1],
    ]
    assert [t.requires_grad for t in outputs if t is not None] == [False] * len([t for t in outputs if t is not None])


# --- changes in place ---


def changes(draw: Draw) -> dict:
    def scatter(x):
        ops.scatter_add_(x, ROWS, torch.ones(4, 3))

    def norm(x):
        ops.gather_norm_backward_(x, ROWS, draw.normal(4, 3), draw.normal(4, 3), None, None, "rms", 1e-6)

    return {"scatter_add_": scatter, "gather_norm_backward_": norm}


@pytest.mark.parametrize("name", ["scatter_add_", "gather_norm_backward_"])
@pytest.mark.parametrize("alias", ["detach", "view", "itself"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_saved_tensor_that_was_changed_is_noticed(draw, name, alias, gradients) -> None:
    a = draw.normal(9, 3).requires_grad_()
    b = a * 1.0
    c = (b * b).sum()
    target = {"detach": b.detach(), "view": b.detach()[:], "itself": b}[alias]
    before = target._version
    with torch.set_grad_enabled(gradients):
        changes(draw)[name](target)
    assert target._version == b._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        c.backward()


@pytest.mark.parametrize("name", ["scatter_add_", "gather_norm_backward_"])
def test_inference_tensors_have_no_version(draw, name) -> None:
    with torch.inference_mode():
        x = torch.zeros(9, 3)
        changes(draw)[name](x)
        assert x.count_nonzero() > 0


@pytest.mark.parametrize("changed", ["gate", "up"])
def test_gradients_in_the_memory_of_gate_and_up_are_noticed(draw, changed) -> None:
    leaves = {name: draw.normal(4, 8).requires_grad_() for name in ("gate", "up")}
    inner = {name: x * 1.0 for name, x in leaves.items()}
    square = inner[changed].square().sum()
    found = ops.swiglu_backward_(draw.normal(4, 8), *(x.detach() for x in inner.values()))
    assert [t.data_ptr() for t in found] == [t.data_ptr() for t in inner.values()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_gradients_in_place_of_columns_and_of_shared_memory(draw) -> None:
    both, dout = draw.normal(6, 16), draw.normal(6, 8)
    gate, up = both[:, :8], both[:, 8:]
    expected = ops.swiglu_backward(dout, gate.contiguous(), up.contiguous())
    for found, wanted in zip(ops.swiglu_backward_(dout, gate, up), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    rows, before = draw.normal(9, 8), both.clone()
    for one, other in ((both[:, :8], both[:, :8]), (both[:, 4:12], both[:, :8]), (rows[:6], rows[3:])):
        with pytest.raises(ValueError, match="up: expected memory that gate does not use"):
            ops.swiglu_backward_(dout, one, other)
    with pytest.raises(ValueError, match="expected one device, got meta, cpu and cpu"):
        ops.swiglu_backward_(dout.to("meta"), gate, up)
    assert torch.equal(both, before)


def test_gradients_in_place_have_no_derivative(draw) -> None:
    gate, up = (draw.normal(4, 8).requires_grad_() * 1.0 for _ in range(2))
    dgate, _ = ops.swiglu_backward_(draw.normal(4, 8), gate, up)
    with pytest.raises(RuntimeError, match="swiglu_backward_ has no second derivative"):
        dgate.sum().backward()


def test_a_call_that_failed_has_changed_nothing() -> None:
    x = torch.zeros(9, 3)
    with pytest.raises(ValueError):
        ops.scatter_add_(x, ROWS, torch.ones(4, 2))
    assert x._version == 0


@pytest.mark.parametrize("op", ["scatter_add_", "gather_norm_backward_"])
def test_opcheck_in_place(draw, op) -> None:
    x, y = draw.normal(9, 8), draw.normal(4, 8)
    args = (x, ROWS, y) if op == "scatter_add_" else (x, ROWS, y, y + 1, None, None, "rms", 1e-6, True, False, False)
    torch.library.opcheck(getattr(torch.ops.lemo, op).default, args)


def test_compile_scatter_add_with_gradients(draw) -> None:
    def run(x, y):
        return ops.scatter_add_(x * 2, ROWS, y).square().sum()

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        own = [draw.normal(9, 3).requires_grad_(), torch.ones(4, 3, requires_grad=True)]
        own[0].data.fill_(0.5)
        loss = function(*own)
        results.append([loss.detach(), *torch.autograd.grad(loss, own)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
