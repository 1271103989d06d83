"""benchmarks/tile_loss.py on a tiny model: every limit and policy, against the exact loss."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import base


@pytest.fixture
def script(module: Callable[[str], Any]) -> Any:
    return module("tile_loss")


def test_every_setting_is_compared_with_the_exact_loss(script: Any, monkeypatch: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    base("llama", max_position_embeddings=1024).save_pretrained(folder)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda path: None)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 80, (1024,), generator=generator) for _ in range(2)]
    monkeypatch.setattr(script, "texts", lambda tokenizer, context, count: iter(ids[:count]))
    out = tmp_path / "loss.json"
    monkeypatch.setattr(sys, "argv", ["benchmarks/tile_loss.py"])
    common = ["--model", str(folder), "--context", "1024"]
    policies = ["probe", "probe, mean, 2 rows", "recent"]
    limits = ["density=0.5", "keys=640", "mass=0.85"]
    some = ["--limit", *limits, "--policy", *policies]
    assert script.main([*common, "--documents", "2", "--out", str(out), *some]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["limit"], row["policy"]) for row in rows[1:]] == [
        (limit, policy)
        for limit in limits
        for policy in policies
        if (limit, policy) != ("mass=0.85", "recent")  # the nearest tiles know no mass
    ]
    assert rows[0]["excess"] == 0.0 and rows[0]["computed"] == 1.0
    assert sum(row["computed"] < 1 for row in rows) >= 6  # evenly spread attention: most of the mass is all tiles
    for row in rows[1:]:
        assert 0 < row["computed"] <= 1 and row["excess"] == pytest.approx(row["loss"] - rows[0]["loss"])
        assert (row["excess"] != 0) == (row["computed"] < 1)
        default = next(r for r in rows if (r["limit"], r["policy"]) == (row["limit"], "probe"))
        over = [a - b for a, b in zip(row["losses"], default["losses"], strict=True)]
        assert row["over_default"] == pytest.approx(sum(over) / 2)
        # t of one degree of freedom at 95 %; two documents
        assert row["over_half"] == pytest.approx(12.7062 * abs(over[0] - over[1]) / 2, rel=1e-4)
        assert (row["covered"] is None) == (row["policy"] == "recent")


def test_a_model_that_is_not_there(script: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        script.main(["--model", "/nowhere"])
    assert "smollm2.py --out" in capsys.readouterr().err
