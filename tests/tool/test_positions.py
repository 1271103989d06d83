"""Adapters of stretched positions say so themselves: wherever they are copied, they are measured with those or not at
all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lemo.cli import main
from lemo.data import load_documents
from lemo.training.adapters import loaded_adapter
from lemo.training.evaluate import compare, score
from lemo.training.finetune import finetune
from lemo.training.positions import POSITIONS_FILE, Positions, check_positions, read_positions
from lemo.training.settings import FinetuneSettings
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

ROPE = {"rope_theta": 10000.0, "rope_type": "linear", "factor": 2.0}


def finetune_options(model: Path, text: Path, out: Path, *options: str) -> list[str]:
    command = ["finetune", "--model", str(model), "--data", str(text), "--joined", "--dense", "--quiet"]
    command += ["--steps", "2", "--warmup", "0", "--lr", "0.1", "--save-every", "1", "--out", str(out)]
    return [*command, "--context", "512", "--interpolate-positions", *options]


@pytest.fixture(scope="module")
def run(model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of windows of 512 tokens, twice the model's positions."""
    out = tmp_path_factory.mktemp("positions") / "run"
    assert main(finetune_options(model_folder, text_folder, out)) == 0
    return out


@pytest.fixture
def evaluate(model_folder: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """(rows, what was said) of `lemo evaluate`; the rows are None if it was refused."""

    def call(*arguments: object) -> tuple[Any, str]:
        command = ["evaluate", *map(str, arguments), "--data", str(text_folder / "d0[0-3].txt"), "--joined"]
        code, said = main([*command, "--json", "-", "--quiet"]), capsys.readouterr()
        assert code in (0, 2), said.err
        return (json.loads(said.out)["rows"] if code == 0 else None), said.err

    return call


def perplexities(rows: list[dict[str, Any]]) -> list[float]:
    return [row["perplexity"] for row in rows]


def without_record(folder: Path, to: Path) -> Path:
    """As an earlier lemo left an adapter."""
    shutil.copytree(folder, to)
    (to / POSITIONS_FILE).unlink()
    return to


def test_a_copied_adapter_is_measured_as_in_its_run_folder(
    run: Path, model_folder: Path, evaluate: Any, tmp_path: Path
) -> None:
    for part in ("adapter", "checkpoint-1", "checkpoint-2"):
        expected = perplexities(evaluate("--adapter", run / part)[0])
        elsewhere = shutil.copytree(run / part, tmp_path / part)
        rows, said = evaluate("--adapter", elsewhere)
        assert perplexities(rows) == expected
        assert f"positions stretched to 512 tokens: as {elsewhere} was trained" in said
        assert f"--context 512: as {elsewhere} was trained" in said
        assert perplexities(evaluate("--adapter", elsewhere, "--model", model_folder)[0]) == expected
    # What an earlier lemo measured, without a word.
    old = without_record(run / "adapter", tmp_path / "old")
    rows, said = evaluate("--adapter", old, "--context", "64")
    assert "stretched" not in said
    right = evaluate("--adapter", tmp_path / "adapter", "--context", "64")[0]
    assert perplexities(rows)[1] != perplexities(right)[1]
    assert "stretched positions to 512" in evaluate("--adapter", tmp_path / "adapter", "--context", "513")[1]


def test_everything_that_a_run_saves_says_so(run: Path, model_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    expected = Positions(512, 512, ROPE)
    for part in ("adapter", "checkpoint-1", "checkpoint-2"):
        assert read_positions(run / part) == expected
    # A run that began under an earlier lemo says so from where it is resumed.
    out = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoint-2")
    assert main(["finetune", "--out", str(out), "--resume", "--quiet"]) == 0
    assert read_positions(out / "adapter") == read_positions(out / "checkpoint-2") == expected
    # Nothing to stretch, nothing to say.
    plain = tmp_path / "plain"
    assert main(finetune_options(model_folder, text_folder, plain, "--context", "128")) == 0
    assert not list(plain.rglob(POSITIONS_FILE))


def test_a_run_that_is_given_a_stretched_model(
    model_folder: Path, text_folder: Path, tokenizer: Any, evaluate: Any, tmp_path: Path
) -> None:
    """In Python, as in a study of `lemo sweep`, run.json has no word of it: the adapter does. And what the guide says
    of the adapter's use in transformers gives the model that it was trained on."""
    config = AutoConfig.from_pretrained(model_folder)
    config.rope_parameters, config.max_position_embeddings = ROPE, 512
    model = AutoModelForCausalLM.from_pretrained(model_folder, config=config)
    documents = load_documents([str(text_folder)], tokenizer, joined=True)
    settings = FinetuneSettings(context=256, steps=1, warmup=0, lr=0.1, schedule="dense")
    adapter = finetune(model, documents, settings, tmp_path / "run", progress=False).adapter
    assert read_positions(adapter) == Positions(256, 512, ROPE)

    record = json.loads((adapter / POSITIONS_FILE).read_text())
    config = AutoConfig.from_pretrained(model_folder)
    config.rope_parameters = record["rope_parameters"]
    config.max_position_embeddings = record["max_position_embeddings"]
    model = AutoModelForCausalLM.from_pretrained(model_folder, config=config)
    few = load_documents([str(text_folder / "d0[0-3].txt")], tokenizer, joined=True)
    with loaded_adapter(model, str(adapter)) as wrapped:
        expected = score(wrapped, few, 256).perplexity().value
    for place in (adapter, shutil.copytree(adapter, tmp_path / "elsewhere")):
        rows, said = evaluate("--adapter", place, "--no-base", "--model", model_folder)
        assert perplexities(rows) == [expected] and "positions stretched to 512" in said
    # A model whose own configuration has them already is taken as it is.
    model.save_pretrained(tmp_path / "baked")
    shutil.copytree(model_folder, tmp_path / "baked", dirs_exist_ok=True, ignore=lambda _, names: ["config.json"])
    rows, said = evaluate("--adapter", adapter, "--no-base", "--model", tmp_path / "baked")
    assert perplexities(rows) == [expected] and "positions stretched" not in said


def test_other_positions_are_refused(
    run: Path, model_folder: Path, new_model: Any, evaluate: Any, text_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    # Models that would be stretched by another factor, or not at all.
    for positions in (128, 1024):
        other = new_model(tmp_path / str(positions), positions=positions)
        for place in (adapter, run / "adapter"):
            rows, said = evaluate("--adapter", place, "--model", other)
            assert rows is None and f"{place}: trained for positions that were stretched to 512 tokens" in said
            assert "'factor': 2.0" in said and "measure it on the model that it was trained on" in said
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    few = {"text": load_documents([str(text_folder / "d0[0-3].txt")], tokenizer)}
    with pytest.raises(ValueError, match="stretched to 512 tokens"):
        compare(model, [str(adapter)], few, 64)
    with pytest.raises(ValueError, match="stretched to 512 tokens"), loaded_adapter(model, str(adapter)):
        pass

    old = without_record(run / "adapter", tmp_path / "old")
    rows, said = evaluate("--adapter", adapter, old)
    assert perplexities(rows)[1] == perplexities(evaluate("--adapter", adapter)[0])[1]
    assert (
        f"{old}: without a record of positions, so measured on the same" in said and f"{adapter}: without" not in said
    )
    further = shutil.copytree(adapter, tmp_path / "further")
    Positions(1024, 1024, ROPE | {"factor": 4.0}).write(further)
    rows, said = evaluate("--adapter", adapter, further, "--context", "64")
    assert rows is None and "trained on different positions" in said
    assert f"{adapter}: stretched to 512" in said and f"{further}: stretched to 1024" in said


def test_records_that_are_damaged_or_of_another_run(run: Path, evaluate: Any, tmp_path: Path) -> None:
    adapter = shutil.copytree(run / "adapter", tmp_path / "adapter")
    path = adapter / POSITIONS_FILE
    text = path.read_text()
    for content, expected in (
        (text[:40], "not JSON"),
        (text.replace("2.0", "4.0"), "its own digest differs"),
        ("[]", "its own digest differs"),
    ):
        path.write_text(content)
        rows, said = evaluate("--adapter", adapter, "--context", "64")
        assert rows is None and f"{path} is damaged" in said and expected in said and "copy it again" in said

    mixed = shutil.copytree(run, tmp_path / "mixed")
    Positions(1024, 1024, ROPE | {"factor": 4.0}).write(mixed / "adapter")
    rows, said = evaluate("--adapter", mixed / "adapter", "--context", "64")
    assert rows is None and f"{mixed / 'run.json'} is of a run with a context of 512" in said
    assert "stretched to 1024" in said and "copy it out of the run folder" in said


def test_a_record_of_a_later_lemo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lemo.training.positions._FORMAT", 2)
    Positions(512, 512, ROPE).write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"another version of lemo \(format 2, this one reads 1\)"):
        read_positions(tmp_path)


def test_positions_by_kind_of_layer(tmp_path: Path) -> None:
    """As Gemma 3 has them; and names that another version of transformers adds."""
    near = {"rope_type": "default", "rope_theta": 10000.0}
    config = LlamaConfig(max_position_embeddings=512)
    config.rope_parameters = {"full_attention": ROPE, "sliding_attention": near}
    found = Positions.of(config, 256)
    assert found is not None
    found.write(tmp_path)
    assert read_positions(tmp_path) == found
    config.rope_parameters = {"full_attention": ROPE | {"partial_rotary_factor": 1.0}, "sliding_attention": near}
    check_positions(tmp_path, config)
    config.rope_parameters = {"full_attention": near, "sliding_attention": near}
    assert Positions.of(config, 256) is None
    with pytest.raises(ValueError, match="those of the model are"):
        check_positions(tmp_path, config)


def test_info_shows_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run / "adapter"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["trained for stretched positions"]
    assert found == {"context": 512, "max_position_embeddings": 512, "rope_parameters": ROPE}
