"""What the data options of the commands do to a run, and what a run says about its data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from lemo.cli import main
from support.texts import SENTENCE, make_text

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@pytest.fixture
def chat_model(tmp_path: Path, new_model) -> Path:
    folder = new_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows = [
        [{"role": "user", "content": make_text(i, 30)}, {"role": "assistant", "content": make_text(99 + i, 20)}]
        for i in range(30)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def finetune(*options: object) -> int:
    return main(["finetune", *map(str, options), "--quiet"])


OPTIONS = "--context 32 --block-size 8 --steps 4 --batch 2 --warmup 1 --dense --save-every 2"
SIZES = OPTIONS.split(" ")


def test_answers_only_is_kept_by_the_run(chat_model: Path, chats: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from lemo.training import finetune as module

    seen: list[torch.Tensor] = []
    read = module.PackedWindows.__getitem__  # type: ignore[attr-defined]

    def remember(self, i: int) -> dict:
        item = read(self, i)
        seen.append((item["labels"] != -100).float().mean())
        return item

    monkeypatch.setattr("lemo.training.finetune.PackedWindows.__getitem__", remember)
    out = tmp_path / "run"
    command = ["--model", chat_model, "--data", chats, "--answers-only", "--held-out", "0.2", *SIZES, "--out", out]
    assert finetune(*command) == 0
    assert 0.1 < torch.stack(seen).mean() < 0.6
    err = capsys.readouterr().err
    assert "held out" in err and "whole documents" in err and "asked for 20 %" in err
    inputs = json.loads((out / "run.json").read_text())["inputs"]
    assert inputs["answers_only"] is True and inputs["token_dtype"] is None
    assert finetune("--out", out, "--resume") == 0
    assert "is complete already" in capsys.readouterr().err
    # Every token of the same conversations are other data.
    run = json.loads((out / "run.json").read_text())
    run["inputs"]["answers_only"] = None
    (out / "run.json").write_text(json.dumps(run))
    assert finetune("--out", out, "--resume") == 2
    assert "data_sha256" in capsys.readouterr().err


def test_windows_that_cut_answers_off_are_said(chat_model: Path, chats: Path, tmp_path: Path, capsys) -> None:
    common = ["--model", chat_model, "--data", chats, *(word for word in SIZES if word != "--dense")]
    parts = ["--schedule", "dense:window=1/2@0.5,dense@0.5"]
    for name, options, warned in (
        ("cut", [*parts, "--answers-only"], True),
        ("whole", ["--schedule", "whole-documents", "--answers-only"], False),
        ("text", parts, False),
    ):
        assert finetune(*common, *options, "--out", tmp_path / name) == 0
        err = capsys.readouterr().err
        assert ("the schedule trains on 16 tokens of a window of 32 at a time" in err) == warned, err
        assert ("--schedule whole-documents" in err) == warned
        # Counted, as a share may round to nothing: a short answer to a long document.
        assert bool(re.search(r"WARNING: [1-9]\d* of [1-9]\d* tokens are labels", err)) == warned


def test_padding_is_said_and_does_no_harm(model_folder: Path, tmp_path: Path, capsys) -> None:
    rows = torch.zeros(20, 128, dtype=torch.int16)
    generator = torch.Generator().manual_seed(0)
    for row in rows:
        n = int(torch.randint(5, 40, (1,), generator=generator))
        row[:n] = torch.randint(2, 20, (n,), generator=generator)
    rows.numpy().astype("<u2").tofile(tmp_path / "t.bin")
    variants: tuple[tuple[str, list[str]], ...] = (("with", []), ("without", []))
    for name, given in variants:
        model = tmp_path / name
        model.mkdir()
        for path in model_folder.iterdir():
            if name == "with" or not path.name.startswith("token"):
                (model / path.name).write_bytes(path.read_bytes())
        out = tmp_path / f"run-{name}"
        assert finetune("--model", model, "--data", tmp_path / "t.bin", *SIZES, *given, "--out", out) == 0
        err = capsys.readouterr().err
        assert "end-of-text and padding tokens" in err and "in 20 documents" in err
        losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines() if "loss" in line]
        assert len(losses) == 4 and all(torch.tensor(losses).isfinite())


def test_token_width_is_an_option(model_folder: Path, tmp_path: Path, capsys) -> None:
    torch.randint(2, 20, (500,), dtype=torch.int32).numpy().astype("<u4").tofile(tmp_path / "t.bin")
    command = [
        "evaluate",
        "--model",
        str(model_folder),
        "--data",
        str(tmp_path / "t.bin"),
        "--context",
        "32",
        "--quiet",
    ]
    assert main(command) == 2 and "--token-dtype uint32" in capsys.readouterr().err
    assert main([*command, "--token-dtype", "uint32", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0]["tokens"] == 500 - 16


def test_special_tokens_in_text_is_an_option(model_folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text(f"{SENTENCE} <eos> {SENTENCE}")
    counts = {}
    for choice in ("auto", "parse"):
        command = [
            "--data",
            str(tmp_path / "a.txt"),
            "--special-tokens-in-text",
            choice,
            "--context",
            "64",
            "--json",
            "-",
        ]
        assert main(["evaluate", "--model", str(model_folder), *command, "--quiet"]) == 0
        out, err = capsys.readouterr()
        counts[choice] = json.loads(out)["rows"][0]["tokens"]
        assert ("<eos> in 1" in err) == (choice == "auto")
    assert counts["auto"] == counts["parse"] + 2
