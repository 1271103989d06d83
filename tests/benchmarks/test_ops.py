"""What the benchmarks of operators compare with, without a GPU and with stand-ins for the peers' libraries."""

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ATTENTION = [torch.randn(6, heads, 4) for heads in (4, 2, 2, 4)]


@pytest.fixture
def peers(module: Callable[[str], Any]) -> Any:
    return module("peers")


@pytest.fixture
def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(8, 4, requires_grad=True), torch.randn(10, 4), torch.randint(10, (8,))


@pytest.fixture
def gradient(operands: Any) -> torch.Tensor:
    hidden, weight, targets = operands
    return torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), hidden)[0]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """A module of that name, and its packages."""
    parents = name.split(".")[:-1]
    for i in range(len(parents)):
        package = ".".join(parents[: i + 1])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    made = types.ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)


def test_without_liger_every_row_has_a_reason(peers: Any, operands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    makers = peers.liger_losses(*operands)
    assert len(makers) == 4
    for make in makers.values():
        with pytest.raises(ImportError, match="liger_kernel"):
            make()


def test_each_of_ligers_losses_is_the_one_that_its_name_says(
    peers: Any, operands: Any, gradient: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def loss(called: str, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(called)
        return F.cross_entropy(hidden @ weight.T, targets)

    def forward(
        hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, defer_dw: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert defer_dw and not hidden.requires_grad, "no weight's gradient"
        hidden.requires_grad_()
        value = loss("kernels", hidden, weight, targets)
        return value, torch.autograd.grad(value, hidden)[0]

    per_token = types.SimpleNamespace(apply=lambda h, w, t: F.cross_entropy(h @ w.T, t, reduction="none"))
    stand_in(
        monkeypatch,
        "liger_kernel.transformers",
        LigerFusedLinearCrossEntropyLoss=lambda: lambda w, h, t: loss("module", h, w, t),
    )
    stand_in(
        monkeypatch,
        "liger_kernel.functional",
        fused_linear_cross_entropy=lambda h, w, t, *, impl: (loss(impl, h, w, t), None, None, None),
    )
    stand_in(monkeypatch, "liger_kernel.ops.cutedsl.ops", LigerFusedScaledCrossEntropySM90Function=per_token)
    stand_in(
        monkeypatch,
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        fused_linear_cross_entropy_forward_sm90=forward,
    )
    for make in peers.liger_losses(*operands).values():
        torch.testing.assert_close(make()(), gradient)
    assert calls == ["module", "nvidia-cutedsl", "kernels"]


@pytest.mark.parametrize("rows", [3, 8])
def test_the_floor_is_both_products_and_nothing_else(peers: Any, operands: Any, rows: int) -> None:
    hidden, weight, _ = operands
    with torch.no_grad():
        torch.testing.assert_close(peers.two_products(hidden, weight, rows)(), hidden @ weight.T @ weight)


class Clock:
    """In place of a GPU: every call takes a millisecond, and runs."""

    def __init__(self, benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        def milliseconds(runs: Any, **timing: int) -> float:
            runs[0]()
            return 1.0

        monkeypatch.setattr(benchmark, "milliseconds", milliseconds)
        monkeypatch.setattr(benchmark, "peak", lambda run: 0)
        monkeypatch.setattr(benchmark, "normal", lambda *shape, scale=1.0: torch.randn(shape) * scale)
        monkeypatch.setattr(torch, "randint", lambda high, shape, device: torch.arange(shape[0]) % high)
        for name, value in {"D": 8, "VOCAB": 16, "TOKENS": 64}.items():
            monkeypatch.setattr(benchmark, name, value)


def test_a_loss_that_raises_or_is_wrong_is_left_out_and_the_others_stay(
    module: Callable[[str], Any], peers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = module("ops")
    Clock(benchmark, monkeypatch)

    def broken() -> torch.Tensor:
        raise RuntimeError("cubin: no kernel image\nand a trace")

    def losses(leaf: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        right = lambda: torch.autograd.grad(peers.cross_entropy(leaf, weight, targets), leaf)[0]  # noqa: E731
        return {"broken": lambda: broken, "wrong": lambda: lambda: 2 * right(), "last": lambda: right}

    monkeypatch.setattr(peers, "liger_losses", losses)
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    benchmark.loss_op(rows, left_out)
    names = [row["peer"] for row in rows]
    assert names == ["linear + cross_entropy", "the same in chunks of 2048", benchmark.FLOOR, "last"]
    assert [row["peer"] for row in rows if row.get("floor")] == [benchmark.FLOOR]
    assert left_out[0] == {"row": "broken", "reason": "cubin: no kernel image"}
    assert left_out[1]["row"] == "wrong" and "differ" in left_out[1]["reason"] and len(left_out) == 2


def test_rows_are_written_if_a_part_fails(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    benchmark, out = module("ops"), tmp_path / "ops.json"

    def fail(*arguments: Any) -> None:
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(benchmark, "rows_ops", lambda rows: rows.append({"op": "gather", "ms": 1.0}))
    monkeypatch.setattr(benchmark, "loss_op", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(module("common"), "header", lambda: {"gpu": "none"})
    monkeypatch.setattr(module("common"), "short_device_name", lambda: "none")
    monkeypatch.setattr(sys, "argv", ["ops.py", "--only", "rows", "loss", "--out", str(out)])
    with pytest.raises(SystemExit, match="failed: loss"):
        benchmark.main()
    assert json.loads(out.read_text())["rows"] == [{"op": "gather", "ms": 1.0}]


def test_flash_attention_4_takes_part_in_both_passes(peers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def flash_attn_func(q: Any, k: Any, v: Any, *, causal: bool, deterministic: bool) -> tuple[torch.Tensor, None]:
        asked.append((causal, deterministic, q.shape, k.shape))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    stand_in(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_func)
    passes = peers.flash_attention_4(*ATTENTION, deterministic=True)
    assert passes["forward"]().shape == (1, 6, 4, 4)
    assert [g.shape for g in passes["backward"]()] == [(1, 6, heads, 4) for heads in (4, 2, 2)]
    assert set(asked) == {(True, True, (1, 6, 4, 4), (1, 6, 2, 4))}


def test_an_attention_that_is_not_installed_is_left_out_once(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = module("attention")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    bench = attention.Bench(quick=True)
    for _ in range(2):
        assert bench.build({"flash 4": attention.DENSE["flash 4"]}, [tuple(ATTENTION)]) == {}
    (missing,) = bench.left_out
    assert missing["row"] == "flash 4"
    assert missing["reason"].startswith("flash-attn-4 is not installed (pip install 'flash-attn-4[cu13]')")


def test_pages_say_the_share_of_the_floor_and_what_is_left_out(
    module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = module("summary")
    row = {"op": "linear_cross_entropy", "case": "small", "ms": 50.0, "peer": "its two products", "peer_ms": 48.0}
    result = {
        "rows": [row | {"ratio": 0.96, "floor": True}],
        "left_out": [{"row": name, "reason": "not installed"} for name in ("A", "B")],
    }
    monkeypatch.setattr(summary, "load", lambda name: result)
    monkeypatch.setattr(summary, "source", lambda name, result: "where from")
    assert summary.operations("ops-h200")[-2] == (
        "Ratio above 1: ours is faster. Of the time of `linear_cross_entropy`, 96% is what its two products take. "
        "Left out: A, B: not installed. where from"
    )
