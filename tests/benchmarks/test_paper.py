"""The benchmark of the paper's models: shapes and figures."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def paper(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module("paper")


def test_every_model_against_lora(paper: Any) -> None:
    """Each kind of layer; loss and gradients of the dense row were compared with the peer's before."""
    for model in ("tiny", "tiny-opt", "tiny-opt-350m"):
        rows = {row["row"]: row for row in paper.rows_of(paper.MODELS[model], paper.make_base(model), 1)}
        assert list(rows) == ["peer", "dense", "upper-0.4", "skip-0.5"]
        assert rows["dense"]["kept"] == 1.0 and 0 < rows["dense"]["check"]["gradient_error"] < 1e-4
        assert rows["upper-0.4"]["kept"] == 0.6  # two of five blocks in two of three layers
        assert rows["dense"]["loss"] == pytest.approx(rows["peer"]["loss"], abs=1e-3)
        for row in rows.values():
            assert row["time_times"] == pytest.approx(rows["peer"]["step_ms"] / row["step_ms"], abs=1e-3)
            assert "memory_times" not in row and "error" not in row


def test_figures_of_the_paper_and_ours(paper: Any) -> None:
    other = {"method": "transformers + PEFT", "step_ms": 600.0, "peak_mib": 78000}
    row = paper.compare({"step_ms": 300.0, "peak_mib": 30000}, other, paper.MODELS["llama3-8b"])
    assert (row["time_times"], row["memory_times"]) == (2.0, 2.6)
    assert row["paper_memory_times"] == round(78701 / 42097, 3)
    assert "paper_mib" not in paper.compare({}, None, paper.MODELS["opt-6.7b"])  # it has none for this model


@pytest.mark.parametrize("model", ["llama2-7b", "llama3-8b", "opt-6.7b", "opt-1.3b", "opt-350m"])
def test_shapes_are_supported_at_their_lengths(paper: Any, model: str) -> None:
    """By configuration alone: positions for every token, and an estimate near the known number of weights."""
    import lemo

    models = importlib.import_module("models")
    values = dict(models.SHAPES[model])
    config = models._classes(values.pop("family"))[0](**values)
    tokens = paper.MODELS[model].tokens
    assert config.max_position_embeddings >= tokens
    billions = lemo.estimate(config, context=tokens)["phases"][0]["weights"] / 2e9
    # OPT-1.3B has 1.32 billion, OPT-350M 0.331, and more with positions for 16K and 32K tokens.
    expected = {"llama2-7b": 6.74, "llama3-8b": 8.03, "opt-6.7b": 6.69, "opt-1.3b": 1.37, "opt-350m": 0.369}[model]
    assert billions == pytest.approx(expected, rel=0.02)
