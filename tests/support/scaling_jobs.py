"""What the processes of the smoke test of benchmarks/scaling.py do."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any


def smoke() -> dict[str, Any]:
    """Rows, and the results file where there is one, of every part on a tiny shape."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    scaling = importlib.import_module("scaling")

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in scaling.PARTS:
            out = Path(folder) / f"{part}.json"
            options = ["--model", "tiny", "--layers", "2", "--context", "512", "--steps", "1", "--out", str(out)]
            rows = scaling.main([part, *options])
            found[part] = rows, json.loads(out.read_text()) if out.exists() else None
    return found
