"""What a step saves for its backward pass, counted, against the documented formula."""

import lemo
import pytest
from lemo.engine.memory import layer_shape, saved_bytes
from lemo.engine.tiles import lists_of
from support.models import ATTENTION, LAYERS, LINEARS, base, lora
from support.saved import count

BLOCK, CONTEXT, DEPTH = 8, 128, 3


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("where", ["attention", "all"])
def test_skip(family, recompute, keep, where, monkeypatch):
    targets = ATTENTION[family] if where == "attention" else LINEARS[family]
    model = lora(base(family, layers=DEPTH), targets).train()
    phase = lemo.Phase("skip", keep=keep, policy="random")
    got, rows, everything = count(
        model, lemo.LemoConfig(block_size=BLOCK, recompute=recompute, phases=[phase]), monkeypatch
    )
    assert rows == [keep * CONTEXT] * DEPTH
    shape = layer_shape(model.config, element=4, lora_rank=4, lora_targets=targets)
    expected = [saved_bytes(shape, m, recompute=recompute, documents=2, everything=everything) for m in rows]
    assert got == sum(expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("keep", [0.5, 0.25])
def test_backward(weighted, keep, monkeypatch):
    model = lora(base("llama", layers=DEPTH), ATTENTION["llama"]).train()
    phase = lemo.Phase("backward", keep=keep, policy="random", weighted=weighted)
    got, rows, _ = count(model, lemo.LemoConfig(block_size=BLOCK, phases=[phase]), monkeypatch)
    shape = layer_shape(model.config, element=4, lora_rank=4, lora_targets=ATTENTION["llama"])
    expected = [
        saved_bytes(shape, m, recompute="none", mode="backward", blocks=m // BLOCK, documents=2, weighted=weighted)
        for m in rows
    ]
    assert got == sum(expected)


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_sparse(recompute, keep, monkeypatch):
    model = lora(base("llama", layers=DEPTH, max_position_embeddings=1024), ATTENTION["llama"]).train()
    phase = lemo.Phase("sparse", keys=256, keep=keep, policy=None if keep == 1.0 else "random")
    settings = lemo.LemoConfig(block_size=BLOCK, recompute=recompute, phases=[phase])
    got, rows, everything = count(model, settings, monkeypatch, context=2048)
    assert rows == [keep * 2048] * DEPTH
    shape = layer_shape(model.config, element=4, lora_rank=4, lora_targets=ATTENTION["llama"])
    tiles = lists_of((rows[0] // 2,) * 2, phase)
    expected = saved_bytes(shape, rows[0], recompute=recompute, documents=2, everything=everything, tiles=tiles)
    # Documents of unknown lengths have room for the longest list everywhere.
    assert 0 <= got - DEPTH * expected < DEPTH * 2 * 4 * tiles[0] * 2
    estimate = lemo.estimate(model, settings, 1024, batch=2, element=4, lora_rank=4)["phases"][0]
    assert estimate["saved"] == DEPTH * expected


def test_a_weighted_phase_is_estimated_with_room_for_its_draw():
    """Its number of blocks varies: three standard deviations, 48 of 512 blocks, are added."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    phases = [lemo.Phase("backward", keep=0.5, weighted=weighted) for weighted in (False, True)]
    plain, weighted = lemo.estimate(config, lemo.LemoConfig(phases=phases, recompute="full"), 65536)["phases"]
    assert 1.09 < weighted["saved"] / plain["saved"] < 1.11


def test_estimate_of_a_real_shape():
    """Llama-3-8B at 64K: full recomputation saves 8 KiB per kept token and layer (and its row)."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    tokens = 65536
    phases = [lemo.Phase("skip", keep=0.5), lemo.Phase("backward", keep=0.5)]
    result = lemo.estimate(config, lemo.LemoConfig(phases=phases, recompute="full"), tokens)
    skip, backward = result["phases"]
    assert skip["saved"] == 32 * (tokens // 2 * (8192 + 4) + 8)
    assert backward["saved"] > 1.9 * skip["saved"]
    assert 14.5e9 < skip["weights"] < 17e9
    assert result["peak"] == max(skip["peak"], backward["peak"])
    assert "largest phase" in str(result)
