"""The Python examples run as they are: the loss falls, lemo takes part, and plain PEFT reads the adapter."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from lemo.data import PackedWindows, load_documents, split_held_out
from peft import PeftModel
from safetensors.torch import load_file
from support.fixtures import one_thread, own_accelerate_state
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL = EXAMPLES.parent / "demo" / "model"
CONTEXT = 256
SCRIPTS = ("trainer", "trl_chat", "own_loop")
__all__ = ["one_thread", "own_accelerate_state"]  # fixtures of every test here
CUDA = torch.cuda.is_available()  # the scripts then train there, in bfloat16


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script with arguments, as `python examples/NAME.py` would, and returns what it printed."""

    def run(name: str, *arguments: object) -> str:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def text(tmp_path):
    """A text with a pattern that a few steps are enough to learn."""
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Shelf {i}: {i * i % 97} boxes, {i % 5} of them open.\n" for i in range(700)))
    return path


def losses(output: str) -> tuple[float, float]:
    found = re.search(r"held-out loss of the dense model: ([0-9.]+) before, ([0-9.]+) after", output)
    assert found, output
    return float(found[1]), float(found[2])


def step_losses(output: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step .* loss ([0-9.]+)$", output, re.MULTILINE)]


def plain(folder: Path):
    """The dense model with the adapter, loaded by PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    base.config.use_cache = False
    return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_every_option(name, run, capsys):
    with pytest.raises(SystemExit) as end:
        run(name, "--help")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"python examples/{name}.py --model" in printed
    script = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    options = re.findall(r'add_argument\("(--[a-z-]+)"', script)
    assert len(options) >= 6
    for option in options:
        assert re.search(rf"^  {option}\b.*(\n {{8,}})?\S", printed, re.MULTILINE), option


def test_trainer(run, text, tmp_path):
    out = tmp_path / "adapter"
    arguments = ("--model", MODEL, "--data", text, "--context", CONTEXT, "--out", out, "--steps", 20, "--lr", 3e-3)
    output = run("trainer", *arguments)
    before, after = losses(output)
    assert after < 0.8 * before
    kept = [float(x) for x in re.findall(r"'lemo_kept': '?([0-9.]+)", output)]
    assert kept[0] == 0.5 and kept[-1] == 1.0
    model = plain(out)
    documents = load_documents([str(text)], AutoTokenizer.from_pretrained(MODEL), progress=False)
    windows = PackedWindows(split_held_out(documents, fraction=0.1, seed=0)[1], CONTEXT, seed=0)
    with torch.no_grad():
        values = [model(**{k: v[None] for k, v in windows[i].items()}).loss for i in range(min(8, len(windows)))]
    assert torch.stack(values).mean().item() == pytest.approx(after, abs=3e-2 if CUDA else 1e-3)


def test_trl_chat(run, tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed (the extra lemo[test] has it)")
    data, out = tmp_path / "chats.jsonl", tmp_path / "adapter"
    with data.open("w") as stream:
        for i in range(20):
            listed = " ".join(str(n) for n in range(i, i + 100))
            answer = f"They begin at {i} and end at {i + 99}."
            chat = [{"role": "user", "content": listed}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": chat}) + "\n")
    arguments = ("--model", MODEL, "--data", data, "--context", 512, "--out", out, "--steps", 10, "--lr", 3e-3)
    output = run("trl_chat", *arguments)
    before, after = losses(output)
    assert after < 0.7 * before
    kept = [float(x) for x in re.findall(r"'lemo_kept': '?([0-9.]+)", output)]
    assert kept[0] < 0.7 and kept[-1] == 1.0
    ids = torch.arange(4, 60)[None]
    model = plain(out)
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(model(ids).logits, adapted, atol=1e-2)


def test_own_loop_resumes_as_if_it_had_not_stopped(run, text, tmp_path, monkeypatch):
    common = ("--model", MODEL, "--data", text, "--context", CONTEXT, "--steps", 12, "--save-every", 5, "--lr", 3e-3)
    output = run("own_loop", *common, "--out", tmp_path / "whole")
    values = step_losses(output)
    assert len(values) == 12 and sum(values[-2:]) < sum(values[:2])
    modes = re.findall(r"^step \d+/12  (\w+) +kept ([0-9.]+)", output, re.MULTILINE)
    assert modes[0] == ("skip", "0.50") and modes[-1] == ("dense", "1.00")

    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return clip(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
        run("own_loop", *common, "--out", tmp_path / "cut")
    output = run("own_loop", *common, "--out", tmp_path / "cut", "--resume")
    assert output.startswith("step 6/12")
    assert step_losses(output) == pytest.approx(values[5:], rel=0.05 if CUDA else 0)
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert CUDA or all(torch.equal(whole[name], cut[name]) for name in whole)
    assert plain(tmp_path / "cut").peft_config["default"].r == 8
