"""Which of Liger's losses the benchmark of operators compares with, without a GPU and with a stand-in for Liger."""

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def peers(module: Callable[[str], Any]) -> Any:
    return module("peers")


@pytest.fixture
def operands() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(8, 4, requires_grad=True), torch.randn(10, 4), torch.randint(10, (8,))


def test_without_liger_every_row_has_a_reason(peers: Any, operands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    runs, left_out = peers.liger_losses(*operands)
    assert runs == {} and len(left_out) == 3
    assert all("liger_kernel" in row["reason"] for row in left_out)


def test_the_named_implementation_computes(peers: Any, operands: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen during the call alone; what this machine lacks is left out."""
    pinned: list[str | None] = []

    class Loss:
        def __call__(self, weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            assert pinned[-1] == "nvidia-triton"
            return F.cross_entropy(hidden @ weight.T, targets)

    backends: Any = types.ModuleType("liger_kernel.backends")
    backends.available_impls, backends.set_impl = lambda op: ["nvidia-triton"], pinned.append
    transformers: Any = types.ModuleType("liger_kernel.transformers")
    transformers.LigerFusedLinearCrossEntropyLoss = Loss
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.backends", backends)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", transformers)
    runs, left_out = peers.liger_losses(*operands)
    assert list(runs) == [peers.LIGER_TRITON]
    assert [row["row"] for row in left_out] == [peers.LIGER_CUTE, peers.LIGER_ONE_KERNEL]
    assert "liger-kernel[cutedsl]" in left_out[0]["reason"]
    (gradient,) = runs[peers.LIGER_TRITON]()
    assert pinned == ["nvidia-triton", None] * 2
    hidden, weight, targets = operands
    torch.testing.assert_close(gradient, torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets), hidden)[0])
