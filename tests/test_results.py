"""Published figures: every result file says how it was made, and the pages say what the files say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_result_files_say_how_they_were_made(path: Path) -> None:
    result = json.loads(path.read_text())
    for key in ("gpu", "versions", "commit", "date", "command", "rows"):
        assert result.get(key), f"{path.name} has no {key}"
    assert result["commit"] != "unknown"
    script = result["command"].split()[1]
    assert (ROOT / script).exists() or (ROOT / "benchmarks" / script).exists(), result["command"]


def test_pages_show_what_the_files_hold() -> None:
    run = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "summary.py"), "--check"], capture_output=True)
    assert run.returncode == 0, run.stdout.decode() + "; run `python benchmarks/summary.py`"
