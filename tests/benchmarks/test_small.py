"""The benchmark of small models, on a tiny shape."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def test_rows_with_and_without_graphs(
    module: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "small.json"
    arguments = ["--shape", "tiny", "--context", "128", "--only", "dense", "--steps", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/small.py", *arguments, "--out", str(out)])
    module("small").main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["row"] for row in rows] == ["transformers + PEFT", "dense", "dense, graphs"]
    assert all(row["step_ms"] > 0 for row in rows)
    assert rows[2]["graph_ratio"] == rows[1]["step_ms"] / rows[2]["step_ms"]
    assert rows[2]["error"] == "the model is not on a CUDA device" and rows[2]["replays"] == 0

    title, header, cells = module("step_pages").small({"rows": rows})
    assert "peer: transformers + PEFT" in title and len(header) == len(cells[0])
    assert [row[2] for row in cells] == ["transformers + PEFT", "lemo, dense", "lemo, dense, graphs"]
    assert cells[2][6] == f"{rows[2]['graph_ratio']:.2f} x" and cells[0][6] == cells[1][6] == ""
    refused = module("step_pages").small(
        {"rows": [{"shape": "a", "context": 8192, "row": "b", "error": "out of memory"}]}
    )
    assert refused[2] == [["a", "8K", "lemo, b", "out of memory", *[""] * 6]]
