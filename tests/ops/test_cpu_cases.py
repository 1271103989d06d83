"""Every operation on the CPU in fp32 against the oracle, over the table of cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from lemo import _native, ops
from lemo.engine.layout import Kept, select
from support import oracle
from support.attention_cases import DIMS, ON_CUDA_ALONE, Attention
from support.cases import CASES, CPU_CASES, PACKINGS, SELECT, name_of
from support.compare import check_single
from support.elementwise_cases import ReLU, Rotary, SwiGLU


@pytest.mark.parametrize("case", [c for c in (*CASES, *CPU_CASES) if c not in ON_CUDA_ALONE], ids=name_of)
def test_against_the_oracle(case) -> None:
    check_single(case)


@pytest.mark.parametrize("case", SELECT, ids=name_of)
def test_select(case) -> None:
    check_select(case, "cpu")


def check_select(case, device: str) -> None:
    p = PACKINGS[case.packing]
    blocks, scores = p.blocks(device), case.inputs(device)
    kept, weights = oracle.select(
        scores, p.documents, case.mode, case.keep, case.threshold, case.first, case.last, case.seed
    )
    expected = oracle.layout_of(kept, p.documents)
    layout = (blocks.offsets, blocks.documents, blocks.block_size, blocks.num_tokens)
    rule = (case.mode, case.keep, case.threshold, case.first, case.last, case.seed)
    got = ops.select_blocks(scores, *layout, *rule)
    k, m, nb = len(kept), len(expected["rows"]), blocks.num_blocks
    assert got[0].tolist() == kept + [-1] * (nb - k)
    assert got[1].tolist() == expected["slots"]
    assert got[2].tolist() == expected["row_offsets"] + [m] * (nb - k)
    assert got[3].tolist() == expected["cu_seqlens"]
    assert got[4].tolist() == expected["rows"] + [-1] * (p.tokens - m)
    assert got[5].tolist() == expected["row_slots"] + [-1] * (p.tokens - m)
    torch.testing.assert_close(got[6].cpu(), torch.tensor(weights + [0.0] * (nb - k)), rtol=1e-6, atol=0)
    assert got[7].tolist() == [k, m, expected["max_seqlen"][0], 0]

    exact = select(
        scores,
        blocks,
        mode=case.mode,
        keep=case.keep,
        threshold=case.threshold,
        always_first=case.first,
        always_last=case.last,
        seed=case.seed,
    )
    exact.raise_on_fault()
    assert (exact.num_blocks, exact.num_rows, exact.max_seqlen) == (k, m, expected["max_seqlen"][0])
    assert exact.blocks.tolist() == kept and exact.rows.tolist() == expected["rows"]
    assert exact.row_slots.tolist() == expected["row_slots"]
    assert exact.row_offsets.tolist() == expected["row_offsets"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_keeping_everything_is_a_budget_of_one(packing) -> None:
    blocks = PACKINGS[packing].blocks("cpu")
    budget = select(torch.zeros(blocks.num_blocks), blocks, mode="budget", keep=1.0)
    for name in ("blocks", "slots", "row_offsets", "cu_seqlens", "rows", "row_slots", "weights"):
        assert torch.equal(getattr(budget, name), getattr(Kept.everything(blocks), name)), name
    assert budget.max_seqlen == Kept.everything(blocks).max_seqlen and budget.is_everything


def test_hash_uniform_is_the_oracles() -> None:
    for seed, index in ((0, 0), (1234567, 2), (2**64 - 1, 2**40)):
        assert _native.core().hash_uniform(seed, index) == oracle.hash_uniform(seed, index)


def test_threads_do_not_change_results() -> None:
    case = Attention("documents", 6, 2, 80)
    t = case.inputs("cpu", torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(case.run(t))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def unnamed_rows_stay(device: str, dtype: torch.dtype, case: Attention) -> None:
    """Rows of a storage that the row list does not name keep their bits: out, dq, dk, dv, x and dx."""
    p, t = case.layout, case.inputs(device, dtype)
    hidden = torch.ones(p.tokens, dtype=torch.bool, device=device)
    hidden[t["rows"].long()] = False
    hidden_keys = torch.ones(case.keys.tokens, dtype=torch.bool, device=device)
    hidden_keys[t.get("rows_k", t["rows"]).long()] = False
    assert hidden.any() and not hidden.all() and hidden_keys.any() and not hidden_keys.all()
    scale, m = case.dim**-0.5, t["rows"].shape[0]
    out = torch.full_like(t["q"], 7.0)
    lse = torch.empty(case.heads, m, device=device)
    lists = {"cu_seqlens": t["cu_seqlens"], "rows": t["rows"]}
    end = {"max_seqlen": case.max_seqlen, "scale": scale}
    tiles = {"tile_offsets": None, "tiles": None, "cu_seqlens_k": t.get("cu_seqlens_k"), "rows_k": t.get("rows_k")}
    longest_k = {"max_seqlen_k": case.keys.layout["max_seqlen"][0] if case.split else 0}
    forward = {n: t[n] for n in "qkv"} | lists | end | {"out": out, "lse": lse} | tiles | longest_k
    _native.call("attention_forward", t["q"].device, forward)
    assert not lse.isnan().any()
    gradients = {f"d{n}": torch.full_like(t[n], 7.0) for n in "qkv"}
    weights = {"key_weights": t.get("key_weights"), "row_slots": t.get("row_slots")}
    given = {"out": t.get("out", out), "lse": t.get("lse", lse)}
    backward = {n: t[n] for n in ("dout", "q", "k", "v")} | given | lists | weights | end | gradients | tiles
    backward |= {"row_slots_k": t.get("row_slots_k")} | longest_k
    for deterministic in (False, True):
        _native.call("attention_backward", out.device, backward, deterministic=deterministic)
    for name, result in (gradients | {"out": out}).items():
        unnamed = hidden_keys if name in ("dk", "dv") else hidden
        assert (result[unnamed] == 7.0).all(), name
        assert not result[~unnamed].isnan().any() and not (result[~unnamed] == 7.0).all(), name

    x = torch.full((p.tokens, 64), 7.0, dtype=dtype, device=device)
    y = torch.randn(m, 64, device=device).to(dtype)
    for base in (None, torch.randn_like(y)):
        assert (ops.scatter_add_(x, t["rows"], y, base)[hidden] == 7.0).all()
    for accumulate in (False, True):
        ops.gather_norm_backward_(x, t["rows"], y, y, None, None, "rms", 1e-5, accumulate)
        assert (x[hidden] == 7.0).all()


UNNAMED = [
    Attention(p, 4, 2, dim, "rows", given)
    for p in ("gap_64", "gap_128", "kept_of_both")
    for dim in DIMS
    for given in (False, True)
]


@pytest.mark.parametrize("case", [Attention("documents", storage="rows"), *UNNAMED], ids=name_of)
def test_unnamed_rows_stay(case) -> None:
    unnamed_rows_stay("cpu", torch.float32, case)


def test_loss_gradient_may_overwrite_its_input() -> None:
    """`dhidden` may be `hidden` itself: the promise of the C interface that saves one residual stream."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(40, 32), torch.randn(65, 32), torch.randint(65, (40,))
    apart = ops.linear_cross_entropy(hidden, weight, None, None, None, 1.0, targets, segment_rows=16)
    loss, valid = torch.empty(1), torch.empty(1, dtype=torch.int64)
    names = ("bias", "lora_a", "lora_b")
    arguments = {"hidden": hidden, "weight": weight} | dict.fromkeys(names) | {"targets": targets, "ignore_index": -100}
    arguments |= {"lora_scale": 1.0, "softcap": 0.0, "reduction": 0, "segment_rows": 16, "loss": loss, "valid": valid}
    arguments |= {"dhidden": hidden, "dweight": None, "dbias": None, "dlora_a": None, "dlora_b": None}
    _native.call("linear_cross_entropy", hidden.device, arguments)
    assert torch.equal(loss, apart[0]) and torch.equal(hidden, apart[2])


def outputs_may_be_inputs(device: str, dtype: torch.dtype) -> None:
    """The promises of lemo/elementwise.h."""
    rotary = Rotary(37, 5, 64).inputs(device, dtype)
    apart = ops.rotary(rotary["x"], rotary["cos"], rotary["sin"])
    arguments = rotary | {"rows": None, "inverse": 0, "out": rotary["x"]}
    _native.call("rotary", apart.device, arguments)
    assert torch.equal(rotary["x"], apart)

    inner = SwiGLU(33, 520).inputs(device, dtype)
    out = ops.swiglu(inner["gate"], inner["up"])
    gradients = ops.swiglu_backward(inner["dout"], inner["gate"], inner["up"])
    for name in ("gate", "up"):
        t = {n: inner[n].clone() for n in ("gate", "up")}
        _native.call("swiglu", out.device, t | {"out": t[name]})
        assert torch.equal(t[name], out)
    for dgate, dup in itertools.permutations(("dout", "gate", "up"), 2):
        t = {n: inner[n].clone() for n in ("dout", "gate", "up")}
        _native.call("swiglu_backward", out.device, t | {"dgate": t[dgate], "dup": t[dup]})
        assert torch.equal(t[dgate], gradients[0]) and torch.equal(t[dup], gradients[1])

    relu = ReLU(33, 520).inputs(device, dtype)
    bits = ops.relu_(relu["x"].clone())
    for op, name, written in (("relu", "x", "out"), ("relu_backward", "dout", "dx")):
        given, apart = relu[name], torch.empty_like(relu[name])
        _native.call(op, apart.device, {name: given, written: apart, "bits": bits})
        _native.call(op, apart.device, {name: given, written: given, "bits": bits})
        assert torch.equal(given, apart)


def test_outputs_may_be_inputs() -> None:
    outputs_may_be_inputs("cpu", torch.float32)


def test_relu_of_any_number() -> None:
    """As torch: a gradient of 0 at 0, NaN and its gradient pass."""
    x = torch.tensor([[0.0, -0.0, 1e-40, -1e-40, float("inf"), -float("inf"), float("nan"), 3.0, -1.0, 2.0]])
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(torch.relu(leaf).sum(), leaf)
    bits = ops.relu_(x)
    torch.testing.assert_close(x, torch.relu(leaf.detach()), equal_nan=True, rtol=0, atol=0)
    assert bits.tolist() == [[0b11010100, 0b10]]
    dout = torch.full_like(x, float("nan"))
    assert torch.equal(ops.relu_backward_(torch.ones_like(x), bits), expected)
    assert torch.equal(ops.relu_backward_(dout, bits).isnan(), expected > 0)  # what does not pass is 0, not NaN


def test_swiglu_of_any_gate() -> None:
    """Exponentials neither overflow nor vanish into a wrong number."""
    gate = torch.tensor([[0.0, -0.0, 1e30, -1e30, 3e38, -3e38, 88.5, -88.5, 1e-40, float("inf"), float("nan")]])
    one = torch.ones_like(gate)
    expected = torch.nn.functional.silu(gate.double())
    torch.testing.assert_close(ops.swiglu(gate, one).double(), expected, equal_nan=True, rtol=1e-6, atol=1e-36)
    dgate, dup = ops.swiglu_backward(one, gate, one)
    torch.testing.assert_close(dup.double(), expected, equal_nan=True, rtol=1e-6, atol=1e-36)
    torch.testing.assert_close(dgate[0, :9], torch.tensor([0.5, 0.5, 1, 0, 1, 0, 1, 0, 0.5]))
