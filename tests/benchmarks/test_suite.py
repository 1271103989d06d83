"""The list of commands in benchmarks/README.md, and running some of them on several GPUs within a time."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def suite(module: Callable[[str], ModuleType]) -> Any:
    return module("suite")


def test_the_list_names_every_command_once(suite: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = suite.listed(suite.LIST.read_text())
    names = [m.name for m in found]
    assert len(set(names)) == len(names) >= 14 and {"step-backward-h200", "memory-growth", "paper"} <= set(names)
    for m in found:
        assert (suite.ROOT / m.words[0]).is_file() and 0 < m.minutes < 30
    assert suite.main([]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + len(found) and shown[1].startswith(names[0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("    # what: 2 minutes\n\n", "a comment and a command in turn"),
        ("    # what\n    python a.py\n\n", "WHAT: N minutes"),
        ("    # what: 2 minutes\n    torchrun a.py\n\n", "a python command"),
    ],
)
def test_lists_that_cannot_be_read(suite: Any, lines: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suite.listed(f"{suite.BEGIN}\n\n{lines}")


def commands(suite: Any, of: Mapping[str, tuple[float, str]]) -> list[Any]:
    return [suite.Measurement(name, name, minutes, ("-c", code)) for name, (minutes, code) in of.items()]


def test_each_gpu_has_one_command_at_a_time(suite: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"
    of = {"short": (1, show), "long": (3, show), "broken": (2, "raise SystemExit(3)")}
    failed = suite.measure(commands(suite, of), ["0", "5"], time.monotonic() + 600, tmp_path)
    said = capsys.readouterr().out
    assert failed == ["broken"] and "broken: exit status 3" in said
    assert said.splitlines()[0] == "long: begins on GPU 0"  # the longest first
    gpus = {name: (tmp_path / f"{name}.log").read_text().strip() for name in ("short", "long")}
    assert gpus["long"] == "0" and gpus["short"] in ("0", "5")


def test_nothing_runs_beyond_the_limit(suite: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = {"endless": (0.001, "import time; time.sleep(600)"), "too long": (9, "print()")}
    failed = suite.measure(commands(suite, of), [None], time.monotonic() + 1, tmp_path)
    said = capsys.readouterr().out
    assert failed == ["endless", "too long"] and not (tmp_path / "too long.log").exists()
    assert "endless: ended at the limit" in said and "too long: not begun, for want of time (9 minutes)" in said


def test_names_that_are_not_listed(suite: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["nothing"], "there are step-saved-h200"), (["ops", "--minutes", "0"], "more than 0")):
        with pytest.raises(SystemExit):
            suite.main(words)
        assert message in capsys.readouterr().err
