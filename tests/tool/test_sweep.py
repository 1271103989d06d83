"""`lemo sweep`: what it compares, how it is continued, and what it concludes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lemo.cli import main
from lemo.study import sweep
from lemo.study.conclusions import as_text, recommend
from lemo.study.statistics import interval, paired_bootstrap
from lemo.study.sweep_page import sweep_page
from lemo.training import settings
from lemo.training.finetune import finetune as train
from lemo.training.settings import FinetuneSettings

Command = Callable[..., list[str]]


@pytest.fixture(scope="module")
def command(model_folder: Path, text_folder: Path) -> Command:
    common = ["sweep", "--model", str(model_folder), "--data", str(text_folder), "--context", "64", "--block-size", "8"]
    common += ["--steps", "3", "--rows", "half=skip:0.5", "--held-out", "0.3", "--equal", "steps"]

    def words(out: Path, *more: str) -> list[str]:
        seeds = () if "--seeds" in more else ("--seeds", "1", "2")
        return [*common, *seeds, *more, "--out", str(out), "--quiet"]

    return words


@pytest.fixture(scope="module")
def study(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "study"
    assert main(command(out)) == 0
    return out


def results(study: Path) -> dict[str, Any]:
    return {p.parent.name: json.loads(p.read_text()) for p in study.glob("runs/*/result.json")}


def test_a_study_gives_rows_a_page_and_a_recommendation(study: Path) -> None:
    found = json.loads((study / "sweep.json").read_text())
    dense, half = found["rows"]
    assert (dense["name"], half["name"]) == ("dense", "half") and dense["cost"] == 1.0
    assert dense["seeds"] == half["seeds"] == [1, 2] and dense["steps"] == half["steps"] == 3
    runs = list(results(study).values())
    assert len(runs) == 4
    of_half = [r["judge"] for r in runs if r["settings"]["schedule"] == "skip:0.5"]
    losses = [sum(r["nll"]) / sum(r["tokens"]) for r in of_half]
    assert half["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    against = half["against_dense"]
    assert against["difference"] == pytest.approx(half["loss"] - dense["loss"], abs=1e-9)
    assert against["low"] <= against["difference"] <= against["high"]
    times = json.loads((study / "study.json").read_text())["times"]
    assert half["cost"] == pytest.approx(times["skip:0.5"] / times["dense"])
    page = (study / "sweep.html").read_text()
    assert found["recommendation"]["use"] in page and json.dumps(half["loss"]) in page


def test_a_killed_study_continues_and_repeats_nothing(
    command: Command, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, real, begun = tmp_path / "study", train, []

    def finetune(*args: Any, **kwargs: Any) -> Any:
        begun.append(args[3])
        if len(begun) == 2:  # between its first step and its result
            real(*args, **kwargs)
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr("lemo.study.sweep.finetune", finetune)
    assert main(command(out)) == 130
    assert len(results(out)) == 1
    assert main(command(out)) == 0
    assert [begun.count(folder) for folder in dict.fromkeys(begun)] == [1, 2, 1, 1]
    mine, whole = results(out), results(study)
    assert {k: v["judge"] for k, v in mine.items()} == {k: v["judge"] for k, v in whole.items()}
    done = len(begun)
    assert main(command(out, "--seeds", "2", "1")) == 0 and len(begun) == done
    capsys.readouterr()
    assert main(command(out, "--held-out", "0.2")) == 2
    assert "another --held-out;" in capsys.readouterr().err


def test_a_study_continues_as_it_is(
    study: Path, model_folder: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the options that its runs share; those that are given are compared with it."""
    out = shutil.copytree(study, tmp_path / "study")
    before = results(out)
    command = ["sweep", "--model", str(model_folder), "--data", str(text_folder), "--rows", "half=skip:0.5"]
    command += ["--seeds", "1", "2", "--out", str(out), "--quiet"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "--equal steps" in said and "--context 64" in said and "--steps 3" in said and "as the study" in said
    assert results(out) == before
    assert main([*command, "--context", "128"]) == 2
    assert "another --context;" in capsys.readouterr().err
    assert main([*command, "--block-size", "16", "--lr", "1e-4", "1e-3"]) == 2
    assert "another --block-size, --lr (one or several);" in capsys.readouterr().err


def test_a_study_continues_with_all_it_was_given(
    study: Path, model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """Its rows, seeds and rates, also those that the last command left out; not the usual ones in their place."""
    out = shutil.copytree(study, tmp_path / "study")
    command = ["sweep", "--model", str(model_folder), "--data", str(text_folder), "--out", str(out), "--quiet"]
    assert main(command) == 0 and len(results(out)) == 4
    said = capsys.readouterr().err
    assert "--rows dense half=skip:0.5, --seeds 1 2, --lr 0.0002: as the study" in said
    assert main([*command, "--rows", "skip 0.5", "sparse:keys=128", "--seeds", "2"]) == 0 and len(results(out)) == 5
    assert main([*command, "--only", "half"]) == 0
    assert main([*command, "--only", "backward", "--plan"]) == 0 and "backward 0.5 " in capsys.readouterr().out
    found = json.loads((out / "study.json").read_text())
    assert found["rows"] == ["dense", "half=skip:0.5", "skip 0.5", "sparse:keys=128"] and found["seeds"] == [1, 2]
    assert main(command) == 0 and len(results(out)) == 6  # "skip 0.5" is the schedule of "half"

    for name, value in (("rows", 3), ("rows", []), ("seeds", [1.5]), ("lr", "x")):
        (out / "study.json").write_text(json.dumps(found | {name: value}))
        assert main(command) == 2 and "study.json is damaged" in capsys.readouterr().err
    for name in ("rows", "seeds", "lr"):  # of an earlier lemo
        del found[name]
    (out / "study.json").write_text(json.dumps(found))
    assert main([*command, "--plan"]) == 0
    assert "windows of 1/4, then full" in capsys.readouterr().out


def test_a_plan_does_not_change_what_a_study_continues_with(
    study: Path, model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(study, tmp_path / "study")
    command = ["sweep", "--model", str(model_folder), "--data", str(text_folder), "--out", str(out), "--quiet"]
    command += ["--rows", "half=skip:0.5", "--plan", "--steps", "9", "--equal", "cost"]
    assert main(command) == 0
    found = json.loads((out / "study.json").read_text())
    assert (found["steps"], found["equal"]) == (3, "steps")

    # A study of an earlier lemo, which did not record it: a plan does not decide it either.
    for name in ("steps", "equal", "calibration"):
        del found[name]
    (out / "study.json").write_text(json.dumps(found))
    assert main(command) == 0 and "steps" not in json.loads((out / "study.json").read_text())


@pytest.mark.parametrize("plan", [False, True])
def test_what_an_earlier_study_does_not_record_is_asked_for(
    study: Path, model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any, plan: bool
) -> None:
    """The default would begin runs of another length, or compare at another cost, next to those that are there."""
    out = shutil.copytree(study, tmp_path / "study")
    found, before = json.loads((out / "study.json").read_text()), results(out)
    for name in ("steps", "equal", "calibration"):
        del found[name]
    (out / "study.json").write_text(json.dumps(found))
    part = shutil.copytree(next(iter(out.glob("runs/*"))), out / "runs" / "part") / "result.json"
    of_part = {"schedule": "dense", "context": 32, "steps": 7}  # as many steps as cost the same
    part.write_text(json.dumps({"settings": of_part, "judge": {}}))
    (shutil.copytree(part.parent, out / "runs" / "cut") / "result.json").write_text('{"settings": {')
    command = ["sweep", "--model", str(model_folder), "--data", str(text_folder), "--out", str(out), "--quiet"]
    command += ["--rows", "half=skip:0.5", "--seeds", "1", "2", *(["--plan"] if plan else [])]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert f"{out / 'study.json'} does not record --equal and --steps" in said and "give --equal and --steps" in said
    assert "its dense runs have 3 steps" in said
    assert main([*command, "--steps", "3"]) == 2
    said = capsys.readouterr().err
    assert "does not record --equal (" in said and "dense runs" not in said
    shutil.rmtree(part.parent)
    shutil.rmtree(out / "runs" / "cut")
    assert main([*command, "--steps", "3", "--equal", "steps"]) == 0 and results(out) == before
    assert plan or main(command) == 0  # recorded now


def test_a_study_that_recorded_the_name_of_a_preset(
    model_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The preset has other phases by now: rows of the study keep those that they had, and their runs."""
    out, before, now = tmp_path / "study", "skip@0.5,dense@0.5", "skip:0.25@0.5,dense@0.5"
    command = ["sweep", "--model", str(model_folder), "--data", str(text_folder), "--out", str(out), "--quiet"]
    more = ["--context", "64", "--block-size", "8", "--steps", "3", "--seeds", "1", "--equal", "steps"]
    monkeypatch.setitem(settings.PRESETS, "long-context", before)
    monkeypatch.setattr(settings, "_FORMERLY", {})
    assert main([*command, *more, "--held-out", "0.3", "--rows", "long-context", "mine=long-context"]) == 0
    recorded = lambda: json.loads((out / "study.json").read_text())["rows"]  # noqa: E731
    runs = results(out)
    assert recorded() == ["dense", "long-context", "mine=long-context"] and len(runs) == 2

    monkeypatch.setitem(settings.PRESETS, "long-context", now)
    monkeypatch.setattr(settings, "_FORMERLY", {"long-context": before})
    for _ in range(2):  # and once it is recorded anew
        assert main(command) == 0 and results(out) == runs
        assert recorded() == ["dense", f"long-context={before}", f"mine={before}"]
        found = json.loads((out / "sweep.json").read_text())["rows"]
        assert [(row["schedule"], row["seeds"]) for row in found] == [("dense", [1]), (before, [1]), (before, [1])]
    assert main([*command, "--rows", "long-context", before]) == 0  # given, the name is what it means now
    assert recorded() == ["dense", f"long-context={now}", f"mine={before}", before]
    assert len(results(out)) == 3 and runs.items() <= results(out).items()


@pytest.mark.parametrize("text", ['{"identity": {', "{}", "[]", '{"identity": {"settings": {}}}'])
def test_a_damaged_study_is_named(study: Path, command: Command, tmp_path: Path, capsys: Any, text: str) -> None:
    out = shutil.copytree(study, tmp_path / "study", ignore=shutil.ignore_patterns("runs"))
    (out / "study.json").write_text(text)
    assert main(command(out)) == 2
    assert f"{out / 'study.json'} is damaged" in capsys.readouterr().err


def test_a_budget_ends_the_study_and_nothing_is_claimed(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path / "study", "--minutes", "1e-9")) == 0
    said = capsys.readouterr()
    assert "use dense: no dense run is finished yet" in said.out and "the same command continues" in said.err
    assert "No run is finished yet" in (tmp_path / "study" / "sweep.html").read_text()


def test_rates_are_chosen_on_other_text_and_a_diverged_run_is_a_result(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "s"
    assert main(command(out, "--seeds", "1", "--lr", "1e-4", "1e-2", "1e30")) == 0
    failed = [r for r in results(out).values() if "failed" in r]
    runs = [r for r in results(out).values() if "failed" not in r]
    assert [r["settings"]["lr"] for r in failed] == [1e30] * 2 and len(runs) == 4
    for row in json.loads((out / "sweep.json").read_text())["rows"]:
        mine = [r for r in runs if r["settings"]["schedule"] == row["schedule"]]
        best = min(mine, key=lambda r: sum(r["choose"]["nll"]))
        assert row["rate"] == best["settings"]["lr"] and "failed runs: 1" in row["note"]
        assert row["loss"] == pytest.approx(sum(best["judge"]["nll"]) / sum(best["judge"]["tokens"]))
    assert runs[0]["choose"]["nll"] != runs[0]["judge"]["nll"]
    assert "not finite" in (out / "sweep.html").read_text() or "the loss is" in (out / "sweep.html").read_text()


def test_cheaper_steps_come_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal cost, from given times of a step."""
    settings = FinetuneSettings(context=1024, steps=100)
    rows = (
        sweep.ROWS[0],
        sweep.Row("mix", "skip:0.5@0.7,dense@0.3"),
        sweep.Row("w", "dense", part=2),
        sweep.Row("short, then full", "dense:window=1/4@0.75,dense@0.25"),
    )
    study = object.__new__(sweep.Study)
    study.plan = sweep.Plan(settings, rows, (1,), (1e-4,))
    study.times = {"dense": 1.0, "skip:0.5": 0.4, "dense in windows of 1/2": 0.5, "dense:window=1/4": 0.2}
    assert [study.steps(row) for row in rows] == [100, round(100 / 0.58), 200, 250]
    assert [study.cost(row) for row in rows] == pytest.approx([1.0, 172 * 0.58 / 100, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"the shortest windows .* have 32 tokens.* a smaller block_size"):
        sweep.Plan(settings, (rows[0], sweep.parse_row("skip:window=1/32")), (1,), (1e-4,))
    sweep.Plan(settings, (rows[0], sweep.parse_row("dense:window=1/32")), (1,), (1e-4,))  # has no blocks to choose


def test_default_rows_are_schedules_and_have_rivals() -> None:
    for row in sweep.ROWS:
        assert len(row.stages) == len(row.schedule.split(","))
    assert len({row.name for row in sweep.ROWS}) == len(sweep.ROWS)
    assert {"skip", "sparse", "backward", "dense"} <= {s.phase.mode for r in sweep.ROWS for s in r.stages}
    assert sum(row.rival for row in sweep.ROWS) >= 3
    assert sweep.parse_row("sparse:keys=4096") == sweep.Row("sparse:keys=4096", "sparse:keys=4096")
    assert sweep.parse_row("mine=skip:0.3") == sweep.Row("mine", "skip:0.3")
    with pytest.raises(ValueError, match="neither a preset"):
        sweep.parse_row("mine=nothing")


# ---- conclusions -----------------------------------------------------------------------------------------------------


def row(name: str, cost: float, change: float, half: float, rival: bool = False, seeds: int = 3) -> dict[str, Any]:
    low, high = change - half, change + half
    kind = "better" if high < 0 else "worse" if low > 0 else "equal"
    against = {"difference": change, "low": low, "high": high, "t_low": low, "t_high": high, "verdict": kind}
    same = {"name": name, "schedule": name, "rival": rival, "cost": cost, "steps": 9, "rate": 1e-4, "loss": 3 + change}
    return same | {"seeds": list(range(seeds)), "peak_mib": 1.0, "note": "", "against_dense": against}


DENSE: dict[str, Any] = {k: v for k, v in row("dense", 1.0, 0.0, 0.0, True).items() if k != "against_dense"}


@pytest.mark.parametrize(
    ("rows", "equal", "use", "reason"),
    [
        ([row("a", 1.0, -0.01, 0.02), row("b", 1.0, 0.05, 0.01)], "cost", "dense", "closest is a"),
        ([row("a", 1.0, -0.03, 0.02), row("b", 1.0, -0.02, 0.01)], "cost", "a", "beyond the interval"),
        ([row("a", 1.0, -0.03, 0.02), row("w", 1.0, -0.05, 0.01, True)], "cost", "w", "no way of eliminating"),
        ([row("a", 1.0, -0.06, 0.02), row("w", 1.0, -0.05, 0.01, True)], "cost", "a", "The best rival, w"),
        ([row("a", 1.0, -0.06, 0.02, seeds=1)], "cost", "dense", "fewer than two seeds"),
        ([row("a", 0.6, 0.002, 0.005), row("b", 0.4, 0.03, 0.01)], "steps", "a", "within 1 %"),
        ([row("a", 0.6, 0.002, 0.05)], "steps", "dense", "every interval reaches beyond"),
    ],
)
def test_recommendations_follow_from_the_intervals(rows: list[Any], equal: str, use: str, reason: str) -> None:
    advice = recommend([DENSE, *rows], equal, 3)
    assert advice["use"] == use and reason in advice["reason"]
    text = as_text([DENSE, *rows], advice)
    assert text.splitlines()[-1].startswith(f"use {use}: ")
    page = sweep_page("t", [DENSE, *rows], advice, {"times": {"dense": 1.0}})
    assert page.count("<circle") == len(rows) + 1


def test_intervals_cover_what_they_should() -> None:
    """Of a difference of 0.1: Student's about as often as promised, the bootstrap less often with three seeds."""
    rng, hits = np.random.default_rng(1), np.zeros(2)
    for _ in range(150):
        seeds, items = 0.05 * rng.standard_normal((3, 1)), 0.2 * rng.standard_normal((1, 30))
        differences = 0.1 + seeds + items + 0.02 * rng.standard_normal((3, 30))
        low, high = paired_bootstrap(differences, np.ones(30), draws=300)
        mean, half = interval([[d] for d in differences], joint=False)
        assert half is not None and math.isclose(mean, differences.mean())
        hits += (low <= 0.1 <= high, mean - half <= 0.1 <= mean + half)
    bootstrap, student = hits / 150
    assert student >= 0.9 and 0.7 <= bootstrap <= student
