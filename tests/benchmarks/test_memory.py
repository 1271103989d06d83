"""The benchmark of memory on a tiny shape: estimates without a measured peak, and what is held after steps."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch


@pytest.fixture
def memory(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module("memory")


def test_the_command(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "memory-estimate-cpu.json"
    arguments = ["estimate", "--model", "tiny", "--context", "256", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/memory.py", *arguments])
    assert memory.main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) >= 8 and all(row["estimate_mib"] > 0 and "error" not in row for row in rows)
    assert {row["recompute"] for row in rows} == {"full", "attention", "none", "by budget"}
    beyond = [row | {"error": -0.06} for row in rows]
    monkeypatch.setattr(memory, "estimates", lambda base, args: beyond)
    assert memory.main() == 1


@pytest.mark.parametrize(("name", "saved"), [("dense", ("full", 0)), ("skip-0.5", ("attention", "all"))])
def test_nothing_grows_over_steps_of_varying_lengths(memory: Any, name: str, saved: tuple[str, int | str]) -> None:
    base = memory.make_base("tiny", 2)
    row = memory.growth(base, name, 256, 5, *saved)
    assert row["live_growth_bytes"] == 0 and not memory.grown(row)
    weights = sum(w.nbytes for w in base.weights.values()) / 2**20
    assert row["live_mib"] > weights and ("host_mib" in row) == (saved[1] == "all")


def test_what_is_held_counts(memory: Any) -> None:
    """A tensor that someone keeps is seen, and each storage once."""
    base = SimpleNamespace(cuda=False)
    before = memory.held(base)["live"]
    kept = [torch.zeros(1000)]
    kept.append(kept[0][:10])
    assert memory.held(base)["live"] == before + 4000


def test_lengths_begin_and_end_with_the_longest(memory: Any) -> None:
    found = memory.lengths(4096, 200)
    assert len(found) == 200 and found[0] == found[-1] == max(found) == 4096
    assert len(set(found)) > 150 and min(found) >= 512


def test_limits(memory: Any) -> None:
    row = {"live_growth_bytes": 1000, "reserved_mib": 1000.0, "reserved_growth_bytes": 19 << 20}
    assert not memory.grown(row)
    assert memory.grown(row | {"reserved_growth_bytes": 21 << 20})
    assert memory.grown(row | {"live_growth_bytes": 1 << 20})


def test_tables(memory: Any) -> None:
    pages = importlib.import_module("memory_pages")
    row = {"setting": "lemo, nothing eliminated", "context": 32768, "recompute": "attention", "offload": "all"}
    row |= {"budget": None, "estimate_mib": 20000}
    _, header, rows = pages.estimates(
        {"rows": [row, row | {"measured_mib": 19800, "error": 0.0101, "budget": "48GiB"}]}
    )
    assert rows[0] == [row["setting"], "32K", "attention, all layers offloaded", "20,000 MiB", "", ""]
    assert rows[1][2:] == ["48GiB", "20,000 MiB", "19,800 MiB", "+1.0%"] and len(header) == 6
    grown = {"row": "dense", "context": 4096, "recompute": "full", "offload": 0, "steps": 200, "live_mib": 15459.2}
    grown |= {"live_growth_bytes": 0, "reserved_mib": 20000.0, "reserved_growth_bytes": -(2 << 20)}
    title, header, rows = pages.growth({"rows": [grown]})
    assert "up to 4K tokens" in title and len(header) == len(rows[0])
    assert rows[0][2:] == ["200", "15,459 MiB", "+0.00 MiB", "20,000 MiB", "-2.00 MiB"]
    refused = {"row": "lemo", "method": "lemo", "model": "opt-350m", "context": 32768, "refused": True, "error": "no"}
    refused |= {"paper_memory_times": 1.884}
    _, header, rows = pages.paper({"rows": [refused]})
    assert rows == [["opt-350m", "32K", "lemo", "", "refused", "", "", "", "1.88 x"]] and len(header) == 9
