"""`lemo profile`: what it attributes to which part, and that it claims no more than it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lemo.cli import main
from lemo.data import Documents
from lemo.engine.step import Step
from lemo.integration.kept_lists import ChosenLists
from lemo.study.profile import PARTS, PEER, Profile, Sorter, profile_modes, profile_steps
from lemo.study.profile_page import as_text, profile_page, summary_rows
from lemo.training.settings import FinetuneSettings
from support import tiny

SETTINGS = FinetuneSettings(context=64, block_size=8, lora_rank=5, steps=8)


@pytest.fixture(scope="module")
def profiles() -> list[Profile]:
    model = tiny.build().requires_grad_(False)
    modules, before = list(model.modules()), (Step.__dict__["layer"], ChosenLists.__dict__["choose"])
    documents = Documents.from_arrays([np.arange(400) % 60], [0], ["numbers"])
    found = profile_modes(model, documents, SETTINGS, ["dense", "skip:0.5"], steps=1)
    assert (Step.__dict__["layer"], ChosenLists.__dict__["choose"]) == before
    assert list(model.modules()) == modules and not any(m._forward_hooks for m in modules)
    return found


def test_parts_are_what_each_way_does(profiles: list[Profile]) -> None:
    peer, dense, skip = profiles
    assert [p.name for p in profiles] == [PEER, "lemo, dense", "lemo, skip:0.5"]
    for p in profiles:
        needed = set(PARTS) - ({"choosing"} if p is peer else set())
        assert all(p.parts[part] > 0 for part in needed), p
        assert sorted(p.layers) == list(range(tiny.LAYERS)) and sum(p.layers.values()) < p.attributed_ms
        assert p.peak_bytes is not None and p.peak_bytes > 0 and p.allocated["matrix products"] > 0
    assert peer.parts["choosing"] == 0.0
    assert skip.allocated["matrix products"] < dense.allocated["matrix products"]


def test_the_parts_never_exceed_the_step(profiles: list[Profile]) -> None:
    """One thread: operators without those that they call cannot take longer than the step."""
    rows = dict(summary_rows(profiles))
    for i, p in enumerate(profiles):
        assert 0 < p.attributed_ms <= p.profiled_ms * 1.001
        assert rows["not accounted for, ms"][i] == pytest.approx(p.profiled_ms - p.attributed_ms)


def test_the_page_and_the_table_state_the_same(profiles: list[Profile]) -> None:
    page, text = profile_page("t", profiles, {"context": 64}), as_text(profiles)
    for p in profiles:
        for part in PARTS:
            assert f'data-value="{p.parts[part]!r}"' in page
            assert f"{p.parts[part]:.3f}" in text


@pytest.mark.parametrize(
    ("name", "shapes", "above", "part"),
    [
        ("lemo::attention_forward", [[64, 2, 16]], [], "attention forward"),
        ("aten::_scaled_dot_product_flash_attention_backward", [], [], "attention backward"),
        ("aten::mm", [[64, 32], [32, 128]], ["lemo.layer 0"], "matrix products"),
        ("aten::mm", [[64, 32], [32, 5]], [], "adapter"),
        ("aten::mm", [[64, 32], [32, 61]], [], "loss"),
        ("lemo::linear_cross_entropy", [], [], "loss"),
        ("lemo::tile_scores", [], ["lemo.choosing", "lemo.layer 1"], "choosing"),
        ("aten::add_", [[64, 5]], ["Optimizer.step#AdamW.step"], "optimizer"),
        ("lemo::rotary", [[64, 32]], [], "norms, elementwise, copies"),
        ("StackBackward", [], [], "other"),
    ],
)
def test_operators_belong_to_parts(name: str, shapes: Any, above: list[str], part: str) -> None:
    model = tiny.build()
    model.config.vocab_size = 61  # 64 is also the width of the MLP, by which no loss could be recognized
    assert Sorter(model, 5).part(name, shapes, above) == part


def test_a_size_that_others_share_tells_nothing() -> None:
    model = tiny.build()
    assert Sorter(model, tiny.HIDDEN).part("aten::mm", [[64, 32], [32, 32]], []) == "matrix products"
    assert Sorter(model, 5).part("aten::mm", [[64, 32], [32, 64]], []) == "matrix products"


def test_a_way_that_does_not_fit_is_reported(monkeypatch: pytest.MonkeyPatch, profiles: list[Profile]) -> None:
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")

    monkeypatch.setattr("lemo.study.profile.training_steps", full)
    documents = Documents.from_arrays([np.arange(200) % 60], [0], ["numbers"])
    failed = profile_steps(tiny.build(), documents, SETTINGS, "peer", with_lemo=False)
    assert failed.error == "out of memory: CUDA out of memory. Tried"
    assert "peer was not measured:" in profile_page("t", [failed, *profiles], {})
    assert "out of memory" in profile_page("t", [failed], {}) and "out of memory" in as_text([failed])


def test_the_command(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "p.html"
    command = ["profile", "--model", str(model_folder), "--context", "64", "--block-size", "8", "--steps", "1"]
    assert main([*command, "--modes", "skip:0.5", "--no-peer", "--html", str(page), "--quiet"]) == 0
    assert "attention backward" in capsys.readouterr().out and "random tokens" in page.read_text()
    assert main([*command, "--modes", "skip@1,dense@1"]) == 2
    assert "expected single phases" in capsys.readouterr().err
    # Of windows shorter than a block nothing can be left out: known before another mode is measured.
    command = ["profile", "--model", str(model_folder), "--context", "32", "--steps", "1", "--no-peer", "--quiet"]
    assert main([*command, "--modes", "dense", "skip"]) == 2
    said = capsys.readouterr().err
    assert "context 32 is shorter than one block of 64 tokens" in said and "profiling" not in said
    assert main([*command, "--modes", "dense"]) == 0
