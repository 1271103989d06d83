"""Every operation on CUDA in bf16 and fp16 over the table of cases: at most twice the error of plain torch."""

from __future__ import annotations

import os

import pytest
import torch
from lemo import _native, ops
from lemo.engine.layout import Blocks, select
from ops.test_cpu_cases import check_select, outputs_may_be_inputs
from ops.test_tiles import check_select_tiles
from support import oracle
from support.attention_cases import ATTENTION
from support.cases import CASES, PACKINGS, SELECT, Loss, Norm, Select, name_of
from support.compare import check_half
from support.tile_cases import SELECT_TILES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, scope="module")
def exact_products() -> None:
    # cuBLAS wants this where torch's deterministic mode is on, as it is for poisoned outputs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def test_the_library_has_cuda_kernels() -> None:
    assert _native.has_backend("cuda")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c not in ATTENTION], ids=name_of)
def test_against_the_oracle(case, dtype) -> None:
    check_half(case, dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_outputs_may_be_inputs(dtype) -> None:
    outputs_may_be_inputs("cuda", dtype)


@pytest.mark.parametrize("case", SELECT, ids=name_of)
def test_select(case) -> None:
    check_select(case, "cuda")


@pytest.mark.parametrize("case", SELECT_TILES, ids=name_of)
def test_select_and_list_tiles(case) -> None:
    check_select_tiles(case, "cuda")


@pytest.mark.parametrize(
    "case", [Loss(500, 256, 4000, rank=8, bias=True, dweight=True), Norm("long", 4096, bias=True)], ids=name_of
)
def test_deterministic_mode_repeats_bit_by_bit(case, monkeypatch) -> None:
    monkeypatch.setattr(_native, "wants_determinism", lambda: True)
    t = case.inputs("cuda", torch.bfloat16)
    first = case.run(t)
    for _ in range(3):
        again = case.run(t)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("mode", ["threshold", "budget", "sample", "poisson"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_fault_stays_on_the_device_until_asked(mode, bad) -> None:
    ragged, whole = Blocks.from_lengths([100, 30], 16, "cuda"), Blocks.from_lengths([128, 64], 16, "cuda")
    for blocks in (ragged, whole):
        scores = torch.full((blocks.num_blocks,), 0.5, device="cuda")
        scores[5] = bad
        layout = (blocks.offsets, blocks.documents, blocks.block_size, blocks.num_tokens)
        *_, info = ops.select_blocks(scores, *layout, mode, 0.5, 0.0, 1, 0, 0)
        assert info.tolist() == [0, 0, 0, 6]
        with pytest.raises(FloatingPointError, match="block 5"):
            select(scores, blocks, mode=mode, keep=0.5).raise_on_fault()


def test_selection_of_whole_blocks_does_not_wait_for_the_device() -> None:
    blocks = Blocks.from_lengths([128, 64], 16, "cuda")
    scores = torch.rand(blocks.num_blocks, device="cuda")
    select(scores, blocks, mode="budget", keep=0.5)  # loads the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = select(scores, blocks, mode="budget", keep=0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    ids, _ = oracle.select(scores.cpu(), oracle.ranges([128, 64], 16), "budget", 0.5, 0.0, 1, 0)
    assert kept.blocks.tolist() == ids and kept.num_rows == 16 * len(ids)


def test_work_runs_on_the_current_stream() -> None:
    """Results are right where the inputs are still being made on a side stream."""
    p = PACKINGS["long"]
    rows = p.tensor("rows", "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.zeros(p.tokens, 4096, dtype=torch.bfloat16, device="cuda")
        torch.cuda._sleep(20_000_000)
        x += 1
        y = ops.gather(x, rows)
    stream.synchronize()
    assert (y == 1).all()


def test_captured_in_a_graph() -> None:
    """Scores, selection, gather, norm and scatter by capacity: nothing waits for the host."""
    blocks = Blocks.from_lengths([128, 40], 16, "cuda")
    x = torch.randn(blocks.num_tokens, 64, device="cuda").to(torch.bfloat16)
    layout = (blocks.offsets, blocks.documents, blocks.block_size)

    def step() -> torch.Tensor:
        q = x.view(-1, 1, 64)
        scores, _ = ops.block_scores(q, q, *layout, 0.125)
        rows = ops.select_blocks(scores, *layout, blocks.num_tokens, "budget", 0.5, 0.0, 1, 0, 0)[4]
        y, _ = ops.gather_norm(x, rows, None, None, None, "rms", 1e-5)
        return ops.scatter_add_(x.clone(), rows, y)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, step())


def test_wrong_dtypes_and_devices_are_named() -> None:
    x, rows = torch.ones(8, 16, device="cuda"), torch.arange(8, dtype=torch.int32, device="cuda")
    with pytest.raises(NotImplementedError, match=r"x: .*float16 or bfloat16, got float32"):
        ops.gather(x, rows)
    with pytest.raises(ValueError, match="rows: expected a tensor on cuda:0, got one on cpu"):
        ops.gather(x.half(), rows.cpu())
    with pytest.raises(ValueError, match=r"x: .*16 bytes"):
        ops.gather(torch.ones(8, 20, device="cuda", dtype=torch.float16)[:, 1:17], rows)
    with pytest.raises(ValueError, match=r"gate: .*multiples of 16 bytes"):
        ops.swiglu(*torch.ones(2, 8, 20, device="cuda", dtype=torch.float16))
    narrow = torch.ones(2, 8, 24, device="cuda", dtype=torch.float16)[..., :20]  # what comes out would not be aligned
    with pytest.raises(NotImplementedError, match=r"gate: expected f to be a multiple of 8 on CUDA, got 20"):
        ops.swiglu(*narrow)
    with pytest.raises(NotImplementedError, match=r"x: expected d to be a multiple of 8 on CUDA, got 20"):
        ops.gather(narrow[0], rows)


def test_a_bad_target_makes_the_loss_nan() -> None:
    hidden, weight = (torch.ones(16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    targets = torch.full((16,), 16, device="cuda")
    assert ops.linear_cross_entropy(hidden, weight, None, None, None, 1.0, targets)[0].isnan().all()


def test_selection_is_the_cpus() -> None:
    case = Select("long", "sample", scores="probabilities", seed=11)
    blocks = {d: PACKINGS["long"].blocks(d) for d in ("cpu", "cuda")}
    options = {"mode": "sample", "keep": 0.5, "seed": 11}
    cpu, cuda = (select(case.inputs(d), b, **options) for d, b in blocks.items())
    assert torch.equal(cpu.rows, cuda.rows.cpu()) and torch.equal(cpu.weights, cuda.weights.cpu())
