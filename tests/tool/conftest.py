"""A tiny random Llama with a tokenizer trained on the spot, and text that the tests make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.texts import WORDS, make_text


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models here are far too small for two threads to help, and waiting for each other costs most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Imports what takes seconds to import once, and then forks a fresh process for each script. The server itself computes
# nothing, so that no thread pool is there to be lost in a fork, and never imports lemo, so that a script may forbid it.
_SERVER = """
import json, os, signal, sys, traceback
import torch, peft, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
for line in sys.stdin:
    request = json.loads(line)
    children = []
    for i, environment in enumerate(request["environments"]):
        children.append(os.fork())
        if children[-1]:
            continue
        os.environ.update(environment)
        null = os.open(os.devnull, os.O_RDWR)
        said = os.open(request["said"] + (str(i) if i else ""), os.O_RDWR | os.O_CREAT)
        os.dup2(null, 0), os.dup2(said, 1), os.dup2(said, 2)
        sys.argv = ["script", *request["arguments"]]
        code = 1
        try:
            exec(request["script"], {"__name__": "__main__"})
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    codes = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        if codes[child] < 0:  # as torchrun does, so that none waits for one that was killed
            for other in set(children) - codes.keys():
                os.kill(other, signal.SIGKILL)
    print(json.dumps([codes[child] for child in children]), flush=True)
"""


@pytest.fixture(scope="session")
def run_scripts(tmp_path_factory: pytest.TempPathFactory):
    """run_scripts(environments, script, *arguments): (exit code, or minus the signal; what it printed) of separate
    processes that run at the same time, one for every dictionary of environment variables."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: the order of sums decides the last bit
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin is not None and server.stdout is not None
    stdin, stdout = server.stdin, server.stdout

    def run(environments: list[dict[str, str]], script: str, *arguments: str) -> list[tuple[int, str]]:
        said = tmp_path_factory.mktemp("script") / "said"
        request = {"script": script, "arguments": arguments, "said": str(said), "environments": environments}
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, "the server of scripts has died"
        texts = [said.with_name(said.name + (str(i) if i else "")).read_text() for i in range(len(environments))]
        return list(zip(json.loads(answer), texts, strict=True))

    yield run
    server.kill()
    server.wait()


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
