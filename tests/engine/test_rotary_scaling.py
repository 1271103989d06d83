"""Rotary positions for long contexts: tables that depend on the positions of a batch equal those of transformers."""

import lemo
import pytest
import torch
from support.models import assert_close, batch, clone, gradients, tuned

TYPES = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 2.0},
    "linear": {"factor": 3.0},
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 20,
    },
}
CASES = [("llama", kind) for kind in TYPES] + [("qwen2", "yarn"), ("phi3", "longrope"), ("qwen3", "yarn")]


def build(family, kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, **TYPES[kind]}
    options: dict = {"max_position_embeddings": 20}
    if kind == "longrope":
        options |= {"max_position_embeddings": 128, "original_max_position_embeddings": 20}
        if family == "phi3":
            options["partial_rotary_factor"] = 0.5
            rope["short_factor"], rope["long_factor"] = rope["short_factor"][:2], rope["long_factor"][:2]
    return tuned(family, **options, rope_parameters=rope)


def short():
    torch.manual_seed(3)
    ids = torch.randint(3, 80, (2, 12))
    return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_equals_transformers(family, kind):
    """Short batches and long ones in turn, as some kinds remember how long the longest was; packed ones by their
    documents' positions."""
    model = build(family, kind)
    plain = clone(model)
    lemo.apply(model, lemo.LemoConfig(block_size=8, phases=[lemo.Phase("dense")]))
    losses = []
    for inputs in (short(), batch("right"), short(), batch("left"), batch("packed"), short()):
        loss, expected = gradients(plain, inputs)
        ours, got = gradients(model, inputs)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
        assert_close(got, expected)
        losses.append(loss)
    unscaled = tuned(family, max_position_embeddings=128)
    assert not torch.allclose(gradients(unscaled, batch("right"))[0], losses[1], rtol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_padding_does_not_make_a_batch_longer(kind):
    """Tables are those of the longest document, not of the rows that hold it. (transformers counts the padding.)"""
    model = build("llama", kind)
    inputs = short()
    plain, expected = gradients(model, inputs)
    mask = torch.nn.functional.pad(torch.ones(2, 12, dtype=torch.long), (0, 20))
    padded = {
        "input_ids": torch.nn.functional.pad(inputs["input_ids"], (0, 20), value=3),
        "labels": torch.nn.functional.pad(inputs["labels"], (0, 20), value=-100),
        "attention_mask": mask,
    }
    lemo.apply(model, lemo.LemoConfig(block_size=8, phases=[lemo.Phase("dense")]))
    ours, got = gradients(model, padded)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    assert_close(got, expected)
