"""The benchmark of training on a 4-bit base, on a tiny shape."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_a_tiny_base_in_four_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (make quantized runs this with it)")
    out = tmp_path / "quantized.json"
    command = [sys.executable, "benchmarks/quantized.py", "--model", "tiny", "--context", "320", "--out", str(out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["phase"] for row in rows] == ["dense", "sparse", "skip"]
    assert all(row["step_ms"] > 0 and row["context"] == 320 and "error" not in row for row in rows)
