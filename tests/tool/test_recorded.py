"""Options that are not given: what the run, the calibration or the study on the command line says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lemo.cli import build_parser, main
from lemo.cli.evaluate import _take_recorded
from lemo.cli.finetune import _settings
from lemo.storage import content_digest
from lemo.training.finetune import finetune as train
from transformers import LlamaForCausalLM


@pytest.fixture(scope="module")
def trained(model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recorded") / "run"
    command = ["finetune", "--model", str(model_folder), "--data", str(text_folder), "--context", "64", "--quiet"]
    assert main([*command, "--block-size", "8", "--steps", "1", "--warmup", "0", "--lr", "1", "--out", str(out)]) == 0
    return out


@pytest.fixture
def like(trained: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the run that says it was trained otherwise."""

    def copy(name: str, inputs: dict[str, Any] | None = None, **settings: Any) -> Path:
        folder = shutil.copytree(trained, tmp_path / name)
        saved = json.loads((folder / "run.json").read_text())
        saved["settings"].update(settings)
        saved["inputs"].update(inputs or {})
        (folder / "run.json").write_text(json.dumps(saved))
        return folder

    return copy


@pytest.fixture
def evaluate(model_folder: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """(result, what was said) of adapters of the model on the text; the result is None if it was refused."""

    def call(*adapters: Path, options: str = "") -> tuple[Any, str]:
        command = ["evaluate", "--model", str(model_folder), "--data", str(text_folder / "d0[0-3].txt")]
        command += ["--adapter", *map(str, adapters), "--json", "-", "--quiet", *options.split()]
        code, said = main(command), capsys.readouterr()
        assert code in (0, 2), said.err
        return (json.loads(said.out) if code == 0 else None), said.err

    return call


def test_evaluate_takes_the_context_of_the_run(
    trained: Path, evaluate: Any, text_folder: Path, like: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, said = evaluate(trained / "adapter")
    assert found["context"] == 64 and f"--context 64: as {trained} was trained" in said
    other, said = evaluate(trained / "adapter", options="--context 16")
    assert other["context"] == 16 and "as " not in said
    assert main(["evaluate", str(trained), "--data", str(text_folder / "d0[0-3].txt"), "--json", "-", "--quiet"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"] == found["rows"] and f"--context 64: as {trained} was trained" in said.err

    # A checkpoint of a run; and an adapter that lies elsewhere, of which nothing is known.
    assert evaluate(like("other", context=32) / "checkpoint-1")[0]["context"] == 32
    elsewhere = shutil.copytree(trained / "adapter", tmp_path / "elsewhere")
    found, said = evaluate(elsewhere)
    assert found["context"] == 256 and "--context 256: the model has no more positions" in said

    found, said = evaluate(trained / "adapter", like("shorter", context=32) / "adapter")
    assert found is None and "differ in --context" in said
    assert f"{trained}: 64" in said and "shorter: 32" in said and "give --context" in said
    assert evaluate(trained / "adapter", tmp_path / "shorter" / "adapter", options="--context 16")[0]["context"] == 16


def test_tasks_take_the_context_of_the_run_as_their_length(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(trained), "--tasks", "all", "--quiet"]) == 2
    assert f"--lengths 64: as {trained} was trained" in capsys.readouterr().err


def test_a_model_that_is_gone_or_was_exchanged_since(
    trained: Path, like: Any, new_model: Any, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run names has to be what it was trained on: an adapter on other weights would be measured in silence."""

    def evaluate(*arguments: object) -> tuple[bool, str]:
        command = ["--data", str(text_folder / "d0[0-3].txt"), "--context", "64", "--json", "-", "--quiet"]
        return main(["evaluate", *map(str, arguments), *command]) == 0, capsys.readouterr().err

    place = tmp_path / "base"
    run = like("run", {"model": str(place)})
    for given in (("--adapter", run / "adapter"), (run,)):
        done, said = evaluate(*given)
        assert not done and f"--model {place}: no such folder. {run / 'run.json'} names it: if the model lies" in said

    new_model(place)
    assert evaluate(run) == (True, f"--model {place}: as {run / 'run.json'} names it\n")
    model: Any = LlamaForCausalLM.from_pretrained(place)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    model.save_pretrained(place)
    done, said = evaluate(run)
    assert not done and f"{run} was trained on another model than --model {place} is (weights (linear) differ)" in said
    assert "the model was exchanged. Give --model" in said
    done, said = evaluate(run, "--model", place)
    assert done and "WARNING" in said and f"{run} was trained on another model than --model {place}" in said
    shutil.copytree(run / "adapter", tmp_path / "elsewhere")  # of which nothing is known
    assert "WARNING" not in evaluate("--model", place, "--adapter", tmp_path / "elsewhere")[1]

    saved = json.loads((run / "run.json").read_text())
    unknown: list[Any] = [None, "x", {}]  # an earlier lemo, or damage
    for fingerprint in unknown:
        (run / "run.json").write_text(json.dumps(saved | {"model_fingerprint": fingerprint}))
        assert evaluate(run)[0]


def test_evaluate_takes_the_model_of_the_adapters(
    trained: Path, like: Any, model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """As the run says, else as PEFT wrote it; the same folder, however it is named."""

    def evaluate(*arguments: object) -> tuple[Any, str]:
        command = ["--data", str(text_folder / "d0[0-3].txt"), "--context", "64", "--json", "-", "--quiet"]
        code, said = main(["evaluate", *map(str, arguments), *command]), capsys.readouterr()
        return (json.loads(said.out) if code == 0 else None), said.err

    expected = evaluate("--model", model_folder, "--adapter", trained / "adapter")[0]["rows"]
    found, said = evaluate("--adapter", trained / "adapter")
    assert found["rows"] == expected and f"--model {model_folder}: as {trained / 'run.json'} names it" in said
    assert evaluate("--adapter", trained / "checkpoint-1")[0]["rows"][1]["perplexity"] == expected[1]["perplexity"]
    found, said = evaluate(trained)
    assert found["rows"] == expected and f"{trained / 'run.json'} names it" in said

    elsewhere = shutil.copytree(trained / "adapter", tmp_path / "elsewhere")
    found, said = evaluate("--adapter", f"run={elsewhere}")
    assert found["rows"] == expected and f"as {elsewhere / 'adapter_config.json'} names it" in said
    (tmp_path / "link").symlink_to(model_folder)
    linked = like("linked", {"model": str(tmp_path / "link")})
    assert len(evaluate("--adapter", trained / "adapter", linked / "adapter")[0]["rows"]) == 3

    other = like("other", {"model": "/nowhere/else"})
    found, said = evaluate("--adapter", trained / "adapter", other / "adapter")
    assert found is None and "different models" in said and "give --model" in said
    assert f"{other / 'run.json'}: /nowhere/else" in said and f"{trained / 'run.json'}: {model_folder}" in said
    assert len(evaluate(trained, "--adapter", other / "adapter")[0]["rows"]) == 3  # the run folder decides
    unnamed = like("unnamed", {"model": None})
    assert evaluate("--adapter", unnamed / "adapter")[0]["rows"][0] == expected[0]
    path = elsewhere / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    found, said = evaluate("--adapter", elsewhere)
    assert found is None and f"{elsewhere} does not name the model" in said and "give --model" in said
    assert "no adapter_config.json" in evaluate("--adapter", tmp_path / "nowhere")[1]
    assert "--model" in evaluate()[1]


@pytest.mark.parametrize("command", ["evaluate", "report", "finetune --resume --out"])
def test_a_part_of_a_run_is_not_a_run(command: str, trained: Path, capsys: Any) -> None:
    for part in ("adapter", "checkpoint-1"):
        assert main([*command.split(), str(trained / part)]) == 2
        assert f"did you mean {trained}?" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["evaluate FOLDER", "evaluate --adapter FOLDER", "info FOLDER", "report FOLDER"])
def test_a_folder_around_an_adapter_is_not_one(given: str, trained: Path, tmp_path: Path, capsys: Any) -> None:
    """Whether the run is whole or its run.json is gone, what is meant is named."""
    gone = shutil.copytree(trained, tmp_path / "gone")
    (gone / "run.json").unlink()
    folders = (gone, trained) if "--adapter" in given else (gone,)
    for folder in folders:
        assert main([str(folder) if word == "FOLDER" else word for word in given.split()]) == 2
        assert str(folder / "adapter") in capsys.readouterr().err
    if given == "evaluate FOLDER":  # an adapter alone is no run either
        assert main(["evaluate", str(gone / "adapter")]) == 2
        assert f"lemo evaluate --adapter {gone / 'adapter'}" in capsys.readouterr().err


def test_evaluate_takes_the_positions_of_the_run(trained: Path, like: Any, evaluate: Any) -> None:
    """Stretched to 512, twice those of the model, whatever the context of the evaluation; or not."""
    stretched = like("stretched", {"interpolate_positions": True}, context=512) / "adapter"
    plain, far = evaluate(trained / "adapter"), evaluate(stretched, options="--context 64")
    whole, said = evaluate(stretched)
    assert whole["context"] == 512 and "--context 512: as " in said
    taken = f"positions stretched to 512 tokens: as {stretched.parent} was trained"
    assert taken in said and taken in far[1] and "positions" not in plain[1]
    assert far[0]["context"] == plain[0]["context"] == 64
    assert far[0]["rows"][0]["perplexity"] != plain[0]["rows"][0]["perplexity"]
    assert "stretched positions to 512" in evaluate(stretched, options="--context 1024")[1]
    said = evaluate(stretched, trained / "adapter", options="--context 64")[1]
    assert "stretched to 512 tokens" in said and f"{trained}: not stretched" in said and "separate calls" in said
    both, said = evaluate(stretched, trained / "adapter", options="--context 64 --interpolate-positions")
    assert taken in said  # only those that stretched them
    both = both["rows"]
    assert [row["model"] for row in both] == ["base", "stretched", "run"] and both[0] == far[0]["rows"][0]
    # The model has as many positions: there was nothing to stretch.
    same = like("same", {"interpolate_positions": True}) / "adapter"
    assert evaluate(same)[0]["rows"][0]["perplexity"] == plain[0]["rows"][0]["perplexity"]


def test_evaluate_takes_tokenizer_and_dtype_of_the_run(
    trained: Path, like: Any, evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = like("gone", {"tokenizer": str(tmp_path / "nowhere")}) / "adapter"
    found, said = evaluate(gone)
    assert found is None and f"--tokenizer {tmp_path / 'nowhere'}: cannot be loaded" in said
    found, said = evaluate(gone, trained / "adapter")
    assert found is None and "differ in --tokenizer" in said and "give --tokenizer" in said
    assert f"{trained}: the default" in said

    other = like("other", {"dtype": "float16", "answers_only": True}) / "adapter"
    found, said = evaluate(other)
    assert "--answers-only; --data is read without" in said and "float16" not in said  # the CPU has float32 alone
    assert found["rows"][0] == evaluate(trained / "adapter")[0]["rows"][0]
    args = build_parser().parse_args(["evaluate", "--model", "none", "--adapter", str(other)])
    monkeypatch.setattr("lemo.cli.evaluate.device_of", lambda name: torch.device("cuda"))
    _take_recorded(args)
    assert args.dtype == "float16"


def test_a_damaged_record_is_named_and_what_to_do(like: Any, evaluate: Any, tmp_path: Path) -> None:
    """What an adapter's run did not tell may not be guessed: positions could be stretched."""
    names = like("names", {"tokenizer": ["a", "b"]})
    cut = like("cut")
    (cut / "run.json").write_text((cut / "run.json").read_text()[:100])
    later = like("later", of_a_later_lemo=1)
    for folder, text in ((names, "not names"), (cut, "not JSON"), (later, "of_a_later_lemo")):
        found, said = evaluate(folder / "adapter", options="--context 64")
        assert found is None and f"{folder / 'run.json'}" in said and text in said
        assert "copy it out of the run folder" in said
        copied = shutil.copytree(folder / "adapter", tmp_path / f"{folder.name}-adapter")
        assert evaluate(copied, options="--context 64")[0] is not None


@pytest.fixture
def calibration(calibration_folder: Path, tmp_path: Path) -> Path:
    """For windows of 64 tokens and blocks of 8, of which 0.25 are kept."""
    folder = shutil.copytree(calibration_folder, tmp_path / "calibration")
    config = json.loads((folder / "lemo_config.json").read_text())
    config["report"]["keep"] = 0.25
    write_calibration(folder, config)
    return folder


def write_calibration(folder: Path, config: dict[str, Any]) -> None:
    """With the digest of what is written."""
    values = config | {"digest": content_digest(config)}
    (folder / "lemo_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("command", ["estimate", "profile --modes dense", "finetune --data TEXT --out OUT --dense"])
def test_a_calibration_with_other_numbers_is_named(
    command: str, calibration: Path, model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """Also by commands that read no predictors, which would take the numbers as they are."""
    path = calibration / "lemo_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"context": 128}))
    words = command.replace("TEXT", str(text_folder)).replace("OUT", str(tmp_path / "out")).split()
    for given in ([], ["--context", "64"]):
        assert main([*words, "--model", str(model_folder), "--calibration", str(calibration), *given]) == 2
        said = capsys.readouterr()
        assert f"{path} is not what was written" in said.err and "128" not in said.err and said.out == ""


def test_a_run_is_of_the_calibration(calibration: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--model", str(model_folder), "--calibration", str(calibration)]

    def run(*options: str) -> tuple[tuple[int, int, float], str]:
        made = _settings(build_parser().parse_args(["finetune", "--out", "none", "--data", "none", *common, *options]))
        said = capsys.readouterr().err.partition(": as ")[0]
        if "--memory-budget" not in options:
            assert main(["estimate", *common, "--json", *options]) == 0
            found = json.loads(capsys.readouterr().out)
            keeps = [1.0 if phase.keep is None else phase.keep for phase in made.phases()]
            assert found["tokens"] == made.context and [p["keep"] for p in found["phases"]] == keeps
        return (made.context, made.block_size, made.keep), said

    assert run() == ((64, 8, 0.25), "--context 64, --block-size 8, --keep 0.25")
    assert run("--context", "128", "--keep", "0.3") == ((128, 8, 0.3), "--block-size 8")
    assert run("--context", "128", "--keep", "0.3", "--block-size", "16") == ((128, 16, 0.3), "")
    # What the schedule says, or what no predictor chooses, is not the calibration's to decide.
    assert run("--schedule", "skip:0.4,dense")[0] == (64, 8, 0.5)
    assert run("--policy", "random")[0] == (64, 8, 0.5)
    assert run("--schedule", "low-memory")[0] == (64, 8, 0.25)


def test_a_calibration_without_layers_is_named(calibration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = calibration / "lemo_config.json"
    config = json.loads(path.read_text())
    del config["report"]["keep"]
    path.write_text(json.dumps(config | {"sizes": [], "thresholds": [], "keep": []}))
    assert main(["estimate", "--model", "none", "--calibration", str(calibration)]) == 2
    assert f"{path}: there are no layers in it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --data TEXT --no-base --adapter ADAPTER",
        "calibrate --data TEXT --joined --block-size 8 --steps 1 --out OUT",
        "finetune --data TEXT --dense --steps 1 --out OUT",
        "profile --no-peer --modes dense --steps 1",
        "sweep --data TEXT --rows dense --seeds 1 --steps 1 --held-out 0.4 --plan --out OUT",
    ],
)
def test_a_context_that_nobody_gave_is_one_that_the_model_has(
    command: str, trained: Path, model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    adapter = shutil.copytree(trained / "adapter", tmp_path / "elsewhere")
    places = {"TEXT": text_folder, "OUT": tmp_path / "out", "ADAPTER": adapter}
    words = [str(places.get(word, word)) for word in command.split()]
    words += ["--model", str(model_folder), "--quiet"]
    assert main([*words, "--context", "512"]) == 2
    assert "--context 512 exceeds the model's 256 positions" in capsys.readouterr().err
    assert main(words) == 0
    assert capsys.readouterr().err.count("--context 256: the model has no more positions") == 1


def test_lengths_that_nobody_gave_are_ones_that_the_model_has(model_folder: Path, capsys: Any) -> None:
    words = ["evaluate", "--model", str(model_folder), "--tasks", "all"]
    main(words)  # the tiny model's tokenizer has no numbers to ask for
    said = capsys.readouterr().err
    assert said.count("--lengths 256: the model has no more positions") == 1 and "exceeds" not in said
    assert main([*words, "--lengths", "4K"]) == 2 and "exceeds" in capsys.readouterr().err


def test_stretched_positions_keep_the_usual_context(
    model_folder: Path, text_folder: Path, new_model: Any, tmp_path: Path, capsys: Any
) -> None:
    """They were asked for; and a model with more positions than that is not trained on all of them."""
    long = new_model(tmp_path / "long", positions=8192)
    for model, *options in ((model_folder, "--interpolate-positions"), (long,)):
        words = ["finetune", "--model", str(model), "--data", str(text_folder), "--out", "none", *options]
        assert _settings(build_parser().parse_args(words)).context == 4096
        assert "positions" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "estimate --context 64",
        "estimate --gpu 2GiB",
        "estimate --gpu 2GiB --schedule dense",
        "profile --context 64 --modes dense",
        "finetune --data TEXT --out OUT --context 64",
        "sweep --data TEXT --out OUT --context 64 --rows dense --held-out 0.3",
        "sweep --data TEXT --out OUT --context 64 --rows dense --held-out 0.3 --plan",
    ],
)
def test_a_calibration_of_another_model_is_refused(
    command: str, calibration_folder: Path, text_folder: Path, new_model: Any, tmp_path: Path, capsys: Any
) -> None:
    """By every command that takes one, and before it has done anything else."""
    model = new_model(tmp_path / "model", layers=3, hidden=64)
    words = command.replace("TEXT", str(text_folder)).replace("OUT", str(tmp_path / "out")).split()
    assert main([*words, "--model", str(model), "--calibration", str(calibration_folder)]) == 2
    said = capsys.readouterr()
    assert "the calibration belongs to another model" in said.err and "run `lemo calibrate`" in said.err
    assert "hidden_size: calibrated for 32, the model has 64" in said.err
    assert "num_hidden_layers: calibrated for 2, the model has 3" in said.err
    assert "profiling" not in said.err and said.out == "" and not list((tmp_path / "out").glob("[!.]*"))


def test_estimate_of_a_calibration(calibration: Path, new_model: Any, tmp_path: Path, capsys: Any) -> None:
    model = str(new_model(tmp_path / "model", hidden=256))
    path = calibration / "lemo_config.json"
    config = json.loads(path.read_text())
    config["model"]["config"] |= {"hidden_size": 256, "head_dim": 64}
    write_calibration(calibration, config)
    command = ["estimate", "--model", model, "--gpu", "2GiB", "--context", "128", "--calibration"]
    assert main([*command, str(calibration), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {p["keep"] for p in found["longest"]["phases"]} == {0.25, 1.0} and found["estimate"]["tokens"] == 128
    assert main(["estimate", "--model", model, "--gpu", "2GiB", "--calibration", str(calibration), "--json"]) == 0
    alone = capsys.readouterr()
    assert json.loads(alone.out) == found["longest"] and alone.err.startswith("--block-size 8, --keep 0.25: as ")
    assert main([*command[:-3], "--calibration", str(calibration), "--schedule", "skip", "--json"]) == 0
    assert [p["keep"] for p in json.loads(capsys.readouterr().out)["phases"]] == [0.25]
    assert main([*command, str(tmp_path / "later")]) == 0
    assert "later does not exist yet: --block-size and --keep are the defaults" in capsys.readouterr().err


def test_profile_and_sweep_are_of_the_calibration(calibration: Path, new_model: Any, tmp_path: Path) -> None:
    from lemo.cli import profile, sweep

    model = str(new_model(tmp_path / "long", positions=8192))

    common = ["--model", "none", "--calibration", str(calibration)]
    args = build_parser().parse_args(["profile", *common])
    profile._complete(args)
    assert (args.context, args.block_size, args.modes) == (64, 8, ["dense", "skip:0.25"])
    args = build_parser().parse_args(["profile", *common, "--context", "96", "--modes", "skip"])
    profile._complete(args)
    assert (args.context, args.block_size, args.modes) == (96, 8, ["skip"])
    args = build_parser().parse_args(["profile", "--model", model])
    profile._complete(args)
    assert (args.context, args.block_size, args.modes) == (4096, 64, ["dense", "skip:0.5"])

    args = build_parser().parse_args(["sweep", *common, "--data", "none", "--out", str(tmp_path / "new")])
    made = sweep._plan(args).settings
    assert (made.context, made.block_size, made.steps, made.held_out) == (64, 8, 60, 0.1)
    args = build_parser().parse_args(["sweep", "--model", model, "--data", "none", "--out", str(tmp_path / "new")])
    assert sweep._plan(args).settings.context == 4096


def test_a_resumed_run_saves_as_it_began(
    model_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The command that an interrupted run names has none of its options; runs of an earlier lemo take the defaults."""
    out, given = tmp_path / "run", []
    command = ["finetune", "--model", str(model_folder), "--data", str(text_folder), "--context", "64", "--steps", "2"]
    command += ["--held-out", "0.1", "--evaluate-every", "1", "--save-every", "1", "--keep-checkpoints", "3", "--quiet"]
    assert main([*command, "--maps", "1", "--out", str(out)]) == 0
    saving = {"save_every": 1, "keep_checkpoints": 3, "log_every": 1, "evaluate_every": 1, "maps": 1}
    assert json.loads((out / "run.json").read_text())["saving"] == saving

    real = train

    def finetune(*args: Any, **options: Any) -> Any:
        given.append({name: options[name] for name in saving})
        return real(*args, **options)

    monkeypatch.setattr("lemo.training.finetune.finetune", finetune)
    resume = ["finetune", "--out", str(out), "--resume", "--quiet"]
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoint-2")
    assert main(resume) == 0 and given.pop() == saving
    assert main([*resume, "--save-every", "2", "--log-every", "3"]) == 0
    assert given.pop() == saving | {"save_every": 2, "log_every": 3}
    assert json.loads((out / "run.json").read_text())["saving"] == saving

    run = json.loads((out / "run.json").read_text())
    for value in (0, True, "1"):
        run["saving"]["log_every"] = value
        (out / "run.json").write_text(json.dumps(run))
        assert main(resume) == 2 and f"log_every of saving is {value!r}" in capsys.readouterr().err
    assert main([*resume, "--log-every", "1"]) == 0 and given.pop() == saving
    del run["saving"]
    (out / "run.json").write_text(json.dumps(run))
    assert main(resume) == 0
    assert given.pop() == {"save_every": 50, "keep_checkpoints": 2, "log_every": 1, "evaluate_every": 0, "maps": 8}
