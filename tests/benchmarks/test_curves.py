"""The picture of steps by context: what is drawn of results files, and the floors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def curves(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    found = module("curves")
    monkeypatch.setattr(found, "RESULTS", tmp_path)
    return found


def write(folder: Path, name: str, date: str, rows: list[dict[str, Any]], gpu: str = "NVIDIA H200") -> None:
    same = {"method": "lemo", "keep": 1.0, "keys": None, "density": None, "weighted": False, "recompute": "full"}
    same |= {"model": "llama3-8b", "peak_mib": 40960}
    text = json.dumps({"gpu": gpu, "date": date, "rows": [same | row for row in rows]})
    (folder / f"{name}.json").write_text(text)


def test_points(curves: Any, tmp_path: Path) -> None:
    """The newest of equal measurements; other GPUs, nothing recomputed and failures do not count."""
    dense: dict[str, Any] = {"mode": "dense"}
    write(tmp_path, "step-a", "2026-11-01", [dense | {"context": 16384, "step_ms": 2000.0}])
    rows = [dense | {"context": 65536, "step_ms": 12000.0}, dense | {"context": 16384, "step_ms": 1500.0}]
    rows += [dense | {"context": 32768, "step_ms": 1.0, "recompute": "none"}]
    rows += [dense | {"context": 131072, "error": "out of memory"}]
    rows += [{"mode": "skip", "keep": 0.5, "context": 65536, "step_ms": 4000.0}]  # one point is no curve
    write(tmp_path, "costs-b", "2026-11-02", rows)
    write(tmp_path, "step-c", "2026-11-03", [dense | {"context": 8192, "step_ms": 1.0}], gpu="NVIDIA H100")
    later = {"context": 262144, "step_ms": 90000.0, "recompute": "attention", "offload": "all"}
    again = {"context": 65536, "step_ms": 11000.0, "recompute": "attention", "offload": "all"}
    write(tmp_path, "step-d", "2026-11-04", [dense | later, dense | again])
    ((series, _, points),) = curves.curves()
    assert series.name == "lemo, nothing eliminated"
    assert [(p.context, p.seconds, p.offloaded) for p in points] == [
        (16384, 1.5, False),
        (65536, 12.0, False),  # a step without offload comes first
        (262144, 90.0, True),
    ]
    assert points[0].rate == pytest.approx(16384 / 1.5) and points[0].gib == 40.0
    drawn = ElementTree.fromstring(curves.picture())
    circles = list(drawn.iter(f"{SVG}circle"))
    assert len(circles) == 9 and [c.attrib["fill"] == "var(--ground)" for c in circles] == [False, False, True] * 3
    assert curves.picture() == curves.picture()


def test_floors(curves: Any) -> None:
    """At 64K tokens, by hand: 0.915 P multiply-adds in projections, 1.970 in attention, 0.069 in the head."""
    assert curves.floor_seconds(65536, 1.0) == pytest.approx(2 * 2.954e15 / curves.RATE, rel=1e-3)
    assert curves.floor_seconds(65536, 0.5) == pytest.approx(curves.floor_seconds(32768, 1.0))


def test_without_results(curves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["curves.py"])
    with pytest.raises(SystemExit, match="no step measured at two contexts"):
        curves.main()
