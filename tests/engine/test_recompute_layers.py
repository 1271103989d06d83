"""Segments of layers that run again from the stream before them: equal results, lists replayed, bytes as planned."""

import sys

import lemo
import lemo.engine.backward
import lemo.engine.stack
import pytest
import torch
from support.models import batch, gradients, tuned

LAYERS, BLOCK = 6, 8
PHASES = {
    "dense": {"mode": "dense"},
    "skip": {"policy": "update_norm"},
    "two-lists": {"policy": "random", "mlp_keep": 0.25},
    "nothing-for-attention": {"policy": "random", "keep": 0.0, "mlp_keep": 0.5},
    "backward": {"mode": "backward", "keep": 0.5},
    "weighted": {"mode": "backward", "weighted": True},
    "sparse": {"mode": "sparse", "density": 0.5},
    "sparse-and-skip": {"mode": "sparse", "keep": 0.5, "density": 0.5, "policy": "random"},
}


def settings(phase="skip", **options):
    return lemo.LemoConfig(block_size=BLOCK, phases=[lemo.Phase(**PHASES[phase])], seed=3, **options)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("recompute", ["full", "attention", "none"])
def test_results_are_those_without(phase, recompute):
    """Bit for bit, of packed documents, whatever the segments, also with rows in host memory."""
    inputs, found = batch("packed"), []
    ways = [{}, {"recompute_layers": 2}, {"recompute_layers": 4}, {"recompute_layers": True}]
    if recompute != "none":
        ways += [{"recompute_layers": 3, "offload": offload} for offload in (True, 2)]
    for way in ways:
        controller = lemo.apply(model := tuned("llama", layers=LAYERS), settings(phase, recompute=recompute, **way))
        found.append(gradients(model, inputs))
        memory = controller.report()["memory"]
        assert sum(memory["segments"]) == LAYERS if way else memory == {}
    (loss, grads), *others = found
    assert grads or phase == "nothing-for-attention"  # its adapters are there
    for other, theirs in others:
        assert torch.equal(loss, other)
        assert theirs.keys() == grads.keys() and all(torch.equal(theirs[n], g) for n, g in grads.items())


@pytest.mark.parametrize("family", ["llama", "phi3", "opt", "qwen2", "gpt_oss", "qwen3"])
@pytest.mark.parametrize("phase", ["dense", "two-lists", "weighted"])
def test_large_layers_go_backward_in_pieces(family, phase, monkeypatch):
    """A few heads of attention at a time, and projections in chunks of rows: gradients as of a layer that saves all."""
    inputs, found = batch("packed"), []
    for recompute in ("none", "attention", "full"):
        if recompute != "none":
            monkeypatch.setattr(sys.modules["lemo.ops.attention"], "HEADS_BYTES", 1)
            monkeypatch.setattr(lemo.engine.backward, "SEPARATE_BYTES", 1)
            monkeypatch.setattr(lemo.engine.step, "MLP_ROWS", 7)
        lemo.apply(model := tuned(family), settings(phase, recompute=recompute))
        found.append(gradients(model, inputs))
    (loss, grads), *others = found
    for other, theirs in others:
        torch.testing.assert_close(other, loss)
        assert theirs.keys() == grads.keys()
        for name, gradient in grads.items():
            torch.testing.assert_close(theirs[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
