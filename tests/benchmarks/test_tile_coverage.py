"""Covered mass: the exact mass, the budget of a choice, and what every score reaches on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lemo.predictors import calibrate

DENSITIES = (0.25, 0.5, 1.0)


@pytest.fixture
def coverage(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    found = module("tile_coverage")
    monkeypatch.setattr(found, "FIRST_ROWS", 2)
    return found


def test_mass_is_the_softmax_by_tiles(coverage: Any) -> None:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 384, 16, generator=g), torch.randn(2, 384, 16, generator=g)
    logits = torch.einsum("hid,hjd->hij", q.double(), k.double().repeat_interleave(2, 0)) * 0.25
    p = logits.masked_fill(torch.ones(384, 384, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    expected = p.unflatten(1, (3, 128)).unflatten(-1, (3, 128)).sum(-1).mean(2)
    mass = coverage.mass_of(q, k, 0.25)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(mass.sum(-1), torch.ones(4, 3))


def test_a_choice_keeps_its_budget_and_the_forced_tiles(coverage: Any) -> None:
    scores = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
    chosen = coverage.choose(scores, 0.5)
    for m in range(12):
        for n in {0, max(m - 1, 0), m}:
            assert bool(chosen[:, m, n].all())
        assert not bool(chosen[:, m, m + 1 :].any())
        assert chosen[:, m].sum(-1).tolist() == [min(m + 1, max(3, -(-(m + 1) // 2)))] * 3
        others = range(1, m - 1)
        for head in range(3):
            kept = [float(scores[head, m, n]) for n in others if chosen[head, m, n]]
            left = [float(scores[head, m, n]) for n in others if not chosen[head, m, n]]
            assert not kept or not left or min(kept) >= max(left)


def test_every_score_on_a_model(coverage: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 97}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024)
    model = LlamaForCausalLM(config).eval()
    for weight in (model.model.layers[0].self_attn.q_proj, model.model.layers[1].self_attn.q_proj):
        torch.nn.init.normal_(weight.weight, std=1.0)  # attention that prefers some tiles
    ids = torch.randint(97, (896,))
    with torch.no_grad():
        expected = model(ids[None]).logits
    predictors = calibrate(model, [ids, ids.flip(0)], target="mass", steps=2, rank=8, features=8, progress=False)
    reader = coverage.Reader(DENSITIES, list(coverage.SCORES), predictors)
    reader.read(model, ids)
    with torch.no_grad():  # the model computes what it did before
        torch.testing.assert_close(model(ids[None]).logits, expected, rtol=1e-4, atol=1e-4)
    rows, means = coverage.summary(reader.found)
    assert {r["layer"] for r in rows} == {0, 1} and len(rows) == 2 * 2 * len(DENSITIES) * len(coverage.SCORES)
    best = {(r["heads"], r["density"]): r["covered"] for r in means if r["score"] == "exact"}
    for row in means:
        assert 0 < row["worst_layer"] <= row["covered"] <= best[row["heads"], row["density"]] + 1e-6
        assert row["density"] < 1 or row["covered"] == pytest.approx(1, abs=1e-5)
    shared = {r["score"]: r["covered"] for r in means if r["heads"] == "shared" and r["density"] == 0.5}
    assert shared["probe 4"] > shared["random"]
    lines = coverage.by_layer(rows, 0.5).splitlines()
    assert len(lines) == 2 + 2 and "predictors" in lines[1] and "probe 1" in lines[1]
    assert best["grouped", 0.5] > best["shared", 0.5] - 1e-6 > best["shared", 0.25]


@pytest.mark.parametrize(
    ("option", "value"), [("--context", "1000"), ("--context", "256"), ("--density", "0"), ("--model", "no/where")]
)
def test_settings_out_of_range(coverage: Any, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        coverage.main(["--model", "none", option, value])
    assert option in capsys.readouterr().err
