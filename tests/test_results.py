"""Published figures: every results file says how it was made, and pages and pictures show what the files hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: p.stem)
def test_results_files_say_how_they_were_made(path: Path) -> None:
    result = json.loads(path.read_text())
    for key in ("gpu", "versions", "commit", "date", "command", "rows"):
        assert result.get(key), f"{path.name} has no {key}"
    assert result["commit"] != "unknown"
    assert not result["commit"].endswith("-dirty"), "made with changes that are in no commit: run it again"
    script = Path(result["command"].split()[1]).name
    assert (ROOT / "benchmarks" / script).exists(), result["command"]
    explained = (ROOT / "benchmarks" / "README.md").read_text()
    assert f"`{path.stem.split('-')[0]}-" in explained and f"{script}" in explained, (
        f"benchmarks/README.md: {path.name}"
    )


@pytest.mark.parametrize("script", ["summary.py", "figure.py", "curves.py", "quality_pages.py"])
def test_pages_and_figure_show_what_the_files_hold(script: str) -> None:
    run = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), "--check"], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}{run.stderr}; run `python benchmarks/{script}`"
