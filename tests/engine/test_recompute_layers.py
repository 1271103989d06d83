"""Segments of layers that run again from the stream before them: equal results, lists replayed, bytes as planned."""

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
