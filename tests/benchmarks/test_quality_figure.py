"""The picture of a quality study, from rows whose places are known."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest

SVG = "{http://www.w3.org/2000/svg}"


def change(gap: float, half: float | None = 1.0) -> dict[str, Any]:
    ends = (None, None) if half is None else (gap - half, gap + half)
    return {"gap": gap, "low": ends[0], "high": ends[1]}


def row(
    name: str, gap: float, cost: float, rival: bool = False, half: float | None = 1.0, **more: Any
) -> dict[str, Any]:
    """Of 16 sequences at 256K tokens; the best rival is called "windows"."""
    found = {"name": name, "rival": rival, "sequences": 16, "cost_at": 262144, "mean_loss": 2.0 + gap / 100}
    found |= {"cost": {"65536": cost, "262144": 16.0}}
    found["against_best_rival"] = {"loss": change(gap, half), "to": "windows"}
    return found | {"against_largest_dense": {"loss": change(gap - 4.0, half)}} | more


ROWS = [
    row("dense", 4.0, 16.0, rival=True),
    row("windows", 0.0, 20.0, rival=True, half=0.0),
    row("better", -2.0, 24.0),
    row("as good & dearer", -0.04, 30.0, half=None),
    row("cut off", 5.5, 18.0, half=3.0),
    row("far worse", 300.0, 17.0),
    row("level", 0.5, 28.0),
    row("level, too", 0.6, 29.0),
]


@pytest.fixture
def drawn(q: Any) -> str:
    result = {"rows": [{"name": "not adapted"}, *ROWS], "sequences": [16]}
    return str(q.figure.picture(result, "heading", "what is measured"))


def test_lines_are_ranked_and_written_out(drawn: str) -> None:
    texts = [e.text or "" for e in ElementTree.fromstring(drawn).iter(f"{SVG}text")]
    order = ["better", "as good & dearer", "windows", "level", "level, too", "dense", "cut off", "far worse"]
    assert [t for t in texts if t in order] == order
    for figure in ("-2.0 (-3.0 to -1.0)", "+0.0", "the best rival", "+300.0 (+299.0 to +301.0)"):
        assert figure in texts, texts


def test_what_is_far_off_is_an_arrow_and_hides_nothing(q: Any, drawn: str) -> None:
    """The axis ends where three quarters of the intervals do, and a little beyond."""
    changes = [r["against_best_rival"]["loss"] for r in ROWS]
    axis = q.figure.visible(changes)
    assert axis.low < -3.0 and 5.0 < axis.high < 5.5
    assert q.figure.line(1, ROWS[2], axis, 10.0)[-1].startswith('<circle class="mark ours"')
    for name, interval in (("cut off", True), ("far worse", False)):
        (found,) = (r for r in ROWS if r["name"] == name)
        parts = q.figure.line(1, found, axis, 10.0)
        assert "l-8 -4" in parts[-1] and any("interval" in part for part in parts) is interval
    places = [float(x) for x in re.findall(r'c?x="([\d.]+)"', drawn)] + [
        float(x) for x in re.findall(r"H([\d.]+)", drawn)
    ]
    assert max(places) <= q.figure.WIDTH


def test_quality_against_cost(q: Any, drawn: str) -> None:
    """At 64K tokens, where costs differ, and not at 256K, where they are equal; the front leaves out what is beaten."""
    (panel,) = q.figure.panels(ROWS)
    assert (panel.cost_at, panel.length, panel.left_out) == (262144, 65536, 0)
    (front,) = re.findall(r'class="front" d="([^"]*)"', drawn)
    assert front.count(" L") == 2  # dense, windows, better: what is dearer is no better, and what is cheaper is worse
    assert drawn.count("l-4 8 h8 z") == 2  # far worse and cut off are above the panel
    unmeasured = row("unmeasured", 1.0, 0.0) | {"cost": {"65536": None, "262144": 16.0}}
    assert "without 1 whose steps were not measured there" in q.figure.panels([*ROWS, unmeasured])[0].head()


def test_the_front_stays_in_its_panel(q: Any) -> None:
    """Its cheapest way is far worse than what the panel shows, and has its number all the same."""
    rows = [*ROWS, row("cheapest", 400.0, 10.0), row("diverged", float("inf"), 20.0)]
    drawn = q.figure.picture({"rows": rows, "sequences": [16]}, "heading", "what is measured")
    (front,) = re.findall(r'class="front" d="([^"]*)"', drawn)
    (axis,) = re.findall(r'd="M[\d.]+ ([\d.]+) V[\d.]+ H', drawn)
    heights = [float(y) for y in re.findall(r"[\d.]+ (-?[\d.]+)", front)]
    assert min(heights) == float(axis) and len(heights) == 4 and "diverged" not in drawn
    assert drawn.count(">9</text>") == 2  # in its line, and at the front's first place


def test_nothing_to_draw(q: Any) -> None:
    assert q.figure.picture({"rows": [{"name": "not adapted"}], "sequences": [16]}, "heading", "what") is None


def test_ticks_are_round(q: Any) -> None:
    assert q.figure.Axis(-2.3, 29.0, 0, 1).ticks() == [0, 5, 10, 15, 20, 25]
    assert q.figure.Axis(-0.5, 0.9, 0, 1).ticks() == pytest.approx([-0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8])
