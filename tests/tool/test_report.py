"""`lemo report --html`: the page states what the log holds, and works in a browser."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lemo.cli import main
from lemo.pages.charts import Point, Series, line_chart, scatter, ticks
from lemo.pages.html import Section, page
from lemo.training.maps import BUDGET, block_tokens, describe_pass, kept_of, read_maps, recorded_steps
from lemo.training.run_log import read_log
from support.browser import Browser
from support.texts import make_text


class Page(HTMLParser):
    """Tables by id ([row][column]: the exact value, or the text), scripts, and every address in an attribute."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[Any]]] = {}
        self.data: Any = None
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.described: list[str] = []
        self._rows: list[list[Any]] | None = None
        self._cell: Any = None
        self._in_data = False
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = dict(attrs)
        self.addresses += [str(a[n]) for n in ("src", "href", "action", "data") if n in a]
        if "id" in a:
            self.ids.append(str(a["id"]))
        self.described += [str(a[n]) for n in ("aria-labelledby", "aria-describedby", "for") if n in a]
        if tag == "table":
            self._rows = self.tables.setdefault(str(a.get("id")), [])
        elif tag == "tr" and self._rows is not None:
            self._rows.append([])
        elif tag in ("td", "th"):
            self._cell = json.loads(str(a["data-value"])) if "data-value" in a else ""
        elif tag == "svg":
            assert a.get("role") == "img" and a.get("aria-label")
        elif tag == "script":
            self._in_data = a.get("type") == "application/json"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_data:
            self.data, self._in_data = json.loads(data), False
        elif isinstance(self._cell, str):
            self._cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._rows is not None:
            self._rows[-1].append(self._cell)
            self._cell = None


@pytest.fixture(scope="module")
def run(new_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    new_model(root / "model", positions=768)
    (root / "text").mkdir()
    for i in range(4):
        (root / "text" / f"d{i}.txt").write_text(make_text(i, 500 + 200 * i))
    command = ["finetune", "--model", str(root / "model"), "--data", str(root / "text"), "--context", "768"]
    command += ["--block-size", "16", "--steps", "6", "--schedule", "skip:0.5@2,sparse:0.5:keep=0.9@2,dense@2"]
    assert main([*command, "--held-out", "0.2", "--maps", "4", "--out", str(root / "run"), "--quiet"]) == 0
    return root / "run"


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    assert main(["report", str(run), "--html"]) == 0
    return run / "report.html"


def steps(run: Path) -> list[dict[str, Any]]:
    return [r for r in read_log(run / "log.jsonl") if "loss" in r]


def test_the_page_states_what_the_log_holds(run: Path, report: Path) -> None:
    shown, logged = Page(report.read_text()), steps(run)
    phases = shown.tables["phases"][1:]
    assert [row[1] for row in phases] == ["1 to 2", "3 to 4", "5 to 6"]
    for row, part in zip(phases, (logged[:2], logged[2:4], logged[4:]), strict=True):
        assert row[2] == pytest.approx(np.mean([r["loss"] for r in part]), rel=1e-12)
        assert row[4] == pytest.approx(np.mean([r["kept"] for r in part]), rel=1e-12)
        assert row[6] == pytest.approx(max(r["peak_memory_bytes"] for r in part) / 2**20)
    costs = shown.tables["costs"][1:]
    rates = [np.median([r["tokens_per_second"] for r in part]) for part in (logged[:2], logged[2:4], logged[4:])]
    assert [row[3] for row in costs] == pytest.approx([rates[2] / rate for rate in rates])
    held = next(r for r in read_log(run / "log.jsonl") if r.get("event") == "held-out")
    assert shown.tables["held-out-table"][1] == [held["step"], held["perplexity"], *held["interval"]]
    assert [row[1] for row in shown.tables["covered"][1:]] == logged[3]["covered"]
    assert shown.data["steps"] == logged
    assert [row[0] for row in shown.tables["event-table"][1:]] == ["start", "end"]


def test_the_page_loads_nothing_and_names_what_it_refers_to(report: Path) -> None:
    shown = Page(report.read_text())
    assert all(address.startswith("#") and address[1:] in shown.ids for address in shown.addresses)
    assert set(shown.described) <= set(shown.ids) and len(set(shown.ids)) == len(shown.ids)
    assert "http:" not in shown.text.replace("http://www.w3.org", "") and "https:" not in shown.text


def test_the_maps_are_what_the_steps_kept(run: Path, report: Path) -> None:
    maps = read_maps(run)
    assert len(maps) == 4 and {m["mode"] for m in maps} == {"skip", "sparse", "dense"}
    by_step = {r["step"]: r for r in steps(run)}
    for m in maps:
        assert kept_of(m).mean(1).tolist() == pytest.approx(by_step[m["step"]]["kept"], abs=1e-4)
        blocks = block_tokens(m)
        assert blocks is not None and [len(b) for b in blocks[:-1]].count(16) >= len(blocks) - 1 - len(m["lengths"])
    sparse = next(m for m in maps if m["mode"] == "sparse")
    for drawn in sparse["tiles"]:
        for layer in drawn["layers"]:
            cells = np.frombuffer(base64.b64decode(layer), np.uint8).reshape(2 * (drawn["cells"],))
            assert set(np.unique(cells)) <= {0, 255} and not np.triu(cells, 1).any() and np.diag(cells).all()
    if len(sparse["tiles"]) == len(sparse["lengths"]) == 1:
        n = sparse["tiles"][0]["size"]
        density = by_step[sparse["step"]]["density"][0]
        first = np.frombuffer(base64.b64decode(sparse["tiles"][0]["layers"][0]), np.uint8)
        assert first.astype(float).sum() / 255 / (n * (n + 1) / 2) == pytest.approx(density, abs=1e-3)


def test_text_is_that_of_the_documents_or_left_out(run: Path, report: Path, tmp_path: Path) -> None:
    of = Page(report.read_text()).data["maps"][0]
    document = of["documents"][0]
    number = int(document["label"].split("document ")[1].split(",")[0])
    words = make_text(number, 500 + 200 * number)
    squeezed = "".join(words.split())
    assert "".join(of["texts"][0].split())[:30] in squeezed
    target = tmp_path / "page.html"
    assert main(["report", str(run), "--html", str(target), "--no-text"]) == 0
    assert of["texts"][0] not in target.read_text() and "--no-text" in target.read_text()


def test_a_run_that_recorded_little_names_what_is_missing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n" + '{"step": 2, "lo')
    assert main(["report", str(tmp_path), "--html"]) == 0
    text = Page((tmp_path / "report.html").read_text()).text
    for part in (
        "recorded no maps",
        "neither recall nor covered",
        "relative to dense steps is not known",
        "no held-out",
    ):
        assert part.lower() in text.lower()
    (tmp_path / "log.jsonl").write_text("")
    assert main(["report", str(tmp_path), "--html"]) == 0
    assert "No step has been logged yet" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("layers", [2, 80])
@pytest.mark.parametrize("tokens", [4096, 1 << 20])
def test_maps_stay_within_their_budget(layers: int, tokens: int) -> None:
    from lemo.integration.reference import Pass

    blocks = tokens // 64
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randperm(blocks, generator=generator)[: blocks // 2].sort().values.int() for _ in range(layers)]
    seen = Pass(torch.randint(1 << 17, (1, tokens), generator=generator), (tokens,), [(a, a) for a in lists])
    values = describe_pass(seen, None, 64, BUDGET // 8 - 1024)
    assert len(json.dumps(values)) <= BUDGET // 8
    assert kept_of(values)[0].nonzero()[0].tolist() == lists[0].tolist()


def test_recorded_steps_reach_every_phase() -> None:
    assert recorded_steps([3, 5], 8) == [1, 2, 3, 4, 5]
    chosen = recorded_steps([700, 900, 1000], 8)
    assert len(chosen) == 8 and {700, 900, 1000, 1} <= set(chosen)
    assert recorded_steps([10], 0) == [] and recorded_steps(list(range(1, 101)), 4)[-1] == 100
    assert len(recorded_steps(list(range(1, 101)), 4)) == 4


def test_a_resumed_run_records_what_an_uninterrupted_one_does(run: Path, tmp_path: Path) -> None:
    saved = json.loads((run / "run.json").read_text())
    command = ["finetune", "--model", saved["inputs"]["model"], "--data", *saved["inputs"]["data"], "--context", "768"]
    command += ["--block-size", "16", "--steps", "6", "--schedule", saved["settings"]["schedule"], "--held-out", "0.2"]
    out = tmp_path / "again"
    assert main([*command, "--maps", "4", "--save-every", "2", "--out", str(out), "--quiet"]) == 0
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoint-6")
    assert main(["finetune", "--out", str(out), "--resume", "--maps", "4", "--quiet"]) == 0
    assert (out / "maps.jsonl").read_text() == (run / "maps.jsonl").read_text()


# ---- charts ----------------------------------------------------------------------------------------------------------


def test_charts_and_data_take_any_text() -> None:
    nasty = "</script><b>&\"'"
    chart = line_chart(nasty, nasty, nasty, [Series(nasty, [1, 2, 3], [1.0, None, 2.0])], [(2, nasty)])
    points = scatter(nasty, "x", "y", [Point(nasty, 1.0, 1.0, 0.5, 1.5, True), Point("b", 2.0, 1.0)])
    text = page(nasty, "", [Section("a", nasty, chart + points)], {"x": nasty})
    assert Page(text).data == {"x": nasty} and "<b>" not in text
    with pytest.raises(ValueError, match="no value is known"):
        line_chart("t", "x", "y", [Series("s", [1], [None])])


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (3.8812, 3.8847), (-5.0, 1e6)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low <= found[0] and found[-1] <= high + 1e-9 * abs(high)
    assert f"{found[1] - found[0]:.0e}"[0] in "125"


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path)
    yield opened
    opened.close()


def test_in_a_browser_a_person_can_look_into_the_maps(browser: Browser, report: Path) -> None:
    assert browser.open(report) == [report.as_uri()]  # it asks for nothing else
    of = Page(report.read_text()).data["maps"][0]
    assert browser.run("document.getElementById('block-text').textContent") == of["texts"][0]
    press = "document.getElementById('kept-map').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))"
    browser.run(press)
    assert browser.run("document.getElementById('block-text').textContent") == of["texts"][1]
    assert "block 1" in browser.run("document.getElementById('block-title').textContent")
    browser.run(
        "(() => { const c = document.getElementById('kept-map'), b = c.getBoundingClientRect(); c.dispatchEvent("
        "new PointerEvent('pointermove', {clientX: b.right - 1, clientY: b.bottom - 1})); })()"
    )
    last = of["documents"][0]["blocks"] - 1
    assert f"Layer 1, block {last}" in browser.run("document.getElementById('block-title').textContent")
    assert browser.errors == []
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth + 1")
    kept = "getComputedStyle(document.body).backgroundColor"
    light = browser.run(kept)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert browser.run(kept) != light
