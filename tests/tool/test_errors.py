"""What goes wrong for users: one table. Each command must fail with exit code 2, say the key words on stderr without a
traceback, print nothing on stdout, and leave the disk as it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from lemo.cli import main


@dataclass
class World:
    """Where a case finds its inputs: a folder of its own, and the session's model and text."""

    folder: Path
    model: Path
    text: Path
    good_calibration: Path

    def file(self, name: str, content: str | bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    def finetune(self, *options: str, data: str | None = None, model: str | None = None) -> list[str]:
        return [
            *("finetune", "--model", model or str(self.model), "--data", data or str(self.text)),
            *("--out", str(self.folder / "out"), "--context", "64", "--block-size", "8", "--steps", "2", *options),
        ]

    def evaluate(self, *options: str, data: str | None = None) -> list[str]:
        return ["evaluate", "--model", str(self.model), "--data", data or str(self.text), "--context", "64", *options]

    def calibrate(self, *options: str) -> list[str]:
        return [
            *("calibrate", "--model", str(self.model), "--data", str(self.text), "--context", "64"),
            *("--block-size", "8", "--out", str(self.folder / "out"), *options),
        ]

    def run_folder(self, settings: dict | None = None, **more: object) -> str:
        """A run folder that has been started with the default settings changed by these."""
        from lemo.settings import FinetuneSettings

        values = FinetuneSettings().to_json() | (settings or {})
        inputs = {"model": str(self.model), "data": [str(self.text)]}
        self.file("out/run.json", json.dumps({"settings": values, "inputs": inputs} | more))
        return str(self.folder / "out")

    def another_model(self, kind: str = "llama") -> str:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = AutoConfig.for_model(kind, vocab_size=48, num_key_value_heads=2, eos_token_id=0, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(self.folder / kind)
        AutoTokenizer.from_pretrained(self.model).save_pretrained(self.folder / kind)
        return str(self.folder / kind)

    def large_tokenizer(self) -> str:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.add_tokens([f"word{i}" for i in range(60)])
        tokenizer.save_pretrained(self.folder / "tokenizer")
        return str(self.folder / "tokenizer")

    def broken_model(self, name: str, change: Callable[[Path], None]) -> str:
        folder = self.folder / name
        shutil.copytree(self.model, folder)
        change(folder)
        return str(folder)

    def calibration(self, change: Callable[[Path], object]) -> str:
        folder = self.folder / "calibration"
        shutil.copytree(self.good_calibration, folder)
        change(folder)
        return str(folder)

    def config_with(self, **values: object) -> str:
        def change(folder: Path) -> None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | values))

        return self.broken_model("changed", change)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


Case = tuple[str, Callable[[World], list[str]], tuple[str, ...]]

CASES: list[Case] = [
    # ---- data
    ("missing file", lambda w: w.finetune(data="nowhere.txt"), ("nowhere.txt", "no such file", "hf:")),
    ("glob without files", lambda w: w.finetune(data=str(w.folder / "*.none")), ("no file matches",)),
    ("empty file", lambda w: w.finetune(data=w.file("empty.txt", "  \n")), ("empty.txt", "empty")),
    ("empty folder", lambda w: w.finetune(data=(w.folder / "e").mkdir() or str(w.folder / "e")), ("holds no files",)),
    ("binary file", lambda w: w.finetune(data=w.file("x.txt", b"\xff\xfe\x00a")), ("x.txt", "UTF-8")),
    ("broken JSONL", lambda w: w.finetune(data=w.file("x.jsonl", '{"text": "a"}\n{"text')), ("line 2", "not JSON")),
    ("other JSONL field", lambda w: w.finetune(data=w.file("x.jsonl", '{"body": "a"}')), ("'text'", "body", "--text")),
    ("JSONL text no string", lambda w: w.finetune(data=w.file("x.jsonl", '{"text": 3}')), ("line 1", "int", "string")),
    ("odd token file", lambda w: w.finetune(data=w.file("x.bin", b"abc")), ("x.bin", "3 bytes", "uint16")),
    (
        "token outside the vocabulary",
        lambda w: w.finetune(data=w.file("x.bin", np.array([1, 60000], np.uint16).tobytes())),
        ("60000", "position 1", "vocabulary of 48"),
    ),
    ("too little data", lambda w: w.finetune(data=w.file("x.txt", "the block of")), ("tokens", "one context")),
    ("held-out too small", lambda w: w.finetune("--held-out", "0.1", data=w.file("x.txt", "the")), ("empty",)),
    # ---- settings
    ("context below a block", lambda w: w.finetune("--block-size", "128"), ("context 64", "block of 128")),
    ("context beyond the model", lambda w: w.finetune("--context", "512"), ("512", "256", "--interpolate-positions")),
    ("no model", lambda w: ["finetune", "--data", str(w.text), "--out", str(w.folder / "out")], ("--model", "--help")),
    ("negative steps", lambda w: w.finetune("--steps", "-1"), ("steps", "-1")),
    ("keep beyond 1", lambda w: w.finetune("--keep", "1.5"), ("keep", "1.5", "(0, 1]")),
    ("learning rate 0", lambda w: w.finetune("--lr", "0"), ("lr", "above 0")),
    ("unknown schedule", lambda w: w.finetune("--schedule", "fast"), ("'fast'", "default", "skip")),
    ("unknown policy", lambda w: w.finetune("--policy", "magic"), ("magic", "predictors", "random")),
    ("dense and a schedule", lambda w: w.finetune("--dense", "--schedule", "skip"), ("--dense", "--schedule")),
    ("unknown lora target", lambda w: w.finetune("--lora-targets", "nothing_proj"), ("nothing_proj", "lora_targets")),
    ("predictors without calibration", lambda w: w.finetune("--policy", "predictors"), ("lemo calibrate",)),
    ("missing calibration", lambda w: w.finetune("--calibration", "nowhere"), ("nowhere", "lemo calibrate")),
    (
        "predictors missing",
        lambda w: w.finetune("--calibration", w.calibration(lambda f: (f / "predictors.safetensors").unlink())),
        ("predictors.safetensors", "missing", "calibrate"),
    ),
    (
        "predictors truncated",
        lambda w: w.finetune("--calibration", w.calibration(lambda f: truncate(f / "predictors.safetensors"))),
        ("predictors.safetensors", "truncated", "bytes"),
    ),
    (
        "calibration's settings missing",
        lambda w: w.finetune("--calibration", w.calibration(lambda f: (f / "lemo_config.json").unlink())),
        ("lemo_config.json", "missing"),
    ),
    (
        "another block size than calibrated",
        lambda w: w.finetune("--calibration", str(w.good_calibration), "--block-size", "16"),
        ("block_size is 16", "8"),
    ),
    (
        "calibration of another model",
        lambda w: w.finetune("--calibration", str(w.good_calibration), model=w.another_model()),
        ("another model", "num_hidden_layers"),
    ),
    ("unsupported family", lambda w: w.finetune(model=w.another_model("mistral")), ("Mistral", "Llama", "OPT")),
    ("no GPU", lambda w: w.finetune("--device", "cuda:99"), ("cuda:99", "--device cpu")),
    ("unknown device", lambda w: w.finetune("--device", "abacus"), ("abacus",)),
    ("float16 on the CPU", lambda w: w.finetune("--device", "cpu", "--dtype", "float16"), ("float16", "float32")),
    # ---- models
    ("missing model", lambda w: w.finetune(model="/nowhere/model"), ("/nowhere/model", "no such folder")),
    ("empty model folder", lambda w: w.finetune(model=str(w.folder)), ("no transformers model",)),
    (
        "missing weights",
        lambda w: w.finetune(model=w.broken_model("m", lambda f: (f / "model.safetensors").unlink())),
        ("weights", "model.safetensors"),
    ),
    (
        "truncated weights",
        lambda w: w.finetune(
            model=w.broken_model("m", lambda f: (f / "model.safetensors").write_bytes(b"\x10" + b"\0" * 40))
        ),
        ("weights cannot be loaded",),
    ),
    (
        "no tokenizer",
        lambda w: w.finetune(
            model=w.broken_model("m", lambda f: [p.unlink() for p in f.glob("token*")] and None)
        ),
        ("--tokenizer",),
    ),
    (
        "another model's tokenizer",
        lambda w: w.finetune("--tokenizer", w.large_tokenizer(), data=w.file("x.txt", "word59 " * 99)),
        ("vocabulary of 48", "--tokenizer"),
    ),
    (
        "weights of another shape",
        lambda w: w.finetune(model=w.config_with(vocab_size=8)),
        ("weights cannot be loaded", "shapes", "config.json"),
    ),
    # ---- run folders
    ("folder in other use", lambda w: w.file("out/notes", "mine") and w.finetune(), ("not empty", "notes")),
    ("run there already", lambda w: w.run_folder() and w.finetune(), ("a run already", "--resume")),
    ("resume without a run", lambda w: ["finetune", "--out", str(w.folder / "none"), "--resume"], ("run.json",)),
    (
        "resume with another rate",
        lambda w: ["finetune", "--out", w.run_folder(), "--resume", "--lr", "0.5"],
        ("lr", "0.5", "0.0002"),
    ),
    (
        "resume with other data",
        lambda w: ["finetune", "--out", w.run_folder(), "--resume", "--data", "elsewhere"],
        ("data", "elsewhere"),
    ),
    (
        "resume after the data changed",
        lambda w: ["finetune", "--out", w.run_folder({"context": 64, "block_size": 8}, data_sha256="?"), "--resume"],
        ("data_sha256",),
    ),
    (
        "run of another version",
        lambda w: ["finetune", "--out", w.run_folder({"magic": 1}), "--resume"],
        ("magic", "version"),
    ),
    ("damaged run.json", lambda w: w.file("out/run.json", "{") and w.finetune("--resume"), ("run.json",)),
    # ---- evaluate, calibrate, info, report
    ("not an adapter", lambda w: w.evaluate("--adapter", str(w.text)), ("adapter_config.json",)),
    ("nothing to evaluate", lambda w: w.evaluate("--no-base"), ("--no-base",)),
    ("unknown reference", lambda w: w.evaluate("--reference", "nobody"), ("nobody", "base")),
    ("confidence 95", lambda w: w.evaluate("--confidence", "95"), ("95", "0.95")),
    ("one block of context", lambda w: w.calibrate("--block-size", "64"), ("two blocks",)),
    ("calibration there already", lambda w: w.file("out/x", "x") and w.calibrate(), ("--overwrite",)),
    ("info on nothing", lambda w: ["info", str(w.folder / "none")], ("no such folder",)),
    ("info on a strange folder", lambda w: ["info", str(w.text)], ("neither a calibration",)),
    ("bad calibration", lambda w: w.file("c/lemo_config.json", "{") and ["info", f"{w.folder}/c"], ("again",)),
    ("report on no run", lambda w: ["report", str(w.folder)], ("run.json",)),
    ("estimate of nothing", lambda w: ["estimate", "--model", "/nowhere/x", "--context", "64"], ("/nowhere/x",)),
]  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(("make", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_error(
    make: Callable[[World], list[str]], words: tuple[str, ...], model_folder: Path, text_folder: Path,
    calibration_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command = make(World(tmp_path, model_folder, text_folder, calibration_folder))
    before = {**tree(tmp_path), **tree(model_folder), **tree(text_folder)}
    capsys.readouterr()
    code = main([*command, "--quiet"])
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == "" and "Traceback" not in err
    message = err.strip().splitlines()[-1]
    assert message.startswith(f"lemo {command[0]}: ")
    for word in words:
        assert word in message
    after = {**tree(tmp_path), **tree(model_folder), **tree(text_folder)}
    after.pop(str(tmp_path / "out" / ".lock"), None)
    assert after == before


def test_debug_shows_where(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        main(["info", str(tmp_path / "none"), "--debug"])


def test_unknown_options_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["finetune", "--fast"])
    assert stopped.value.code == 2
    assert "usage: lemo finetune" in capsys.readouterr().err
