"""Attention on CUDA: every case in bf16 and fp16 at most twice the error of plain torch; lengths and offsets that need
a GPU; and runs that must repeat bit by bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from lemo import _native, ops
from lemo._native import constant
from ops.test_cpu_cases import UNNAMED, unnamed_rows_stay
from support.attention_cases import ATTENTION, CUDA_ATTENTION, DIMS, Attention
from support.cases import Results, name_of
from support.compare import check_half, error
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TILE_ROWS = constant("LEMO_TILE_ROWS")
HALVES = [torch.bfloat16, torch.float16]
REPEATS = 1000


def device_gib() -> float:
    return torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*ATTENTION, *CUDA_ATTENTION], ids=name_of)
def test_against_the_oracle(case, dtype) -> None:
    check_half(case, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", UNNAMED, ids=name_of)
def test_unnamed_rows_stay(case, dtype) -> None:
    unnamed_rows_stay("cuda", dtype, case)


# --- races ------------------------------------------------------------------------------------------------------------

RACES = [
    *(Attention("gap_128", 8, 2, dim, "rows") for dim in DIMS),
    *(Attention("gap_64", 4, 1, dim, "rows", given=True) for dim in DIMS),
    *(Attention("all_64", 8, 8, dim) for dim in (64, 128)),
    *(Attention("ragged_128", 8, 2, dim, lists=True) for dim in DIMS),
    *(Attention("gap_128", 4, 2, dim, "rows", given=True, lists=True) for dim in DIMS),
    *(Attention("chunks", 8, 2, dim) for dim in DIMS),
    *(Attention("kept_of_both", 4, 1, dim, "rows") for dim in DIMS),
    *(Attention("gap_128", 4, 2, dim, "rows", window=150) for dim in (*DIMS, 256)),
    *(Attention("kept_of_both", 4, 2, dim, "rows", window=100, softcap=3.0) for dim in (64, 128, 256)),
    *(Attention("kept_of_both", 4, 2, dim, "rows", window=100) for dim in DIMS),
    *(Attention("ragged_128", 4, 2, dim, softcap=2.0, lists=True) for dim in (64, 128, 256)),
    *(Attention("gap_64", 4, 2, 256, "rows", given) for given in (False, True)),
    *(Attention("long", 4, 1, dim, "rows", softcap=2.0) for dim in (128, 256)),
    Attention("long", 8, 2, 256, "rows"),
    Attention("gap_128", 8, 2, 64, "rows", window=150, sinks=True),
]


def repeat(case: Attention, deterministic: bool, times: int) -> tuple[Results, dict[str, bool]]:
    """The first results, and which of them ever differed in a bit. Nothing waits in between."""
    t = case.inputs("cuda", torch.bfloat16)
    first = case.run(t, deterministic)
    differs = {name: torch.zeros((), dtype=torch.bool, device="cuda") for name in first}
    for _ in range(times):
        for name, again in case.run(t, deterministic).items():
            differs[name] |= (again.view(integer(again)) != first[name].view(integer(again))).any()
    return first, {name: bool(flag) for name, flag in differs.items()}


def integer(t: Tensor) -> torch.dtype:
    return torch.int32 if t.dtype == torch.float32 else torch.int16


@pytest.mark.parametrize("case", RACES, ids=name_of)
def test_a_thousand_deterministic_runs_are_equal(case) -> None:
    _, differs = repeat(case, deterministic=True, times=REPEATS)
    assert not any(differs.values()), differs


@pytest.mark.parametrize("case", [c for c in RACES if not c.given], ids=name_of)
def test_the_forward_pass_always_repeats_bit_by_bit(case) -> None:
    t = case.inputs("cuda", torch.bfloat16)
    arguments = (t["q"], t["k"], t["v"], t["cu_seqlens"], t.get("rows"), case.max_seqlen, case.dim**-0.5)
    lists = (t["tile_offsets"], t["tiles"]) if case.lists else ()
    keys = case.key_rows(t)
    out, lse = ops.attention_forward(*arguments, *lists, **keys)
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(REPEATS):
        again, lse_again = ops.attention_forward(*arguments, *lists, **keys)
        differs |= (again != out).any() | (lse_again != lse).any()
    assert not differs


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("starts", [[0], [0, 9000, 9384]], ids=["whole", "documents"])
def test_the_forward_pass_repeats_when_thread_blocks_take_many_items(starts, dim) -> None:
    """Which items follow one another in a thread block, and overlap there, differs from run to run."""
    size = 16384
    cu_seqlens = torch.tensor([*starts, size], dtype=torch.int32, device="cuda")
    longest = int(cu_seqlens.diff().max())
    q, k, v = (torch.randn(size, heads, dim, device="cuda", dtype=torch.bfloat16) for heads in (32, 8, 8))
    out, lse = ops.attention_forward(q, k, v, cu_seqlens, None, longest, dim**-0.5)
    for _ in range(20):
        again, lse_again = ops.attention_forward(q, k, v, cu_seqlens, None, longest, dim**-0.5)
        assert torch.equal(again, out) and torch.equal(lse_again, lse)


@pytest.mark.parametrize("case", RACES, ids=name_of)
def test_atomics_only_change_the_order_of_sums(case) -> None:
    t = case.inputs("cuda", torch.bfloat16)
    first, other = case.run(t, deterministic=True), case.run(t, deterministic=False)
    for name in ("dq", "dk", "dv"):
        largest = first[name].float().abs().max().item()
        assert error(other[name].float(), first[name].float()) <= 2e-2 * largest, name


# --- sizes ------------------------------------------------------------------------------------------------------------


def in_strips(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    dtype: torch.dtype,
    tiles_seen: Tensor | None = None,
    *,
    strip: int = 1024,
    window: int = 0,
    places: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Results:
    """Causal attention of one document [M, H, D] and its gradients in dtype, a strip of queries at a time. tiles_seen:
    bool [tiles of queries, tiles of keys]; window, softcap and sinks as the operator has them; places: by default 0 to
    M."""
    places = torch.arange(q.shape[0], device=q.device) if places is None else places
    group, scale = q.shape[1] // k.shape[1], q.shape[2] ** -0.5
    q, k, v, dout = (
        t.to(dtype).transpose(0, 1) for t in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), dout)
    )
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv = (torch.zeros(k.shape, device=k.device) for _ in range(2))
    lse = torch.empty(q.shape[:2], device=q.device)
    for a in range(0, q.shape[1], strip):
        b = min(a + strip, q.shape[1])
        s = (q[:, a:b] @ k[:, :b].transpose(1, 2)).float() * scale
        slope = torch.ones((), device=q.device)
        if softcap:
            s = softcap * torch.tanh(s / softcap)
            slope = 1 - (s / softcap) ** 2
        seen = torch.ones(b - a, b, dtype=torch.bool, device=q.device).tril(a)
        if window:
            seen &= places[:b] > places[a:b, None] - window
        if tiles_seen is not None:
            near = tiles_seen[a // TILE_ROWS : -(-b // TILE_ROWS), : -(-b // TILE_ROWS)]
            seen &= near.repeat_interleave(TILE_ROWS, 0).repeat_interleave(TILE_ROWS, 1)[: b - a, :b]
        s.masked_fill_(~seen, float("-inf"))
        lse[:, a:b] = torch.logsumexp(s, -1)
        if sinks is not None:
            lse[:, a:b] = torch.logaddexp(lse[:, a:b], sinks[:, None])
        p = torch.exp(s - lse[:, a:b, None]).to(dtype)
        out[:, a:b] = p @ v[:, :b]
        delta = (dout[:, a:b].float() * out[:, a:b].float()).sum(-1, keepdim=True)
        ds = (p.float() * ((dout[:, a:b] @ v[:, :b].transpose(1, 2)).float() - delta) * slope).to(dtype)
        dq[:, a:b] = (ds @ k[:, :b]) * scale
        dk[:, :b] += (ds.transpose(1, 2) @ q[:, a:b]).float() * scale
        dv[:, :b] += (p.transpose(1, 2) @ dout[:, a:b]).float()
    grouped = [t.unflatten(0, (-1, group)).sum(1).transpose(0, 1) for t in (dk, dv)]
    return {"out": out.transpose(0, 1), "lse": lse, "dq": dq.transpose(0, 1), "dk": grouped[0], "dv": grouped[1]}


def judge(actual: Results, exact: Results, plain: Results, dtype: torch.dtype) -> None:
    for name, result in actual.items():
        largest = exact[name].abs().max().item()
        allowed = 2 * error(plain[name], exact[name]) + torch.finfo(dtype).eps * largest
        assert error(result, exact[name]) <= allowed, f"{name}: {error(result, exact[name]):.3g} > {allowed:.3g}"


@pytest.mark.skipif(device_gib() < 30, reason="the reference of 65536 tokens takes 20 GiB of GPU memory")
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("listed", [False, True])
def test_65536_tokens(dim, listed) -> None:
    torch.manual_seed(0)
    n, heads, dtype = 65536, (2, 1, 1, 2), torch.bfloat16
    q, k, v, dout = (torch.randn(n, h, dim, device="cuda").to(dtype) for h in heads)
    cu = torch.tensor([0, n], dtype=torch.int32, device="cuda")
    rows = torch.arange(n, dtype=torch.int32, device="cuda") if listed else None
    out, lse = ops.attention_forward(q, k, v, cu, rows, n, dim**-0.5)
    dq, dk, dv, _ = ops.attention_backward(dout, q, k, v, out, lse, cu, rows, None, None, n, dim**-0.5)
    actual = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    judge(actual, *(in_strips(q, k, v, dout, t) for t in (torch.float32, dtype)), dtype)


@pytest.mark.parametrize("dim", [*DIMS, 256])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks", "kept"),
    [
        (1000, 0.0, False, 0.8),
        (4096, 3.0, False, 0.8),
        (128, 0.0, True, 0.8),
        (128, 0.0, True, 1.0),
        (4096, 0.0, False, 1),
    ],
)
def test_windows_in_20100_tokens(dim, deterministic, window, softcap, with_sinks, kept) -> None:
    """Of which some are left out, so that windows begin at any row, and hold fewer rows than places; or none is, and
    the numbers of the rows are the places."""
    torch.manual_seed(0)
    n, heads, dtype = 20100, (4, 2, 2, 4), torch.bfloat16
    places = (torch.rand(n, device="cuda") < kept).nonzero()[:, 0].int()
    m = places.shape[0]
    q, k, v, dout = (torch.randn(m, h, dim, device="cuda").to(dtype) for h in heads)
    cu = torch.tensor([0, m], dtype=torch.int32, device="cuda")
    options = {"window": window, "softcap": softcap, "places": None if kept == 1 else places}
    options["sinks"] = torch.randn(heads[0], device="cuda") if with_sinks else None
    out, lse = ops.attention_forward(q, k, v, cu, None, m, dim**-0.5, **options)
    more = (cu, None, None, None, m, dim**-0.5, deterministic)
    gradients = ops.attention_backward(dout, q, k, v, out, lse, *more, **options)[:3]
    actual = {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    judge(actual, *(in_strips(q, k, v, dout, t, **options) for t in (torch.float32, dtype)), dtype)
    for _ in range(20 if deterministic else 0):
        again = ops.attention_backward(dout, q, k, v, out, lse, *more, **options)[:3]
        assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))


@pytest.mark.parametrize("window", [0, 128])
@pytest.mark.parametrize("dim", [64, 128])
def test_sinks_of_minus_infinity_are_none(window, dim) -> None:
    without, case = (Attention("gap_128", 4, 2, dim, window=window, sinks=sinks) for sinks in (False, True))
    t = case.inputs("cuda", torch.bfloat16)
    t["sinks"].fill_(float("-inf"))
    found = case.run(t, deterministic=True)
    assert not found.pop("dsinks").any()
    del t["sinks"]
    for name, expected in without.run(t, deterministic=True).items():
        assert error(found[name], expected) <= torch.finfo(torch.bfloat16).eps * expected.abs().max().item(), name


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("density", [0.5, 0.1])
def test_tile_lists_of_15900_tokens(dim, deterministic, density) -> None:
    """Enough key tiles that thread blocks join others midway, and that the last tile is ragged. Every query tile lists
    the first key tile, which at the lower density is more than a multiprocessor's share of the work."""
    torch.manual_seed(0)
    n, heads, dtype = 15900, (8, 2, 2, 8), torch.bfloat16
    q, k, v, dout = (torch.randn(n, h, dim, device="cuda").to(dtype) for h in heads)
    cu = torch.tensor([0, n], dtype=torch.int32, device="cuda")
    slots = n // TILE_ROWS + 1
    chosen = torch.rand(slots, slots, device="cuda") < density
    chosen[:, 0] = True
    listed = chosen.tril(-1)
    offsets = torch.cat((listed.new_zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0))).int()
    lists = (offsets, listed.nonzero()[:, 1].int())
    out, lse = ops.attention_forward(q, k, v, cu, None, n, dim**-0.5, *lists)
    more = (cu, None, None, None, n, dim**-0.5, deterministic, *ops.transpose_tile_lists(*lists, cu))
    gradients = ops.attention_backward(dout, q, k, v, out, lse, *more)[:3]
    actual = {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    seen = listed | torch.eye(slots, dtype=torch.bool, device="cuda")
    judge(actual, *(in_strips(q, k, v, dout, t, seen) for t in (torch.float32, dtype)), dtype)
    for _ in range(20 if deterministic else 0):
        again = ops.attention_backward(dout, q, k, v, out, lse, *more)[:3]
        assert all(torch.equal(x, y) for x, y in zip(gradients, again, strict=True))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_chunks_of_queries_of_9000_tokens(dim, deterministic) -> None:
    """Each chunk over the keys up to its end: together they are the whole, with dk and dv added up."""
    torch.manual_seed(0)
    n, heads, dtype = 9000, (8, 2, 2, 8), torch.bfloat16
    q, k, v, dout = (torch.randn(n, h, dim, device="cuda").to(dtype) for h in heads)
    actual = {"out": torch.empty_like(q), "lse": torch.empty(8, n, device="cuda"), "dq": torch.empty_like(q)}
    actual |= {name: torch.zeros(n, 2, dim, device="cuda") for name in ("dk", "dv")}
    for a, b in itertools.pairwise((0, 1000, 1064, 4001, n)):
        size, end = (torch.tensor([0, length], dtype=torch.int32, device="cuda") for length in (b - a, b))
        keys = {"cu_seqlens_k": end, "max_seqlen_k": b}
        own = (q[a:b], k[:b], v[:b])
        out, lse = ops.attention_forward(*own, size, None, b - a, dim**-0.5, **keys)
        more = (size, None, None, None, b - a, dim**-0.5, deterministic)
        dq, dk, dv, _ = ops.attention_backward(dout[a:b], *own, out, lse, *more, **keys)
        actual["out"][a:b], actual["lse"][:, a:b], actual["dq"][a:b] = out, lse, dq
        actual["dk"][:b] += dk
        actual["dv"][:b] += dv
    judge(actual, *(in_strips(q, k, v, dout, t) for t in (torch.float32, dtype)), dtype)


def test_a_size_of_heads_without_kernels_is_refused_before_anything_is_written() -> None:
    x = torch.ones(6, 2, 192, device="cuda", dtype=torch.bfloat16)
    cu, cu_k = (torch.tensor(n, dtype=torch.int32, device="cuda") for n in ([0, 6], [0, 4]))
    # Separate keys, fewer than queries: rows that see none would be blanked first.
    where = {"cu_seqlens": cu, "max_seqlen": 6, "cu_seqlens_k": cu_k, "max_seqlen_k": 4, "scale": 0.5}
    inputs = {"q": x, "k": x[:4], "v": x[:4]} | where
    lse = torch.full((2, 6), 7.0, device="cuda")
    out, dq, dk, dv = (torch.full_like(t, 7.0) for t in (x, x, x[:4], x[:4]))
    with pytest.raises(NotImplementedError, match=r"head_dim 64.*got 192"):
        _native.call("attention_forward", x.device, inputs | {"out": out, "lse": lse})
    gradients = {"dq": dq, "dk": dk, "dv": dv}
    with pytest.raises(NotImplementedError, match=r"head_dim 64.*got 192"):
        _native.call("attention_backward", x.device, inputs | {"dout": x, "out": out, "lse": lse} | gradients)
    assert all((t == 7.0).all() for t in (out, lse, *gradients.values()))


@pytest.mark.parametrize("case", [c for c in RACES if not (c.lists or c.given or c.split or c.window)], ids=name_of)
def test_equal_keys_of_their_own_change_no_bit(case) -> None:
    t = case.inputs("cuda", torch.bfloat16)
    lists = (t["cu_seqlens"], t.get("rows"), case.max_seqlen, case.dim**-0.5)
    keys = {"cu_seqlens_k": t["cu_seqlens"].clone(), "rows_k": t.get("rows"), "max_seqlen_k": case.max_seqlen}
    found = []
    for given in ({}, keys):
        out, lse = ops.attention_forward(t["q"], t["k"], t["v"], *lists, **given)
        more = (*lists[:2], None, None, *lists[2:], True)
        gradients = ops.attention_backward(t["dout"], t["q"], t["k"], t["v"], out, lse, *more, **given)[:3]
        found.append((out, lse, *gradients))
    for shared, own in zip(*found, strict=True):
        assert torch.equal(shared, own)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("deterministic", [False, True])
def test_lists_of_over_a_thousand_tiles(dim, deterministic) -> None:
    """Every earlier tile is listed, so that the pass without lists says what comes out.

    All keys of a query weigh the same, and a query's gradient grows with their number: each tile then matters as much
    to dv as any other, and one that is missed or met twice is seen. Few tiles have a gradient, those around the
    thousandth entry of the longest lists among them.
    """
    torch.manual_seed(0)
    n, heads = 140_000, (2, 1, 1, 2)
    q, k, v, dout = (torch.randn(n, h, dim, device="cuda") for h in heads)
    tile = torch.arange(n, device="cuda") // TILE_ROWS
    visible = torch.arange(1, n + 1, device="cuda") * ((tile % 16 == 0) | (tile > 1000))
    q, k, v, dout = (t.bfloat16() for t in (q * 0, k, v, dout * visible[:, None, None]))
    cu = torch.tensor([0, n], dtype=torch.int32, device="cuda")
    slots = n // TILE_ROWS + 1
    listed = torch.ones(slots, slots, dtype=torch.bool, device="cuda").tril(-1)
    offsets = torch.cat((listed.new_zeros(1, dtype=torch.int64), listed.sum(1).cumsum(0))).int()
    lists = (offsets, listed.nonzero()[:, 1].int())
    found = []
    for given in (None, None), lists:
        out, lse = ops.attention_forward(q, k, v, cu, None, n, dim**-0.5, *given)
        transposed = given if given[0] is None else ops.transpose_tile_lists(*given, cu)
        more = (cu, None, None, None, n, dim**-0.5, deterministic, *transposed)
        found.append((out, lse, *ops.attention_backward(dout, q, k, v, out, lse, *more)[:3]))
    for dense, with_lists in zip(*found, strict=True):
        assert error(with_lists, dense) <= 2 * torch.finfo(torch.bfloat16).eps * dense.abs().max().item()


@pytest.mark.skipif(device_gib() < 60, reason="a million rows of 32 heads take 45 GiB of GPU memory")
@pytest.mark.parametrize(("dim", "window"), [(80, 0), (128, 0), (128, 2**19), (256, 2**19)])
def test_a_million_rows(dim, window) -> None:
    """Kept rows at both ends of a storage of 2^32 elements (2^31.3 with head_dim 80); all other rows hold NaN. The
    window is that of storage rows."""
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    rows_in_all, heads, dtype = 2**20 + 64, (16, 4, 4, 16) if dim == 256 else (32, 8, 8, 32), torch.bfloat16
    rows = torch.cat(
        [torch.arange(64, 200), torch.arange(2**19 - 64, 2**19 + 64), torch.arange(rows_in_all - 300, rows_in_all)]
    )
    rows = rows.cuda()
    m = rows.numel()
    packed = [torch.randn(m, h, dim, device="cuda").to(dtype) for h in heads]
    q, k, v, dout = storage = [torch.empty(rows_in_all, h, dim, dtype=dtype, device="cuda") for h in heads]
    for whole, part in zip(storage, packed, strict=True):
        whole.index_copy_(0, rows, part)
    cu = torch.tensor([0, m], dtype=torch.int32, device="cuda")
    options = {"window": window}
    out, lse = ops.attention_forward(q, k, v, cu, rows.int(), m, dim**-0.5, **options)
    found = {"out": out[rows], "lse": lse}
    assert not out[200 : 2**19 - 64].any()
    more = (cu, rows.int(), None, None, m, dim**-0.5)
    gradients = ops.attention_backward(dout, q, k, v, out, lse, *more, **options)[:3]
    found |= {name: t[rows] for name, t in zip(("dq", "dk", "dv"), gradients, strict=True)}
    judge(found, *(in_strips(*packed, t, places=rows, **options) for t in (torch.float32, dtype)), dtype)
