"""What goes wrong in commands: the part of the table in bad_input.py that tool/test_bad_input.py gives to `lemo`.

An entry is a name, the words of the command (a function of the test's World), and key words of the message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tool.test_bad_input import World


def change_config(folder: Path, **values: object) -> None:
    path = folder / "lemo_config.json"
    config = json.loads(path.read_text()) | values
    if config.get("digest") is None:  # as in calibrations that have none: the value itself is checked
        config.pop("digest", None)
    path.write_text(json.dumps(config))


def truncate(folder: Path, size: int) -> None:
    path = folder / "predictors.safetensors"
    path.write_bytes(path.read_bytes()[:size])


def flip(folder: Path) -> None:
    path = folder / "predictors.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate_weights(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def partly_labelled(ignored: int) -> str:
    """A record of 1000 tokens, the last of which have no labels."""
    ids = [5, 6] * 500
    return json.dumps({"input_ids": ids, "labels": ids[ignored:] + [-100] * ignored})


COMMANDS: list[tuple[str, Callable[[World], list[str]], tuple[str, ...]]] = [
    # ---- data
    ("missing file", lambda w: w.finetune(data="nowhere.txt"), ("nowhere.txt", "no such file", "hf:")),
    ("glob without files", lambda w: w.finetune(data=str(w.folder / "*.none")), ("no file matches",)),
    ("empty file", lambda w: w.finetune(data=w.file("empty.txt", "  \n")), ("empty.txt", "empty")),
    ("empty folder", lambda w: w.finetune(data=w.empty_folder()), ("holds no files",)),
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
    (
        "tokens of another width",
        lambda w: w.finetune(data=w.file("x.bin", np.arange(40, dtype=np.uint32).tobytes())),
        ("x.bin", "wider numbers than uint16", "--token-dtype uint32"),
    ),
    ("settings as data", lambda w: w.finetune(data=w.file("x.json", '{"a": 1,\n"b": 2}')), ("x.json", "keys a, b")),
    ("CSV without text", lambda w: w.finetune(data=w.file("x.csv", "a,b\n1,2\n")), ("x.csv, line 2", "--text-field")),
    ("cut compression", lambda w: w.finetune(data=w.file("x.txt.gz", b"\x1f\x8b\x08")), ("x.txt.gz", "damaged")),
    (
        "conversation without a template",
        lambda w: w.finetune(data=w.file("x.jsonl", '{"messages": [{"role": "user", "content": "a"}]}')),
        ("x.jsonl, line 1", "chat template", "--tokenizer"),
    ),
    ("answers of a text", lambda w: w.finetune("--answers-only"), ("d00.txt", "--answers-only", "conversations")),
    (
        "other tokens in records",
        lambda w: w.finetune(data=w.file("x.jsonl", '{"input_ids": [1]}\n{"input_ids": [1, 99]}')),
        ("x.jsonl, line 2", "token 99", "vocabulary of 48"),
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
    (
        "held-out part without labels",
        lambda w: w.finetune("--held-out", "0.1", data=w.file("x.jsonl", partly_labelled(900))),
        ("the held-out part", "without labels"),
    ),
    ("schedule with @ alone", lambda w: w.finetune("--schedule", "skip@,dense"), ("'skip@'", "share")),
    ("seed below 0", lambda w: w.finetune("--seed", "-1"), ("seed is -1", "0 to")),
    ("out is a file", lambda w: w.finetune("--out", w.file("x", "x"), model="/no", data="/no"), ("x is a file",)),
    ("out is not empty", lambda w: w.file("out/x", "") and w.finetune(data="/no", model="/no"), ("not empty",)),
    ("calibration out is a file", lambda w: w.calibrate("--out", w.file("x", "x")), ("x is a file", "--out")),
    (
        "calibration over something else",
        lambda w: w.file("out/x", "x") and w.calibrate("--overwrite", "--model", "/no"),
        ("not a calibration",),
    ),
    ("no such data", lambda w: w.finetune(data=""), ("data source ''", "current folder")),
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
        lambda w: w.finetune("--calibration", w.calibration(lambda f: truncate_weights(f / "predictors.safetensors"))),
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
    ("unsupported family", lambda w: w.finetune(model=w.another_model("gemma")), ("Gemma", "Llama", "OPT", "Qwen2")),
    (
        "unsupported family, before the data",
        lambda w: w.finetune(model=w.another_model("gemma"), data="nowhere.txt"),
        ("Gemma", "Llama", "OPT"),
    ),
    (
        "unsupported family, before the weights",
        lambda w: w.calibrate("--model", w.broken_model("m", lambda f: (f / "model.safetensors").unlink(), "gemma")),
        ("Gemma", "Llama", "OPT"),
    ),
    (
        "unsupported family, its memory",
        lambda w: ["estimate", "--model", w.another_model("gemma"), "--context", "64"],
        ("GemmaConfig", "'gemma'", "LlamaForCausalLM", "Qwen2ForCausalLM"),
    ),
    ("a model of no text", lambda w: w.finetune(model=w.settings_alone(model_type="vit")), ("'vit'", "not support")),
    (
        "a head of another task",
        lambda w: w.finetune(model=w.classifier()),
        ("not a complete causal language model", "lm_head"),
    ),
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
    (
        "no labels to evaluate",
        lambda w: w.evaluate(data=w.file("x.jsonl", partly_labelled(1000))),
        ("no document of x", "without labels"),
    ),
    ("no tokens to evaluate", lambda w: w.evaluate("--max-tokens", "0"), ("--max-tokens 0", "at least 2")),
    ("unknown reference", lambda w: w.evaluate("--reference", "nobody"), ("nobody", "base")),
    ("confidence 95", lambda w: w.evaluate("--confidence", "95"), ("95", "0.95")),
    ("answers to calibrate by", lambda w: w.calibrate("--answers-only"), ("--answers-only", "no labels")),
    ("one block of context", lambda w: w.calibrate("--block-size", "64"), ("two blocks",)),
    ("calibration there already", lambda w: w.file("out/x", "x") and w.calibrate(), ("--overwrite",)),
    ("info on nothing", lambda w: ["info", str(w.folder / "none")], ("no such folder",)),
    ("info on a strange folder", lambda w: ["info", str(w.text)], ("neither a calibration",)),
    ("bad calibration", lambda w: w.file("c/lemo_config.json", "{") and ["info", f"{w.folder}/c"], ("again",)),
    ("report on no run", lambda w: ["report", str(w.folder)], ("run.json",)),
    ("estimate of nothing", lambda w: ["estimate", "--model", "/nowhere/x", "--context", "64"], ("/nowhere/x",)),
]  # fmt: skip
