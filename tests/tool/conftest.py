"""A tiny random Llama with a tokenizer trained on the spot, and text that the tests make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.scripts import Server
from support.texts import WORDS, make_text

_IMPORTS = """
import torch, peft, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models here are far too small for two threads to help, and waiting for each other costs most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_scripts(tmp_path_factory: pytest.TempPathFactory):
    """See `support.scripts.Server`. The server never imports lemo, so that a script may forbid it."""
    server = Server(_IMPORTS, lambda: tmp_path_factory.mktemp("script"))
    yield server.run
    server.close()


@pytest.fixture(scope="session")
def run_script(run_scripts):
    """run_script(script, *arguments): (exit code, or minus the signal; what it printed), in a separate process."""
    return lambda script, *arguments: run_scripts([{}], script, *arguments)[0]


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["<eos>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS) + " ."], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)


def make_model(folder: Path, *, layers: int = 2, hidden: int = 32, positions: int = 256) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=hidden,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=0,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(24):
        (folder / f"d{i:02}.txt").write_text(make_text(i, 40 + 23 * i % 150))
    return folder


@pytest.fixture(scope="session")
def jsonl_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jsonl") / "records.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": make_text(100 + i, 60)}) + "\n" for i in range(12)))
    return path


@pytest.fixture(scope="session")
def calibration_folder(model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lemo calibrate` makes for the tiny model with blocks of 8."""
    from lemo.cli import main

    out = tmp_path_factory.mktemp("calibration") / "c"
    command = ["calibrate", "--model", str(model_folder), "--data", str(text_folder), "--context", "64"]
    assert main([*command, "--block-size", "8", "--steps", "20", "--out", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(scope="session")
def new_model():
    """new_model(folder, layers=, hidden=, positions=) writes another tiny model and returns its folder."""
    return make_model
