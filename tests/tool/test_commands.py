"""Every command end to end on a tiny random model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lemo.cli import build_parser, main
from lemo.training.adapters import adapter_name
from support.texts import make_text

COMMANDS = ("calibrate", "finetune", "evaluate", "report", "sweep", "profile", "info", "estimate")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and text.count(f"lemo {command}") >= 3
    # Only evaluate takes model options from runs.
    assert (" ".join(text.split()).count("as the adapters' runs were trained") == 3) == (command == "evaluate")


def test_lists_may_be_given_in_parts() -> None:
    """--data a --data b reads both: dropping one of them would change the run without a word."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a.choices, dict))
    seen = set()
    for name, parser in dict(commands.choices or {}).items():
        for action in (a for a in parser._actions if a.nargs == "+"):
            values = argparse.Namespace(**{action.dest: action.default})
            for value in ("1", "2"):
                action(parser, values, [value], action.option_strings[0])
            assert getattr(values, action.dest) == ["1", "2"], (name, action.dest)
            assert not action.default, (name, action.dest)
            seen.add(action.dest)
    assert seen >= {"data", "adapter", "rows", "seeds", "lr", "modes", "lora_targets", "modules_to_save"}


def test_help_needs_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import lemo.cli as c; c.build_parser()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_calibrate_then_finetune_evaluate_report_info(
    calibration_folder: Path, model_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibration = calibration_folder
    assert sorted(p.name for p in calibration.iterdir()) == ["lemo_config.json", "predictors.safetensors"]
    assert main(["info", str(calibration)]) == 0
    shown = capsys.readouterr().out
    assert "block size: 8" in shown and "threshold" in shown
    run = tmp_path / "run"
    common = ["--model", str(model_folder), "--data", str(text_folder), "--context", "64", "--quiet"]
    options = ["--block-size", "8", "--steps", "6", "--calibration", str(calibration), "--schedule", "skip@2,dense@1"]
    assert main(["finetune", *common, *options, "--out", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "adapter")
    table = tmp_path / "table.json"
    assert main(["evaluate", *common, "--adapter", str(run / "adapter"), "--json", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "perplexity" in shown and "run" in shown and "base" in shown
    rows = json.loads(table.read_text())["rows"]
    assert [r["model"] for r in rows] == ["base", "run"]
    for row in rows:
        assert row["low"] < row["perplexity"] < row["high"]
    assert rows[1]["ratio_low"] <= rows[1]["ratio"] <= rows[1]["ratio_high"]
    assert (
        main(["evaluate", *common, "--per-file", "--no-base", "--adapter", f"x={run / 'adapter'}", "--json", "-"]) == 0
    )
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 24
    pytest.importorskip("matplotlib")
    assert main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "1-4" in shown and "5-6" in shown
    assert (run / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert main(["info", str(run)]) == 0
    assert "complete" in capsys.readouterr().out
    assert main(["info", str(run / "adapter"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peft_type"] == "LORA"


def test_calibrate_for_attention_mass(
    new_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = new_model(tmp_path / "model", positions=1152)
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text(make_text(i, 1500))
    common = ["--model", str(model), "--data", str(text), "--context", "1152", "--target", "mass", "--quiet"]
    out = tmp_path / "tiles"
    assert main(["calibrate", *common, "--steps", "3", "--documents", "4", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "covered mass at density 0.5" in shown and "predictors" in shown and "probe 2" in shown
    # Nine tiles, of which three are attended to in any case.
    assert "density 0.125: documents this short leave no choice" in shown and "mass at density 0.125" not in shown
    assert sorted(p.name for p in out.iterdir()) == ["lemo_config.json", "predictors.safetensors"]
    saved = json.loads((out / "lemo_config.json").read_text())
    assert saved["target"] == "mass" and saved["block_size"] == 128 and saved["report"]["training"]["steps"] == 3
    assert set(saved["report"]["mean"]) >= {"exact", "predictors", "probe 2", "probe 4", "pooled", "recent", "random"}
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "target: mass" in shown and "covered mass at density 0.5" in shown
    assert "density 0.125: documents this short leave no choice" in shown and "mass at density 0.125" not in shown
    # What it is not for, before any step.
    run = [
        "finetune",
        *common[:6],
        "--quiet",
        "--steps",
        "1",
        "--calibration",
        str(out),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*run, "--block-size", "64", "--schedule", "skip:0.5:predictors"]) != 0
    assert "--target mass" in (shown := capsys.readouterr().err) and "--target importance" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "mass", "--keep", "0.5"], "--keep"),
        (["--target", "mass", "--normalize"], "--normalize"),
        (["--target", "mass", "--block-size", "64"], "--block-size 64"),
        (["--target", "mass", "--context", "512"], "--context 512"),
        (["--target", "mass", "--probes", "0"], "--probes 0"),
        (["--probes", "4"], "--target mass"),
        (["--documents", "1"], "--documents 1"),
        (["--keep", "0"], "--keep 0"),
        (["--context", "100"], "--context 100"),
        (["--block-size", "0"], "--context 4096"),
        (["--steps", "0"], "--steps 0"),
    ],
)
def test_calibrate_refuses_before_it_loads_anything(
    options: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["calibrate", "--model", "/nowhere", "--data", "/nowhere", "--out", str(tmp_path / "c")]
    assert main([*command, *options]) != 0
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--model", "--tokenizer", "--calibration"])
def test_names_of_folders(option: str, monkeypatch, capsys) -> None:
    """A shell leaves ~ alone in --out=~/run, and an unset variable is not a folder."""
    monkeypatch.setenv("HOME", "/somewhere")
    args = build_parser().parse_args(["finetune", "--out", "run", f"{option}=~/a b"])
    assert getattr(args, option[2:]) == "/somewhere/a b"
    assert adapter_name("x=~/run/adapter") == ("x", "/somewhere/run/adapter")
    assert adapter_name("~/run/adapter") == ("run", "/somewhere/run/adapter")
    with pytest.raises(SystemExit):
        build_parser().parse_args(["finetune", "--out", "run", option, ""])
    assert f"{option}: expected the name of a file or folder" in capsys.readouterr().err


def test_info_shows_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert "cpu" in values["native library"] and values["torch"] and "GPUs" in values
    assert {"LlamaForCausalLM", "Qwen2ForCausalLM"} <= set(values["models"])


def test_estimate(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peaks = {}
    for schedule in ("dense", "skip:0.25", "backward:0.25"):
        assert (
            main(["estimate", "--model", str(model_folder), "--context", "256", "--schedule", schedule, "--json"]) == 0
        )
        peaks[schedule] = json.loads(capsys.readouterr().out)
    assert main(["estimate", "--model", str(model_folder), "--context", "256"]) == 0
    assert "dense" in capsys.readouterr().out
    for more, modes in (([], {"sparse", "dense"}), (["--keep", "0.3"], {"skip", "dense"})):
        assert main(["estimate", "--model", str(model_folder), "--context", "32768", "--json", *more]) == 0
        assert {p["mode"] for p in json.loads(capsys.readouterr().out)["phases"]} == modes
    predicted = "sparse:0.25:tile_policy=predictors"  # no option names a calibration
    assert main(["estimate", "--model", str(model_folder), "--context", "256", "--schedule", predicted]) == 0
    assert "sparse" in capsys.readouterr().out
    assert main(["estimate", "--model", "/nowhere", "--context", "256", "--schedule", "sparse", "--keep", "0.3"]) != 0


def test_without_a_schedule_it_depends_on_whether_positions_are_stretched(
    new_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lemo.cli import build_parser
    from lemo.cli.finetune import _settings

    def schedules(positions: int, *options: str) -> tuple[str, list[tuple[str, int]]]:
        """What a run takes, and mode and tokens of the estimate's phases."""
        model = tmp_path / str(positions)
        if not model.exists():
            new_model(model, positions=positions)
        common = ["--model", str(model), "--context", "32768", *options]
        args = build_parser().parse_args(["finetune", "--out", "none", "--data", "none", *common])
        assert main(["estimate", *common, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return _settings(args).schedule, [(p["mode"], p["tokens"]) for p in found["phases"]]

    stretched, plain = ([("dense", tokens), ("sparse", 32768)] for tokens in (4096, 8192))
    assert schedules(256, "--interpolate-positions") == ("extension", stretched)
    assert schedules(32768, "--interpolate-positions") == ("long-context", plain)  # nothing to stretch
    assert schedules(32768) == ("long-context", plain)
    args = ["finetune", "--out", "none", "--data", "none", "--model", str(tmp_path / "256"), "--context", "32768"]
    for more in ([], ["--interpolate-positions"]):  # an answer stays with the rest of its document
        settings = _settings(build_parser().parse_args([*args, "--answers-only", *more]))
        assert settings.schedule == "whole-documents" and settings.window_lengths() == [32768, 32768]
    assert schedules(256, "--interpolate-positions", "--keep", "0.5")[0] == "default"
    assert schedules(256, "--interpolate-positions", "--dense")[0] == "dense"


def test_estimate_of_shorter_windows(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A phase has the memory of its windows: of a run with so short a context."""

    def of(context: int, schedule: str) -> dict[str, Any]:
        command = ["estimate", "--model", str(model_folder), "--context", str(context), "--schedule", schedule]
        assert main([*command, "--batch", "2", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = of(1024, "sparse:0.5:window=1/4@0.7,skip:0.5:window=1/2,dense@0.3")
    assert found["tokens"] == 2048 and [p["tokens"] for p in found["phases"]] == [512, 1024, 2048]
    for phase, context, alone in zip(
        found["phases"], (256, 512, 1024), ("sparse:0.5", "skip:0.5", "dense"), strict=True
    ):
        assert of(context, alone)["phases"] == [phase]
    assert found["peak"] == found["phases"][2]["peak"] > found["phases"][0]["peak"]

    command = ["estimate", "--model", str(model_folder), "--context", "1024", "--schedule"]
    assert main([*command, "dense:window=1/4,dense"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[2] == "tokens" and [line.split()[2] for line in lines[2:4]] == ["256", "1024"]
    assert main([*command, "dense"]) == 0 and "tokens " not in capsys.readouterr().out.splitlines()[1]
    assert main([*command, "dense:window=1/32,dense"]) == 0  # whose blocks are not chosen
    assert main([*command, "skip:window=1/32,dense"]) == 2
    assert "expected windows of at least one block of 64 tokens" in capsys.readouterr().err


def test_the_longest_context_of_shorter_windows(new_model: Any, tmp_path: Path, capsys: Any) -> None:
    model = str(new_model(tmp_path / "model", hidden=256))
    schedule = "dense,dense:window=1/4,sparse:keys=8192:keep=0.5:window=1/2"
    assert main(["estimate", "--model", model, "--gpu", "2GiB", "--schedule", schedule, "--json"]) == 0
    whole, quarter, half = json.loads(capsys.readouterr().out)["phases"]
    assert [p["window"] for p in (whole, quarter, half)] == [1.0, 0.25, 0.5]
    for name in ("context", "context_offload", "context_again"):
        assert 4 * whole[name] <= quarter[name] < 4 * (whole[name] + 1024)
    assert main(["estimate", "--model", model, "--gpu", "2GiB", "--schedule", schedule]) == 0
    _, head, *rows = capsys.readouterr().out.splitlines()
    assert rows[1].startswith("dense window=0.25 ") and rows[2].startswith("sparse keep 0.5 keys=8192 window=0.5 ")
    assert len({len(line) for line in (head, *rows[:3])}) == 1  # one table, however long the names


def test_the_longest_context(new_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(new_model(tmp_path / "model", hidden=256))  # heads of 64
    assert main(["estimate", "--model", model, "--gpu", "2GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["mode"] for row in found["phases"]] == ["dense", "backward", "skip", "sparse", "sparse"]
    assert all(0 < row["context"] <= row["context_offload"] and row["host"] > 0 for row in found["phases"])
    assert main(["estimate", "--model", model, "--gpu", "h100", "--schedule", "skip:0.25", "--context", "256"]) == 0
    text = capsys.readouterr().out
    assert "fits 79.10 GiB" in text and "skip keep 0.25" in text and "256 tokens, recompute full" in text


def test_exact_scores_that_cuda_lacks_are_refused_before_weights_are_read() -> None:
    import torch
    from lemo.cli.common import check_supported
    from lemo.engine.families import UnsupportedModelError
    from transformers import MistralConfig

    config, cuda = MistralConfig(num_hidden_layers=1, sliding_window=64), torch.device("cuda")
    check_supported(config, cuda)
    check_supported(config, cuda, scored=64)
    check_supported(config, scored=65)
    with pytest.raises(UnsupportedModelError, match="a sliding window of 64 in documents of 65 tokens on CUDA"):
        check_supported(config, cuda, scored=65)


def test_estimate_with_a_budget(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["estimate", "--model", str(model_folder), "--context", "256", "--offload", "1"]
    assert main([*command, "--memory-budget", "1GiB"]) == 0
    assert (
        "recompute by budget" in (text := capsys.readouterr().out) and "layers: 1 attention, 1 none; rows of 1" in text
    )
    assert main([*command, "--memory-budget", "1KiB", "--schedule", "skip:0.25,dense"]) == 2
    said = capsys.readouterr().err
    assert "mode 'skip' keep 0.25 with 256 tokens needs at least" in said
    assert "mode 'dense' keep 1 with 256 tokens needs at least" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "--context"),
        (["--gpu", "h1000"], "'h1000' is neither a size like 80GiB"),
        (["--gpu", "0GiB"], "at least 1GiB; got '0GiB'\n"),
        (["--gpu", "80"], "got '80' (a number without a unit like GiB is bytes)"),
        (["--gpu", "h100", "--offload", "all", "--lora-dropout", "0.1"], "--offload, --lora-dropout: no effect"),
        (["--context", "64", "--block-size", "65"], "context 64 is shorter than one block of 65 tokens"),
        (["--context", "64", "--dense", "--schedule", "skip"], "contradict each other"),
        (["--context", "64", "--lora-targets", "nowhere"], "lora_targets ['nowhere']"),
        (["--context", "64", "--offload", "99"], "the model has 2 layers; got 99"),
        (["--context", "64", "--offload", "99", "--memory-budget", "1GiB"], "the model has 2 layers; got 99"),
        (
            ["--context", "64", "--recompute-layers", "2"],
            "the model has 2 layers; got 2, a single segment, and the last never runs again: give True",
        ),
        (["--gpu", "h100", "--interpolate-positions"], "--interpolate-positions: no effect"),
        (["--context", "64", "--memory-budget", "1GiB", "--recompute", "full"], 'leave recompute at "auto"'),
    ],
)
def test_estimate_refuses(model_folder: Path, options: list[str], expected: str, capsys: Any) -> None:
    assert main(["estimate", "--model", str(model_folder), *options]) == 2
    assert expected in capsys.readouterr().err


# Options of lemo finetune that do not change the memory of a step, as far as an estimate knows (it does not know what
# CUDA graphs keep for themselves).
NO_MEMORY = {
    *("out", "resume", "debug", "quiet", "device", "tokenizer"),
    *("data", "text_field", "answers_only", "token_dtype", "special_tokens_in_text", "joined", "held_out"),
    *("steps", "accumulate", "seed", "lr", "lr_schedule", "warmup", "weight_decay", "max_grad_norm"),
    *("lora_alpha", "rslora", "save_every", "keep_checkpoints", "log_every", "evaluate_every", "maps", "cuda_graphs"),
}


def test_estimate_has_every_option_of_a_run_that_decides_its_memory() -> None:
    from lemo.cli import build_parser

    (commands,) = (a for a in build_parser()._actions if isinstance(a.choices, dict))
    options = {name: {a.dest: a for a in parser._actions} for name, parser in commands.choices.items()}
    run, estimate = options["finetune"], options["estimate"]
    assert run.keys() - estimate.keys() == NO_MEMORY - {"debug", "quiet"}
    for name in run.keys() & estimate.keys() - {"context"}:
        assert (run[name].type, run[name].nargs, run[name].choices) == (
            estimate[name].type,
            estimate[name].nargs,
            estimate[name].choices,
        ), name


@pytest.mark.parametrize(
    "options",
    [
        "--block-size 8 --schedule skip:0.25:random,dense",
        "--lora-rank 4 --lora-targets all-linear --batch 2",
        "--recompute none --dora --lora-targets q_proj down_proj",
        "--memory-budget 1GiB --dora",
        "--memory-budget 1GiB --lora-dropout 0.1 --offload 1",
        "--modules-to-save lm_head model.norm --dense",
    ],
)
def test_an_estimate_is_the_plan_of_the_same_run(model_folder: Path, options: str, capsys: Any) -> None:
    import lemo
    import torch
    from lemo.cli import build_parser
    from lemo.cli.finetune import _settings
    from lemo.training.finetune import with_adapter
    from transformers import AutoModelForCausalLM

    common = ["--model", str(model_folder), "--context", "128", "--dtype", "float32", *options.split()]
    assert main(["estimate", *common, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    args = build_parser().parse_args(["finetune", "--out", "none", "--data", "none", *common])
    settings = _settings(args)
    torch.manual_seed(0)
    model = with_adapter(AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32), settings)
    controller = lemo.apply(model.train(), settings.lemo_config())
    for phase, row in zip(settings.phases(), found["phases"], strict=True):
        plan = controller.savings.planned(phase, (128,) * settings.batch, 4)
        expected = {name: getattr(plan, name) for name in ("weights", "saved", "working", "peak", "host", "layers")}
        assert {name: row[name] for name in expected} == expected


def test_interpolated_positions(model_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    command = ["--model", str(model_folder), "--data", str(text_folder), "--joined", "--context", "512", "--quiet"]
    assert main(["evaluate", *command, "--interpolate-positions"]) == 0
    assert main(["evaluate", *command]) == 2
