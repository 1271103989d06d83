"""Graphs on a GPU: the numbers of a run without them, bit for bit, and a recording that fails leaves no trace."""

from __future__ import annotations

from typing import Any

import lemo
import pytest
import torch
from lemo.engine import capture
from support.models import ATTENTION, base, lora
from torch import Tensor

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SHARED: dict[str, Any] = {"policy": "random", "policy_options": {"shared": True}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dense": ({"mode": "dense"}, {}),
    "dense-full": ({"mode": "dense"}, {"recompute": "full"}),
    "segments": ({"mode": "dense"}, {"recompute": "full", "recompute_layers": 2}),
    "shared": ({"mode": "skip", **SHARED}, {}),
    "random": ({"mode": "skip", "policy": "random"}, {}),
    "update-norm": ({"mode": "skip", "policy": "update_norm"}, {}),
    "exact": ({"mode": "skip", "policy": "exact"}, {"recompute": "attention"}),
    "two-lists": ({"mode": "skip", "policy": "update_norm", "mlp_keep": 0.25}, {}),
    "backward": ({"mode": "backward", "policy": "random"}, {}),
    "sparse": ({"mode": "sparse", "keys": 256}, {}),
    "sparse-skip": ({"mode": "sparse", "keys": 256, "keep": 0.8, **SHARED}, {}),
}
LENGTHS = (1024, 1024, 512, 1024, 512, 512, 1024)


def run(phase: dict[str, Any], on: bool, **settings: Any) -> tuple[list[Tensor], lemo.Controller]:
    """Losses, gradients and trained weights of a short run, and its controller."""
    torch.manual_seed(1)
    inner = base("llama", 3, hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    model = lora(inner, ATTENTION["llama"]).train()
    model.to(device="cuda", dtype=torch.bfloat16)
    weights = [p for p in model.parameters() if p.requires_grad]
    for p in weights:
        p.data = p.data.float()
    config = lemo.LemoConfig(phases=[lemo.Phase(**phase)], cuda_graphs=on, deterministic=True, **settings)
    controller = lemo.apply(model, config)
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    found: list[Tensor] = []
    for i, tokens in enumerate(LENGTHS):
        ids = torch.randint(3, 89, (1, tokens), generator=torch.Generator().manual_seed(i)).cuda()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in weights if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
        controller.step()
    return [*found, *(p.detach() for p in weights)], controller


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_bit_for_bit(case: str) -> None:
    phase, settings = CASES[case]
    plain, _ = run(phase, False, **settings)
    found, controller = run(phase, True, **settings)
    assert not controller.graphs.failures
    assert controller.graphs.replays == 5 and same(plain, found)


def test_a_recording_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(*args: Any) -> None:
        torch.ones((), device="cuda").item()

    plain, _ = run({"mode": "dense"}, False)
    with monkeypatch.context() as patched:
        patched.setattr(capture, "backward", waits)
        found, controller = run({"mode": "dense"}, True)
    assert len(controller.graphs.failures) == 1 and controller.graphs.replays == 0
    assert same(plain, found)
    assert same(plain, run({"mode": "dense"}, True)[0])
