"""Commands that Ctrl-C or SIGTERM stops: what they say, leave and return."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from lemo.cli import main
from lemo.cli.interrupts import Terminated, interrupts_raise
from lemo.data import PackedWindows
from lemo.training.finetune import finetune as train

SCHEDULE = "skip:0.5:update_norm@0.5,backward:0.5:weighted@0.25,dense@0.25"
SIZES = "--context 64 --block-size 8 --steps 8 --batch 2 --warmup 2 --lr 1e-2"
OPTIONS = [*SIZES.split(" "), "--save-every", "3", "--quiet"]


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def adapter_of(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def finetune(model: Path, data: Path, out: Path, *options: str) -> int:
    return main(["finetune", "--model", str(model), "--data", str(data), "--out", str(out), *OPTIONS, *options])


@pytest.fixture
def interruptible():
    """Python's own handlers of signals: a shell that started the tests in the background has SIGINT ignored."""
    before = [
        (number, signal.signal(number, handler))
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    ]
    yield
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "a command left its handler behind"
    for number, handler in before:
        signal.signal(number, handler)


SIGNALS = pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)


@pytest.fixture(scope="module")
def finished(model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert finetune(model_folder, text_folder, out, "--schedule", SCHEDULE, "--held-out", "0.1") == 0
    return out


@pytest.mark.parametrize(
    ("number", "code", "window", "last"),
    [(signal.SIGINT, 130, 0, 0), (signal.SIGINT, 130, 9, 3), (signal.SIGTERM, 143, 9, 3)],
)
def test_an_interrupted_run_says_how_to_resume(
    finished: Path,
    model_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    capsys,
    interruptible,
    number: int,
    code: int,
    window: int,
    last: int,
) -> None:
    """The signal is raised in the thread that reads the window, so it is there before the next line of code runs."""
    out, real = tmp_path / "run", PackedWindows.__getitem__

    def read(self, i: int):
        if i == window:
            signal.raise_signal(number)
        return real(self, i)

    options = ["--schedule", SCHEDULE, "--held-out", "0.1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedWindows, "__getitem__", read)
        assert finetune(model_folder, text_folder, out, *options) == code
    word = "terminated" if number == signal.SIGTERM else "interrupted"
    assert f"lemo finetune: {word}; resume with: lemo finetune --out {out} --resume" in capsys.readouterr().err
    assert records(out)[-1]["event"] == "interrupted"
    assert [p.name for p in out.glob("checkpoint-*")] == ([f"checkpoint-{last}"] if last else [])
    assert main(["finetune", "--out", str(out), "--resume", "--quiet"]) == 0
    assert adapter_of(finished) == adapter_of(out)


def test_an_interrupted_run_names_the_phases_that_it_did_not_reach(
    model_folder: Path, text_folder: Path, tmp_path: Path, capsys, caplog, interruptible
) -> None:
    """At once, in the log, and by every command that reads the folder; once it is complete, none."""
    out, real = tmp_path / "run", PackedWindows.__getitem__

    def read(self, i: int):
        if i == 9:
            signal.raise_signal(signal.SIGINT)
        return real(self, i)

    options = ["--schedule", "skip:0.5:random:window=1/2@0.5,backward:0.5@0.25,dense@0.25"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedWindows, "__getitem__", read)
        assert finetune(model_folder, text_folder, out, *options, "--log-every", "2") == 130
    said, last = capsys.readouterr().err, records(out)[-1]
    assert last["event"] == "interrupted" and last["step"] == 3
    missed = "not reached: backward 0.5 random (steps 5-6), dense 1.0 (steps 7-8)"
    assert f"stopped after 3 of 8 steps; {missed}\n" in said
    assert not [r for r in caplog.records if "training ended" in r.message]  # it has not: it will be resumed

    assert main(["report", str(out)]) == 0 and main(["report", str(out), "--html"]) == 0
    text = capsys.readouterr().out
    table = [line.split() for line in text.splitlines()][1:4]
    assert [line[:5] for line in table[:1]] == [["skip", "0.5", "random", "window", "0.5"]]
    assert table[1:] == [
        ["backward", "0.5", "random", "5-6", "not", "reached"],
        ["dense", "1.0", "7-8", "not", "reached"],
    ]
    page = (out / "report.html").read_text()
    assert "backward 0.5 random (not reached)" in page and "dense 1.0 (not reached)" in page
    assert main(["info", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not reached"] == [
        "backward 0.5 random, steps 5-6",
        "dense 1.0, steps 7-8",
    ]

    # Complete: the last steps are not in the log, which has every third one.
    assert main(["finetune", "--out", str(out), "--resume", "--quiet", "--log-every", "3"]) == 0
    assert main(["report", str(out)]) == 0 and main(["info", str(out), "--json"]) == 0
    assert "not reached" not in capsys.readouterr().out


@SIGNALS
def test_an_interrupt_before_the_run_began(
    model_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    capsys,
    interruptible,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    word: str,
) -> None:
    monkeypatch.setattr("lemo.cli.finetune.load_data", lambda *_: signal.raise_signal(number))
    assert finetune(model_folder, text_folder, tmp_path / "run") == code
    said = capsys.readouterr().err
    assert f"{word} before the run began" in said and "--resume" not in said
    assert not (tmp_path / "run").exists()


@SIGNALS
@pytest.mark.parametrize(
    ("command", "hint"), [("sweep", "the same command continues"), ("calibrate", "does not resume: start it again")]
)
def test_an_interrupted_command_says_what_comes_next(
    model_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    capsys,
    interruptible,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    word: str,
    command: str,
    hint: str,
) -> None:
    monkeypatch.setattr(f"lemo.cli.{command}.load_data", lambda *_: signal.raise_signal(number))
    options = ["--model", str(model_folder), "--data", str(text_folder), "--context", "256", "--quiet"]
    assert main([command, *options, "--out", str(tmp_path / "out")]) == code
    said = capsys.readouterr().err
    assert f"lemo {command}: {word}; " in said and hint in said


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda number, frame: None])
def test_a_program_that_handles_termination_keeps_its_handler(interruptible, handler: Any) -> None:
    signal.signal(signal.SIGTERM, handler)
    with interrupts_raise():
        assert signal.getsignal(signal.SIGTERM) == handler
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_the_second_termination_and_that_of_a_child_end_the_process(interruptible) -> None:
    with interrupts_raise():
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Finalized:
    """An object during whose end a signal arrives."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)


@SIGNALS
def test_a_signal_that_arrives_in_a_finalizer_is_not_lost(
    interruptible, capsys, number: int, code: int, word: str
) -> None:
    """Python can raise nothing from there, and would only report what the handler raised."""
    before = sys.unraisablehook
    with pytest.raises(KeyboardInterrupt) as raised, interrupts_raise():
        Finalized(number)
        time.sleep(60)
    assert (raised.type is Terminated) == (code == 143)
    with pytest.raises(KeyboardInterrupt), interrupts_raise():  # the work ends before the signal comes again
        Finalized(number)
    assert sys.unraisablehook is before and "ignored" not in capsys.readouterr().err


def test_other_errors_in_finalizers_are_reported_as_before(interruptible, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_type))

    class Broken:
        def __del__(self) -> None:
            raise ZeroDivisionError

    with interrupts_raise():
        Broken()
    assert reported == [ZeroDivisionError]


@SIGNALS
def test_a_study_that_a_signal_stops_in_a_finalizer_continues(
    model_folder: Path, text_folder: Path, tmp_path: Path, capsys, interruptible, number: int, code: int, word: str
) -> None:
    """In the middle of its second run, which resumes; the others are not repeated."""
    out, real, get = tmp_path / "study", train, PackedWindows.__getitem__
    begun: list[tuple[Path, bool]] = []

    def read(self, i: int):
        if len(begun) == 2 and i == 1:
            Finalized(number)
        return get(self, i)

    def finetune(*args: Any, **kwargs: Any) -> Any:
        begun.append((args[3], kwargs["resume"]))
        return real(*args, **kwargs)

    command = ["sweep", "--model", str(model_folder), "--data", str(text_folder), "--context", "64", "--steps", "3"]
    command += ["--block-size", "8", "--rows", "half=skip:0.5", "--seeds", "1", "--held-out", "0.3", "--equal", "steps"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedWindows, "__getitem__", read)
        patch.setattr("lemo.study.sweep.finetune", finetune)
        assert main([*command, "--out", str(out), "--quiet"]) == code
        assert f"lemo sweep: {word}; the same command continues" in capsys.readouterr().err
        done = len(list(out.glob("runs/*/result.json")))
        assert main([*command, "--out", str(out), "--quiet"]) == 0
    assert begun[:2] == [(begun[0][0], False), (begun[1][0], False)]
    assert begun[2:] == ([(begun[1][0], True)] if done == 1 else [])
    assert len(list(out.glob("runs/*/result.json"))) == 2
