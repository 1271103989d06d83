"""The calibration folder: complete or absent, and only accepted for the model it was made for."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from lemo import storage
from lemo.engine.layout import Blocks
from lemo.predictors import CalibrationError, PredictorNetwork, PredictorSet, model_fingerprint
from lemo.predictors.store import calibration_digest
from support.tiny import BLOCK, HIDDEN, LAYERS, build


@pytest.fixture
def predictors(model) -> PredictorSet:
    g = torch.Generator().manual_seed(0)
    return PredictorSet(
        layers=[PredictorNetwork(HIDDEN, 16, 8, generator=g).export() for _ in range(LAYERS)],
        norm="rms",
        pool="mean",
        eps=1e-5,
        normalize=False,
        thresholds=(0.25, -1.5),
        keep=(0.4, 0.6),
        block_size=BLOCK,
        context=128,
        fingerprint=model_fingerprint(model),
        report={"keep": 0.5},
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip(tmp_path, model, predictors):
    predictors.save(tmp_path / "a" / "calibration")
    assert sorted(os.listdir(tmp_path / "a" / "calibration")) == ["lemo_config.json", "predictors.safetensors"]
    assert os.listdir(tmp_path / "a") == ["calibration"]
    loaded = PredictorSet.load(tmp_path / "a" / "calibration", model=model)
    names = ("norm", "pool", "eps", "normalize", "thresholds", "keep", "block_size", "context", "fingerprint")
    for name in (*names, "report"):
        assert getattr(loaded, name) == getattr(predictors, name), name
    blocks = Blocks.from_lengths([20], BLOCK)
    x = torch.randn(20, HIDDEN)
    for i in range(LAYERS):
        assert torch.equal(loaded.scores(i, x, blocks), predictors.scores(i, x, blocks))
    assert PredictorSet.load(tmp_path / "a" / "calibration", dtype=torch.bfloat16).layers[0].wq1.dtype == torch.bfloat16


@pytest.mark.parametrize("with_digest", [True, False])
def test_folders_of_format_1_load_as_importance(tmp_path, predictors, with_digest):
    """They had no target, and the first ones no digest."""
    predictors.save(tmp_path / "c")
    path = tmp_path / "c" / "lemo_config.json"
    config = json.loads(path.read_text())
    assert config.pop("target") == "importance" and config["format_version"] == 2
    config["format_version"] = 1
    config["digest"] = storage.content_digest(config)
    if not with_digest:
        del config["digest"]
    path.write_text(json.dumps(config))
    loaded = PredictorSet.load(tmp_path / "c")
    assert loaded.target == "importance" and loaded.thresholds == predictors.thresholds
    assert calibration_digest(tmp_path / "c")
    config["keep"] = [0.4, 0.7]
    path.write_text(json.dumps(config))
    if with_digest:
        with pytest.raises(CalibrationError, match="digest"):
            PredictorSet.load(tmp_path / "c")


def test_scores_refuse_another_block_size(predictors):
    with pytest.raises(ValueError, match="calibrated for blocks of 8 tokens, got 4"):
        predictors.scores(0, torch.randn(20, HIDDEN), Blocks.from_lengths([20], 4))


def test_another_model(tmp_path, predictors):
    predictors.save(tmp_path / "c")
    with pytest.raises(CalibrationError, match=r"another model.*weights"):
        PredictorSet.load(tmp_path / "c", model=build(seed=7))
    with pytest.raises(CalibrationError, match="model_type: calibrated for llama, the model has opt"):
        predictors.check_model(build(family="opt"))


def test_overwriting_needs_permission_and_a_calibration(tmp_path, predictors):
    predictors.save(tmp_path / "c")
    with pytest.raises(CalibrationError, match="exists already"):
        predictors.save(tmp_path / "c")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("years of work")
    with pytest.raises(CalibrationError, match="not a calibration"):
        predictors.save(tmp_path / "d", overwrite=True)
    predictors.thresholds = (3.0, 4.0)
    predictors.save(tmp_path / "c", overwrite=True)
    assert PredictorSet.load(tmp_path / "c").thresholds == (3.0, 4.0)
    assert sorted(os.listdir(tmp_path)) == ["c", "d"]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("failing", ["write", "rename", "second rename"])
def test_failing_save_changes_nothing(tmp_path, predictors, monkeypatch, exists, failing):
    if exists:
        predictors.save(tmp_path / "c")
    before = tree(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    if failing == "write":
        monkeypatch.setattr(storage, "flush", lambda path: (_ for _ in ()).throw(full))
    else:
        rename, calls = os.rename, []

        def fail(source, target):
            calls.append(source)
            if len(calls) == (2 if failing == "second rename" and exists else 1):
                raise full
            rename(source, target)

        monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CalibrationError, match=r"no space left.*nothing was changed"):
        predictors.save(tmp_path / "c", overwrite=True)
    assert tree(tmp_path) == before


def test_killed_between_the_renames_says_where_the_old_one_is(tmp_path, predictors):
    predictors.save(tmp_path / "c")
    os.replace(tmp_path / "c", tmp_path / ".replaced-c")  # what a kill at the worst moment leaves
    with pytest.raises(CalibrationError, match="interrupted overwrite"):
        PredictorSet.load(tmp_path / "c")
    predictors.save(tmp_path / "c", overwrite=True)
    PredictorSet.load(tmp_path / "c")


def test_fingerprint_follows_weights_not_adapters_or_types():
    from peft import LoraConfig, get_peft_model

    model = build().bfloat16().float()
    plain = model_fingerprint(model)
    assert model_fingerprint(build().bfloat16()) == plain
    adapters = LoraConfig(r=2, target_modules=["q_proj", "lm_head", "embed_tokens"])
    wrapped = get_peft_model(build().bfloat16().float(), adapters)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.normal_()
    assert model_fingerprint(wrapped) == plain
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    changed = model_fingerprint(model)
    assert changed["linear"] != plain["linear"]
    assert changed["embeddings_and_norms"] == plain["embeddings_and_norms"]
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # type: ignore[operator]
    assert model_fingerprint(model)["embeddings_and_norms"] != plain["embeddings_and_norms"]


def test_modules_to_save_count_as_adapters():
    from peft import LoraConfig, get_peft_model

    plain = model_fingerprint(build())
    wrapped = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert model_fingerprint(wrapped) == plain
