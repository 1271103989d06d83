"""What the results file of a quality study keeps: settings that another study takes, and what every run measured."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import tiny
from support.quality_study import SMALL

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
NAME = "random subset 0.5, then exact"
SWEEP = ("--batches", 1, 2, "--rates", 1e-3, 1e-2, "--widen", 1)
AGAINST = ("against_dense", "against_best_rival", "against_largest_dense")
UNSWEPT = {"name": "dense", "batch": 1, "rate": 1e-3, "sweep": [], "at_edge": ["rate"]}  # chosen from nothing
CARRIED = ("batch", "rate", "sweep", "at_edge")


@pytest.fixture
def found(world: Any) -> Path:
    """The results file of a small study with its sweeps; what it trained is forgotten."""
    world.command(*SMALL, *SWEEP)
    world.trained.clear()
    return Path(shutil.copy(world.folder / "quality.json", world.folder / "found.json"))


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))
    return path


def row_of(result: dict[str, Any], name: str, cost_at: int = 65536) -> dict[str, Any]:
    (row,) = (r for r in result["rows"] if (r["name"], r.get("cost_at")) == (name, cost_at))
    return row


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_of_another_study(world: Any, found: Path) -> None:
    """No sweep; the rows say where their settings are from, also if the other study had them from a third."""
    before = json.loads(found.read_text())
    source = {"file": "found.json", "commit": before["commit"], "date": before["date"]}
    last = found
    for study in ("second", "third"):
        result = world.command(*SMALL, *SWEEP, "--settings", last, "--study", world.folder / study)
        assert len(world.trained) == 7 and {spec.purpose for spec in world.trained} == {"final"}
        assert result["missing"] == [] and len(result["rows"]) == 5
        for row in result["rows"][1:]:
            there = row_of(before, row["name"], row["cost_at"])
            assert row["settings_from"] == source
            assert {n: row[n] for n in (*CARRIED, "mean_loss")} == {n: there[n] for n in (*CARRIED, "mean_loss")}
        world.trained.clear()
        last = Path(shutil.copy(world.folder / "quality.json", world.folder / f"{study}.json"))


def without_row(result: dict[str, Any]) -> None:
    result["rows"] = [row for row in result["rows"] if row["name"] != NAME]


def other_schedule(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["name"] == NAME:
            row["schedule"] = row["schedule"].replace("70%", "60%").replace("30%", "40%")


def without_sweep(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["name"] == NAME:
            del row["sweep"], row["at_edge"]


def other_budget(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        if row["name"] == NAME:
            row["sequences"] = 8.0


def swept_elsewhere(result: dict[str, Any]) -> None:
    """The row that the study asks for has the sweep that was made at another cost."""
    for row in result["rows"]:
        if row["name"] == NAME:
            row["swept_at"] = {"sequences": 4.0, "cost_at": 262144}


def swept_somewhere(result: dict[str, Any]) -> None:
    """There are two costs, and nothing says at which the sweep was made."""
    for row in result["rows"]:
        if row["name"] == NAME:
            del row["swept_at"]


CHANGES = [without_row, other_schedule, without_sweep, other_budget, swept_elsewhere, swept_somewhere]


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_file_does_not_settle_is_swept(
    world: Any, found: Path, change: Callable[[dict[str, Any]], None], capsys: pytest.CaptureFixture[str], q: Any
) -> None:
    changed(found, change)
    words = (*SMALL, *SWEEP, "--settings", found, "--study", world.folder / "second")
    given = ["--model", world.folder / "model", "--setting", "B", "--costs", world.folder / "step-a.json", *words]
    given += ["--tokens", world.folder / "tokens", "--adapt", "code", "--plan"]
    assert q.quality.main(list(map(str, given))) == 0
    plan = capsys.readouterr().out
    assert "3 runs to sweep, up to 1 more at the edges, 6 final runs" in plan
    assert f"settings of found.json: 1 of 2 rows\nnot in it as it is now, so swept: {NAME}\n" in plan

    result = world.command(*words)
    swept = [spec for spec in world.trained if spec.purpose == "sweep"]
    assert len(swept) in (3, 4) and all(spec.segments[0].phase["mode"] == "skip" for spec in swept)
    assert "settings_from" in row_of(result, "dense") and "settings_from" not in row_of(result, NAME)
    assert len(row_of(result, NAME)["sweep"]) == len(swept)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": 512}, "is of another context (context 512, here 256)"),
        ({"adapt": "law", "model": "m"}, "is of another model, adapt (model 'm', here 'model'; adapt 'law', here"),
        ({"setting": "A", "adapt": None}, "is of another setting, adapt (setting 'A', here 'B'; adapt None"),
        ({"rows": 3}, "is not a results file of this study (rows without"),
        ({"rows": [{"name": "dense", "sweep": [], "at_edge": []}]}, "is not a results file of this study (rows"),
        ({"rows": [UNSWEPT]}, "is not a results file of this study (rows"),
        ({"model": ...}, "is not a results file of this study (no model)"),
        ("[1]", "is not a results file of this study (no commit, date, rows, setting"),
        ("rows", "is not JSON; name a results file"),
        (None, "cannot be read (No such file or directory); name a results file"),
    ],
)
def test_files_that_hold_no_settings_for_the_study(
    world: Any, capsys: pytest.CaptureFixture[str], values: Any, message: str
) -> None:
    path = world.folder / "found.json"
    if isinstance(values, str):
        path.write_text(values)
    elif values is not None:
        same = {
            "setting": "B",
            "model": "model",
            "context": 256,
            "adapt": "code",
            "commit": "c",
            "date": "d",
            "rows": [],
        }
        path.write_text(json.dumps({n: v for n, v in (same | values).items() if v is not ...}))
    with pytest.raises(SystemExit):
        world.command(*SMALL, "--settings", path)
    assert f"--settings: {path} {message}" in capsys.readouterr().err and world.trained == []


def test_the_sweep_of_another_cost_is_not_taken(world: Any, found: Path) -> None:
    """A row has the sweep of the largest budget and the first length at its other costs as well."""
    first = row_of(json.loads(found.read_text()), "dense", 262144)
    assert first["sweep"] and first["swept_at"] == {"sequences": 4.0, "cost_at": 65536}
    words = ("--settings", found, "--study", world.folder / "second", "--cost-at", 262144)
    result = world.command(*SMALL, *SWEEP, *words)
    assert any(spec.purpose == "sweep" for spec in world.trained)
    for row in result["rows"][1:]:
        assert "settings_from" not in row and row["swept_at"]["cost_at"] == 262144


def test_a_sweep_that_ended_at_its_edge_goes_on(world: Any, found: Path, q: Any, monkeypatch: Any) -> None:
    """From the rate that the file chose, which is run once more, until one is worse or the number is used up."""
    tried = [{"batch": 1, "rate": r, "loss": 1.0} for r in (1e-3, 2e-3)] + [{"batch": 2, "rate": 1e-3, "loss": None}]

    def at_its_edge(result: dict[str, Any]) -> None:
        for row in result["rows"][1:]:
            row |= {"batch": 1, "rate": 2e-3 if row["name"] == "dense" else 1e-3, "at_edge": ["rate"], "sweep": tried}

    changed(found, at_its_edge)
    best = {"dense": 4e-3, "skip": 1e-3 / 4}

    def loss(study: Any, way: Any, setting: tuple[int, float], results: Any) -> float:
        return abs(math.log(setting[1] / best[way.row.stages[0].phase["mode"]]))

    monkeypatch.setattr(q.quality.Study, "sweep_loss", loss)
    words = (*SMALL, *SWEEP, "--settings", found, "--study", world.folder / "second")
    result = world.command(*words, "--widen-further", 2)
    swept = sorted(spec.rate for spec in world.trained if spec.purpose == "sweep")
    assert swept == [1e-3 / 4, 1e-3 / 2, 1e-3, 2e-3, 4e-3, 8e-3] and {spec.batch for spec in world.trained} == {1}
    dense, other = row_of(result, "dense"), row_of(result, NAME)
    assert (dense["rate"], dense["at_edge"]) == (4e-3, []) and (other["rate"], other["at_edge"]) == (1e-3 / 4, ["rate"])
    for row in (dense, other):
        assert len(row["sweep"]) == 3 and row["settings_from"]["sweep"] == tried


def test_settings_may_be_written_over(world: Any, found: Path) -> None:
    """A study goes on by its copy, although its own results, of fewer rows, have taken the file's place."""
    there = row_of(json.loads(found.read_text()), NAME)
    words = (*SMALL, *SWEEP, "--settings", world.folder / "quality.json", "--study", world.folder / "second")
    result = world.command(*words, "--budget-minutes", 0)
    assert result["rows"] == [] and world.trained == []
    result = world.command(*words)
    assert result["missing"] == [] and {spec.purpose for spec in world.trained} == {"final"}
    assert row_of(result, NAME)["rate"] == there["rate"]
    world.trained.clear()
    world.command(*words)
    assert world.trained == []


def test_a_study_goes_on_with_the_settings_that_it_began_with(
    world: Any, found: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same content may lie elsewhere; another is refused, whatever its name, and so is a damaged copy."""
    study = ("--study", world.folder / "second")
    world.command(*SMALL, *SWEEP, "--settings", found, *study)
    (world.folder / "moved").mkdir()
    moved = Path(shutil.copy(found, world.folder / "moved" / "found.json"))
    world.trained.clear()
    assert world.command(*SMALL, *SWEEP, "--settings", moved, *study)["missing"] == [] and world.trained == []

    def refused(path: Path) -> str:
        with pytest.raises(SystemExit):
            world.command(*SMALL, *SWEEP, "--settings", path, *study)
        return capsys.readouterr().err

    changed(moved, lambda result: result.update(date="another"))
    kept = world.folder / "second" / "settings" / "found.json"
    for path in (moved, Path(shutil.copy(moved, world.folder / "renamed.json"))):
        assert f"{path} is not what {world.folder / 'second'} began with, which is in {kept}" in refused(path)
    assert "gone.json cannot be read" in refused(world.folder / "gone.json")
    kept.write_text(kept.read_text()[:100])
    assert f"{kept} is not JSON" in refused(found)
    assert world.trained == []


def test_settings_that_contradict_themselves(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (("--settings", world.folder / "found.json", "--no-sweep"), "--no-sweep gives every row one setting"),
        (("--widen-further", 1), "goes on with the sweeps of --settings, which is not given"),
        (("--widen-further", -1), "expected 0 or more, got -1"),
    ):
        with pytest.raises(SystemExit):
            world.command(*SMALL, *words)
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(RESULTS.glob("quality-smollm2-*.json")), ids=lambda path: path.stem)
def test_published_settings_are_read(q: Any, path: Path) -> None:
    """Every row of a published study whose schedule is still the same has its setting there."""
    result = json.loads(path.read_text())
    settings = q.results.Settings.read(path, {n: result[n] for n in q.results.SAME})
    rows = {row.name: row for row in q.schedules.ROWS}
    for there in result["rows"][1:]:
        row = rows[there["name"]]
        if there["schedule"] == q.results.schedule(row):
            taken = settings.of(row, there["sequences"], there["cost_at"])
            assert {n: taken[n] for n in CARRIED} == {n: there[n] for n in CARRIED}


def test_workers_take_the_settings(world: Any, found: Path) -> None:
    words = ("--settings", found, "--study", world.folder / "second", "--jobs", 2)
    result = world.command(*SMALL, *SWEEP, *words)
    assert result["missing"] == [] and result["runs"]["count"] == 7 and world.trained == []


# ---- what was measured -----------------------------------------------------------------------------------------------


def same(a: Any, b: Any) -> bool:
    """Also of what is not a number, as in runs that diverged."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def check_recomputed(q: Any, result: dict[str, Any]) -> int:
    """Makes every figure of a results file again from the losses that it keeps; how many comparisons there were."""
    compared = 0
    for row in result["rows"]:
        mine = q.stats.losses_of(row)
        absolute = q.stats.absolute(result["setting"], result["adapt"], mine)
        assert same({n: row[n] for n in absolute}, absolute) and row.get("seeds", [0]) == sorted(mine)
        for name in AGAINST:
            if name not in row:
                continue
            budget = max(result["sequences"]) if name == "against_largest_dense" else row["sequences"]
            (other,) = (
                r
                for r in [*result["rows"], *result["unfinished"]]
                if (r["name"], r.get("cost_at"), r.get("sequences")) == (row[name]["to"], row["cost_at"], budget)
            )
            again = q.stats.compared(result["setting"], result["adapt"], mine, q.stats.losses_of(other))
            assert same(again | {"to": other["name"]}, row[name])
            compared += 1
    return compared


def test_intervals_are_recomputed_from_the_file(world: Any, q: Any) -> None:
    result = world.command(*SMALL, "--no-sweep", "--sequences", 2, 4)
    assert check_recomputed(q, result) == 3 * 8
    runs = [json.loads(path.read_text()) for path in (world.folder / "study" / "runs").iterdir()]
    kept = [losses for row in result["rows"] for losses in row["losses"].values()]
    assert len(kept) == len(runs) + 4  # dense is the same run at both lengths, with two seeds and budgets
    assert all(run["losses"] in kept for run in runs)
    assert set(result["rows"][0]["losses"]) == {"0"} and set(result["rows"][1]["losses"]) == {"1", "2"}
    with pytest.raises(AssertionError):
        result["rows"][-1]["losses"]["1"]["code"]["loss"][0] += 0.01
        check_recomputed(q, result)


def test_runs_without_a_row_are_kept(world: Any, q: Any) -> None:
    """A single seed of several has no row, but another row may be compared with it."""
    result = world.command(*SMALL, "--no-sweep")
    dense = next(s for s in world.trained if s.segments and s.segments[0].phase["mode"] == "dense" and s.seed == 2)
    (world.folder / "study" / "runs" / f"{q.train.name_of(dense)}.json").unlink()
    result = world.command(*SMALL, "--no-sweep", "--budget-minutes", 1e-9)
    assert [row["name"] for row in result["rows"]] == ["not adapted", NAME, NAME]
    assert [(r["name"], r["cost_at"], list(r["losses"])) for r in result["unfinished"]] == [
        ("dense", 65536, ["1"]),
        ("dense", 262144, ["1"]),
    ]
    assert check_recomputed(q, result) == 6


def test_answers_are_kept(world: Any, q: Any) -> None:
    words = ("--no-sweep", "--seeds", 1, 2, "--sequences", 2, "--cost-at", 65536, "--context", 1536)
    model: Any = tiny.build()
    model.resize_token_embeddings(256)
    model.save_pretrained(world.folder / "larger")
    result = world.command(*words, "--model", world.folder / "larger", "--only", "random subset 0.5", setting="C")
    assert check_recomputed(q, result) == 6
    assert set(result["rows"][1]["losses"]["1"]["copy 0.1"]) == {"loss", "correct"}
    # Documents of a quarter of the length would not hold the questions: said at once, not after failed runs.
    result = world.command(*words, "--model", world.folder / "larger", "--only", "windows 1/4, then full", setting="C")
    assert [row["name"] for row in result["rows"]] == ["not adapted", "dense"]
    assert "a document of 384 leaves no room for filler" in result["left_out"]["windows 1/4, then full"]
    assert result["missing"] == result["failed"] == []


@pytest.mark.parametrize("path", sorted(RESULTS.glob("quality-smollm2-*.json")), ids=lambda path: path.stem)
def test_published_intervals_are_recomputed(q: Any, path: Path) -> None:
    result = json.loads(path.read_text())
    if not all("losses" in row for row in result["rows"]):
        pytest.skip("the file is older than the losses in it")
    assert check_recomputed(q, result) > 0


def test_pages_do_not_depend_on_losses(world: Any, q: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tables and pictures of older files, without them, are the same."""
    result = world.command(*SMALL, "--no-sweep")
    monkeypatch.setattr(q.pages, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    path = tmp_path / "results" / "quality-tiny-B.json"

    def without_losses(values: dict[str, Any]) -> None:
        del values["unfinished"]
        for row in values["rows"]:
            del row["losses"]

    path.write_text(json.dumps(result))

    def pages() -> tuple[list[str], list[tuple[Path, str]]]:
        return q.pages.tables(), list(q.pages.made())

    now = pages()
    changed(path, without_losses)
    assert pages() == now


def test_lists_of_numbers_have_one_line(world: Any, q: Any) -> None:
    common = q.results.write_results.__globals__
    values = {
        "a": [1, -2.5e-7, float("inf"), None],
        "b": ["x [\n 1,\n 2\n]", []],
        "c": [{"d": [[1, 2], [3]]}, 4],
        "e": [7],
    }
    text = common["readable"](values)
    assert json.loads(text) == values
    lines = [line.strip() for line in text.splitlines()]
    assert '"a": [1, -2.5e-07, Infinity, null],' in lines and "[1, 2]," in lines and '"e": [7]' in lines
    world.command(*SMALL, "--no-sweep")
    written = (world.folder / "quality.json").read_text()
    assert '"seeds": [1, 2],' in written and not re.search(r"\[\n\s*[-\d]", written)
