"""The quality study on a tiny model: costs, schedules, intervals, whole studies, and what the pages make of them."""

import importlib
import json
import math
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from support import tiny
from support.quality_study import BACKWARD, DENSE, HALF, SMALL, cost_file

# ---- schedules and costs ---------------------------------------------------------------------------------------------


def test_every_row_is_a_schedule(q: Any) -> None:
    """All of them train with this lemo, but for modes that it does not have."""
    waiting = {row.name: q.schedules.unavailable(row) for row in q.schedules.ROWS}
    assert all(reason is None or "sparse" in name for name, reason in waiting.items()), waiting
    assert len(set(waiting)) == len(q.schedules.ROWS) and q.schedules.ROWS[0].name == "dense"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("skip keep=0.5", "a stage is"),
        ("50% skip keep=0.5; 40% dense", "add up to 100 %"),
        ("100% dense window=2", "a window"),
        ("100% sparse density=0.25 window=0", "a window"),
    ],
)
def test_texts_that_are_not_schedules(q: Any, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        q.schedules.parse(text)


def test_rates_are_ratios_of_measured_steps(q: Any, costs: Path) -> None:
    known = q.schedules.Costs.read([costs])
    row = q.schedules.Row("r", "70% skip keep=0.5 policy=random shared; 30% dense")
    assert known.of_row(row, 65536) == [0.25, 1.0] and known.of_row(row, 262144) == [0.2, 1.0]
    quarter = q.schedules.Row("w", "100% dense window=1/4")
    assert known.of_row(quarter, 65536) == [0.125] and known.of_row(quarter, 262144) == [0.1]
    eighth = q.schedules.Row("e", "100% skip keep=0.5 policy=random shared every=8")
    assert known.of_row(eighth, 65536) == [(7 * 0.25 + 1) / 8]
    edges = q.schedules.Row("f", "100% skip keep=0.5 policy=random shared", edges=True)
    assert known.of_row(edges, 65536) == pytest.approx([(30 * 0.25 + 2) / 32])


def test_what_is_not_measured_is_refused(q: Any, costs: Path, tmp_path: Path) -> None:
    known = q.schedules.Costs.read([costs])
    third = q.schedules.Row("r", "100% skip keep=0.3")
    assert "no measured step of skip keep 0.3 at 65536 tokens" in known.of_row(third, 65536)
    half = q.schedules.Row("w", "70% dense window=1/2; 30% dense")
    assert "no measured step of dense keep 1 at 32768 tokens" in known.of_row(half, 65536)
    plain = q.schedules.Row("b", "100% backward keep=0.5 policy=random")
    assert "backward keep 0.5 at" in known.of_row(plain, 65536)  # the weighted one was measured
    # In another process, on another day: its time is not compared with this dense step.
    other = cost_file(tmp_path / "step-b.json", {65536: {("skip", 0.3, False): 100.0}})
    assert isinstance(q.schedules.Costs.read([costs, other]).of_row(third, 65536), str)


def test_windows_in_any_stage(q: Any, tmp_path: Path) -> None:
    """The step at the window's length; layers that keep everything, and exact steps, keep their own lengths."""
    at = {65536: {DENSE: 1000.0, HALF: 250.0}, 32768: {DENSE: 320.0, HALF: 80.0}}
    known = q.schedules.Costs.read([cost_file(tmp_path / "step-a.json", at)])
    text = "50% skip keep=0.5 policy=random shared window=1/2; 50% dense"
    row = q.schedules.Row("w", text)
    assert q.schedules.unavailable(row) is None
    assert known.of_row(row, 65536) == [0.08, 1.0]
    made = q.schedules.segments(row, [0.08, 1.0], 8, 1)
    assert [(s.steps, s.window) for s in made] == [(50, Fraction(1, 2)), (4, Fraction(1))]
    assert q.schedules.cost(made, row, known, 65536, 1) == pytest.approx(8)
    edges = q.schedules.Row("e", text, edges=True)
    assert known.of_row(edges, 65536) == pytest.approx([(30 * 0.08 + 2 * 0.32) / 32, 1.0])
    often = q.schedules.Row("o", "100% skip keep=0.5 policy=random shared window=1/2 every=4")
    assert known.of_row(often, 65536) == [(3 * 0.08 + 1) / 4]
    made = q.schedules.segments(often, [(3 * 0.08 + 1) / 4], 1.55, 1)
    assert [(s.steps, s.phase["mode"], s.window) for s in made] == [
        (3, "skip", Fraction(1, 2)),
        (1, "dense", Fraction(1)),
        (1, "skip", Fraction(1, 2)),
    ]
    quarter = q.schedules.Row("q", "100% skip keep=0.5 window=1/4")
    assert "no measured step of skip keep 0.5 at 16384 tokens" in known.of_row(quarter, 65536)


def test_prices_through_one_step_of_two_files(q: Any, tmp_path: Path) -> None:
    third = ("skip", 0.3, False)
    first = cost_file(tmp_path / "costs-a.json", {1024: {DENSE: 800.0, third: 200.0}, 512: {DENSE: 100.0}}, "NVIDIA A")
    # Another machine's times: twice as long. Next to the long common step, and to a short one that is worth less.
    second = cost_file(
        tmp_path / "costs-b.json", {1024: {third: 400.0, BACKWARD: 600.0}, 512: {DENSE: 999.0, HALF: 50.0}}, "NVIDIA A"
    )
    row = q.schedules.Row("b", "60% backward keep=0.5 policy=random weighted; 40% skip keep=0.3 policy=random shared")
    known = q.schedules.Costs.read([first, second])
    # By the longest common step, here dense at 512: 600/999 x 100/800; skip 0.3 is next to dense, so never chained.
    assert known.of_row(row, 1024) == pytest.approx([600 / 999 * 100 / 800, 200 / 800])
    second.write_text(second.read_text().replace("999.0", "40.0"))
    known = q.schedules.Costs.read([first, second])
    assert known.of_row(row, 1024) == [600 / 400 * 200 / 800, 200 / 800] == [0.375, 0.25]
    assert known.chained(row, 1024) == [
        "backward keep 0.5 weighted at 1024 / skip keep 0.3 at 1024 in costs-b.json x "
        "skip keep 0.3 at 1024 / dense keep 1 at 1024 in costs-a.json"
    ]
    assert known.chained(q.schedules.Row("d", "100% skip keep=0.3"), 1024) == []
    window = q.schedules.Row("w", "100% skip keep=0.5 window=1/2")
    assert known.of_row(window, 1024) == [50 / 400 * 200 / 800]

    # One common step at most, files of one GPU that is known, and the very same step.
    lone = cost_file(tmp_path / "costs-c.json", {1024: {HALF: 70.0, BACKWARD: 700.0}}, "NVIDIA A")
    half = q.schedules.Row("h", "100% skip keep=0.5")
    assert "no measured step" in q.schedules.Costs.read([first, second, lone]).of_row(half, 1024)
    for gpu in ("NVIDIA B", None):
        other = cost_file(tmp_path / "costs-d.json", {1024: {third: 400.0, BACKWARD: 600.0}}, gpu)
        assert "no measured step" in q.schedules.Costs.read([first, other]).of_row(row, 1024)


def test_equal_cost(q: Any, costs: Path) -> None:
    known = q.schedules.Costs.read([costs])
    row = q.schedules.Row("r", "70% skip keep=0.5 policy=random shared; 30% dense")
    for batch in (1, 2):
        made = q.schedules.segments(row, known.of_row(row, 65536), 100, batch)
        assert [s.steps for s in made] == [280 // batch, 30 // batch]
        assert q.schedules.cost(made, row, known, 65536, batch) == pytest.approx(100)
        assert q.schedules.cost(made, row, known, 262144, batch) == pytest.approx(0.2 * 280 + 30)  # cheaper there
    eighth = q.schedules.Row("e", "100% skip keep=0.5 policy=random shared every=8")
    made = q.schedules.segments(eighth, known.of_row(eighth, 65536), 11, 1)
    assert [(s.steps, s.phase["mode"]) for s in made] == [(7, "skip"), (1, "dense")] * 4
    assert q.schedules.cost(made, eighth, known, 65536, 1) == pytest.approx(11)


def test_the_plan_names_chained_prices(q: Any, costs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows whose steps were measured next to a common step only; every figure from the two files by hand."""

    def file(name: str, steps: list[tuple[int, dict[str, Any], float]]) -> str:
        same = {"method": "lemo", "recompute": "full", "model": "llama3-8b"}
        rows = [same | {"context": n, "step_ms": ms} | phase for n, phase, ms in steps]
        (tmp_path / name).write_text(json.dumps({"gpu": "NVIDIA H200", "rows": rows}))
        return str(tmp_path / name)

    dense, common, sparse = {"mode": "dense"}, {"mode": "skip", "keep": 0.3}, {"mode": "sparse", "density": 0.25}
    of = [(262144, dense, 1000.0), (131072, dense, 300.0), (65536, dense, 100.0)]
    first = file("costs-a.json", [*of, (262144, sparse, 400.0), (262144, common, 120.0)])
    second = file("costs-b.json", [(262144, common, 150.0), (131072, sparse, 200.0)])
    words = ["--model", "m", "--setting", "C", "--context", "512", "--cost-at", "262144", "--plan"]
    words += ["--only", "windows", "--sequences", "100", "--batches", "1", "--costs", first]
    assert q.quality.main([*words, second]) == 0
    plan = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in plan.splitlines()}
    rate = 200 / 150 * 120 / 1000
    for name, rates, steps in (
        ("windows 1/2, sparse 0.25, then exact", [rate, 1.0], 438 + 30),
        ("windows 1/4, then 1/2, then full", [0.1, 0.3, 1.0], 350 + 117 + 30),
    ):
        found = lines[name]
        assert found[-1] == str(steps) and " ".join(found).endswith(", ".join(f"{r:.3f}" for r in rates) + f" {steps}")
    chain = (
        "sparse keep 1 density 0.25 at 131072 / skip keep 0.3 at 262144 in costs-b.json x skip keep 0.3 at 262144 / "
    )
    chain += "dense keep 1 at 262144 in costs-a.json"
    assert [line for line in plan.splitlines() if line.startswith("chained: ")] == [
        f"chained: windows 1/2, sparse 0.25, then exact: {chain}",
    ]
    assert q.quality.main(words) == 0
    assert "left out: windows 1/2, sparse 0.25, then exact: no measured step" in capsys.readouterr().out


# ---- intervals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("df", "value"), [(1, 12.7062), (2, 4.30265), (5, 2.57058), (30, 2.04227), (3, 3.18245)])
def test_quantiles_of_student(q: Any, df: float, value: float) -> None:
    assert q.stats.t_quantile(0.975, df) == pytest.approx(value, rel=2e-3)


def test_the_interval_is_students_where_only_seeds_differ(q: Any) -> None:
    """Items that all move alike have no spread: what is left is the t interval over the seeds."""
    by_seed = [0.1, 0.2, 0.6]
    mean, half = q.stats.interval([[np.full(5, v), np.full(3, v)] for v in by_seed], joint=False)
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(4.30265 * np.std(by_seed, ddof=1) / math.sqrt(3), rel=2e-3)


def test_the_interval_covers(q: Any) -> None:
    """Normal effects of seeds and documents: the truth lies inside about as often as promised."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(120):
        items = [rng.normal(0, 0.1, 8) for _ in range(2)]
        differences = []
        for _ in range(3):
            effect = rng.normal(0, 0.05)
            differences.append([1.0 + effect + item for item in items])
        mean, half = q.stats.interval(differences, joint=False)
        inside += abs(mean - 1.0) <= half
    assert 106 <= inside <= 120


def test_questions_of_one_document_are_not_independent(q: Any) -> None:
    item = np.array([0.0, 1.0, 0.0, 1.0])
    differences = [[item, item, item], [item + 0.1, item + 0.1, item + 0.1]]
    apart, together = (q.stats.interval(differences, joint=joint)[1] for joint in (False, True))
    assert together > 1.5 * apart


def test_one_seed_has_no_interval(q: Any) -> None:
    assert q.stats.interval([[np.array([0.1, 0.2])]], joint=False) == (pytest.approx(0.15), None)
    assert q.stats.verdict({"low": None, "high": None}) == "one seed"
    assert q.stats.verdict({"low": math.nan, "high": math.nan}) == "diverged"
    assert [q.stats.verdict({"low": a, "high": b}) for a, b in ((-2, -1), (-1, 1), (1, 2))] == [
        "better",
        "equal",
        "worse",
    ]


def test_pareto_front(q: Any) -> None:
    assert q.stats.pareto([(1, 5), (2, 4), (2, 3), (3, 3), (4, 1)]) == [0, 2, 4]


# ---- data ------------------------------------------------------------------------------------------------------------


def test_windows_for_sweeps_and_tables_do_not_overlap(q: Any) -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    first, second = (q.data.windows(tokens, 100, 8, second) for second in (False, True))
    assert len(first) == len(second) == 5 and not set(first.ravel()) & set(second.ravel())
    with pytest.raises(SystemExit, match="two windows of 600 tokens"):
        q.data.windows(tokens, 600, 8, True)


def test_text_of_installed_packages(q: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three domains, split by name; texts of another vocabulary are translated."""
    for domain, suffix in (("python", "py"), ("docs", "md"), ("headers", "h")):
        (tmp_path / "packages" / domain).mkdir(parents=True)
        for i in range(40):
            (tmp_path / "packages" / domain / f"{i}.{suffix}").write_text(f"{domain} {i} " * 1000)

    class Characters:
        eos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    wrapped = Characters()
    out = tmp_path / "out"
    out.mkdir()
    domains = ("python", "docs", "headers")
    q.data.write_installed(wrapped, out, tmp_path / "packages", domains, 40_000, 15_000)
    made = {p.stem: np.fromfile(p, np.uint16) for p in out.iterdir()}
    assert sorted(made) == ["adapt_headers", "dev_docs", "dev_headers", "dev_python", "train_docs", "train_python"]
    texts = {name: set("".join(map(chr, a)).split("\0")[:-1]) for name, a in made.items()}
    assert not texts["train_python"] & texts["dev_python"] and "python" in "".join(map(chr, made["dev_python"][:20]))

    # Neither another package nor another version of one moves what is there.
    before = {domain: q.data.files_of(domain, tmp_path / "packages", domains) for domain in domains}
    (tmp_path / "packages" / "docs").rename(tmp_path / "packages" / "docs-2.0.dist-info")
    (tmp_path / "packages" / "more").mkdir()
    (tmp_path / "packages" / "more" / "a.py").write_text("more " * 4000)
    for domain in domains:
        after = q.data.files_of(domain, tmp_path / "packages", domains)
        assert [name for name, _ in after] == [name for name, _ in before[domain]] and len(after) > 20
    assert len(q.data.files_of("python", tmp_path / "packages", [*domains, "more"])) == len(before["python"]) + 1
    with pytest.raises(SystemExit, match=r"no text of the domain \w+ below .* in more: are they installed"):
        q.data.write_installed(wrapped, out, tmp_path / "out", ["more"], 40_000, 15_000)

    other = SimpleNamespace(decode=lambda ids, skip_special_tokens: "".join(map(chr, ids)))
    again = tmp_path / "again"
    again.mkdir()
    q.data.write_recoded(wrapped, other, again, out, 10_000, 5_000)
    assert np.array_equal(np.fromfile(again / "dev_docs.bin", np.uint16), made["dev_docs"][:5000])
    monkeypatch.setattr(q.data, "PIECE", 1000)
    q.data.write_recoded(wrapped, other, again, out, 10_000, 5_000)
    mixed = np.fromfile(again / "train_docs.bin", np.uint16)
    assert len(mixed) == 10_000 and not np.array_equal(mixed[:1000], made["train_docs"][:1000])
    assert mixed[:1000].tobytes() in made["train_docs"].tobytes()


def test_the_packages_that_text_is_of(
    q: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions are those of the folder, also if the text's folder is not called as its package; a name that has no
    folder would give other text."""
    folder = tmp_path / "packages"
    for name, path in (("torch", "torch/a.py"), ("scikit-learn", "sklearn/b.py"), ("left_out", "left_out/c.py")):
        record = f"{name.replace('-', '_')}-0.5.dist-info"
        for part in (path, f"{record}/METADATA", f"{record}/RECORD"):
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("x = 1\n" * 2000)
        (folder / record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.5\n")
        (folder / record / "RECORD").write_text(f"{path},,\n{record}/METADATA,,\n{record}/RECORD,,\n")
    assert q.data.versions(folder, ["sklearn", "torch"]) == {"sklearn": "0.5", "torch": "0.5"}

    written: list[list[str]] = []
    monkeypatch.setattr(q.data, "write_installed", lambda *given: written.append(given[3]))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda where: [])
    command = ["--model", "any", "--packages", str(folder)]
    assert q.data.main([*command, "--out", str(tmp_path / "some"), "--only", "torch", "sklearn", "torch"]) == 0
    assert json.loads((tmp_path / "some" / "packages.json").read_text()) == {"sklearn": "0.5", "torch": "0.5"}
    assert q.data.main([*command, "--out", str(tmp_path / "usual")]) == 0
    assert f"{folder} has no folder of cmake, " in capsys.readouterr().err
    assert written == [["torch", "sklearn"], list(q.data.PACKAGES)]
    for words, message in (
        (["--only", "torch", "scikit-learn"], f"--only: {folder} has no folder of scikit-learn; name packages as"),
        (["--packages", str(tmp_path / "nowhere")], f"--packages: {tmp_path / 'nowhere'} is not a folder"),
    ):
        with pytest.raises(SystemExit):
            q.data.main([*command, "--out", str(tmp_path / "other"), *words])
        assert message in capsys.readouterr().err and len(written) == 2


# ---- whole studies ---------------------------------------------------------------------------------------------------


def test_rows_that_need_predictors_wait_for_them(world: Any, q: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the other rows. A calibration that failed is said, and tried again by the next command."""
    words = ["--context", 256, "--only", "drawn by predictors", "--seeds", 1, 2, "--sequences", 4, "--no-sweep"]
    words += ["--cost-at", 65536, "--calibration-steps", 2]
    real, order = q.quality.calibrate, []

    def out_of_memory(*given: Any) -> None:
        raise RuntimeError("out of memory")

    def calibrate(*given: Any) -> None:
        order.append(len(world.trained))
        real(*given)

    monkeypatch.setattr(q.quality, "calibrate", out_of_memory)
    result = world.command(*words, status=1)
    assert result["failed"] == ["calibration: RuntimeError: out of memory"] and len(world.trained) == 3
    assert [row["name"] for row in result["rows"]] == ["not adapted", "dense"]
    monkeypatch.setattr(q.quality, "calibrate", calibrate)
    world.trained.clear()
    result = world.command(*words)
    assert result["failed"] == result["missing"] == [] and order == [0] and len(world.trained) == 2
    assert all(spec.predicts for spec in world.trained) and len(result["rows"]) == 3


def test_a_study_with_its_sweep(world: Any) -> None:
    result = world.command(*SMALL, "--batches", 1, 2, "--rates", 1e-3, 1e-2, "--widen", 1)
    rows = {(r["name"], r.get("cost_at")): r for r in result["rows"]}
    name = "random subset 0.5, then exact"
    assert list(rows) == [("not adapted", None)] + [(n, c) for n in ("dense", name) for c in (65536, 262144)]
    for row in rows.values():
        assert math.isfinite(row["mean_loss"])
    skip, dense = rows[name, 65536], rows["dense", 65536]
    assert skip["seeds"] == dense["seeds"] == [1, 2] and not result["missing"]
    assert skip["cost"]["65536"] == pytest.approx(4, rel=0.2)
    assert skip["steps"] == round(0.7 * 4 / 0.25 / skip["batch"]) + max(1, round(0.3 * 4 / skip["batch"]))
    for row in (skip, dense):  # two batch sizes, then the other rate, and one beyond the better of the two
        first = {s["rate"]: s["loss"] for s in row["sweep"] if s["batch"] == row["batch"]}
        beyond = 2e-2 if first[1e-2] < first[1e-3] else 5e-4
        assert len(row["sweep"]) == 4 and set(first) == {1e-3, 1e-2, beyond}
        assert ("rate" in row["at_edge"]) == (row["rate"] == beyond)
    assert {(s["batch"], s["rate"]) for s in skip["sweep"]} >= {(1, 1e-3), (2, 1e-3), (skip["batch"], skip["rate"])}
    assert min(s["loss"] for s in skip["sweep"]) == next(
        s["loss"] for s in skip["sweep"] if (s["batch"], s["rate"]) == (skip["batch"], skip["rate"])
    )
    assert set(result["text"]["files"]) == {p.name for p in (world.folder / "tokens").glob("*.bin")}
    against = skip["against_dense"]["loss"]
    assert against["low"] < against["gap"] < against["high"]
    expected = 100 * math.expm1(skip["mean_loss"] - dense["mean_loss"])
    assert against["gap"] == pytest.approx(expected, abs=2e-3)
    assert dense["against_dense"]["loss"] == {"gap": 0.0, "low": 0.0, "high": 0.0}
    assert "elsewhere" in skip["against_dense"] and skip["loss_of"]["code"] == skip["mean_loss"]
    assert "this lemo has no mode" in result["left_out"].get("sparse 0.25", "this lemo has no mode")
    assert result["runs"]["count"] == len(world.trained) == len({str(s) for s in world.trained})


def test_an_interrupted_study_resumes(world: Any, q: Any) -> None:
    quick = (*SMALL, "--no-sweep", "--batches", 2)
    first = world.command(*quick)
    count = len(world.trained)
    assert first["missing"] == [] and count == 7  # not adapted; dense and two of skip, with two seeds
    again = world.command(*quick)
    assert len(world.trained) == count and again["rows"] == first["rows"]

    # Cut in the middle of a run: what was finished stays, and only the rest is made.
    runs = sorted((world.folder / "study" / "runs").iterdir())
    runs[0].unlink()
    (world.folder / "study" / "claims" / runs[0].stem).touch()
    third = world.command(*quick)
    assert len(world.trained) == count + 1
    for row, before in zip(third["rows"], first["rows"], strict=True):
        assert {k: v for k, v in row.items() if k != "train_s"} == {k: v for k, v in before.items() if k != "train_s"}

    with pytest.raises(SystemExit, match="holds runs with another items"):
        world.command(*quick, "--items", 1)


def test_no_time_left(world: Any, q: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing starts after the deadline, and a run that reaches it in the middle leaves nothing."""
    quick = (*SMALL, "--no-sweep")
    result = world.command(*quick, "--budget-minutes", 1e-9)
    assert world.trained == [] and result["rows"] == [] and len(result["missing"]) == 4

    def late(task: Any, spec: Any, deadline: float) -> Any:
        monkeypatch.setattr(q.quality.Study, "expected", lambda *_: math.inf)
        raise q.train.OutOfTime

    monkeypatch.setattr(q.quality, "train", late)
    world.command(*quick, "--budget-minutes", 5)
    assert "not finished in time" in capsys.readouterr().out
    assert not list((world.folder / "study" / "runs").iterdir())
    assert not list((world.folder / "study" / "claims").iterdir())


def test_a_run_that_fails_does_not_stop_the_others(
    world: Any, q: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named, the command ends with 1, and the next one tries it again."""
    real = q.quality.train

    def train(task: Any, spec: Any, deadline: float) -> Any:
        if spec.seed == 2 and spec.segments and spec.segments[0].phase["mode"] == "skip":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(task, spec, deadline)

    quick = (*SMALL[:-3], "--no-sweep", "--cost-at", 65536)
    with monkeypatch.context() as patch:
        patch.setattr(q.quality, "train", train)
        with pytest.raises(AssertionError):  # the command's 1
            world.command(*quick)
    result = json.loads((world.folder / "quality.json").read_text())
    assert "out of memory" in result["failed"][0] and "CUDA out of memory" in capsys.readouterr().err
    assert [len(r["seeds"]) for r in result["rows"][1:]] == [2] and len(result["missing"]) == 1
    result = world.command(*quick)
    assert result["failed"] == result["missing"] == []


def test_extension_and_answers(world: Any, q: Any) -> None:
    """Setting A interpolates positions; setting C asks questions, of a model without a tokenizer."""
    quick = ("--no-sweep", "--seeds", 1, "--sequences", 2, "--cost-at", 65536)
    result = world.command(*quick, "--context", 512, "--only", "windows 1/4", setting="A")
    assert [r["name"] for r in result["rows"]] == ["not adapted", "dense", "windows 1/4, then full"]
    assert result["rows"][2]["against_dense"]["loss"]["low"] is None  # one seed
    task = q.train.Task("A", str(world.folder / "model"), None, 512, 2)
    config = q.train.load_base(task).config
    assert config.rope_parameters["factor"] == 2.0 and config.max_position_embeddings == 512

    model: Any = tiny.build()
    model.resize_token_embeddings(256)
    model.save_pretrained(world.folder / "larger")
    words = ("--model", world.folder / "larger", "--study", world.folder / "answers", "--context", 1536)
    result = world.command(*quick, *words, "--only", "random subset 0.5", setting="C")
    row = result["rows"][2]
    assert 0 <= row["mean_accuracy"] <= 1 and len(row["accuracy_of"]) == 16
    assert set(row["against_dense"]) == {"loss", "accuracy", "to"}


def test_inputs_of_a_window(q: Any, world: Any) -> None:
    """A part of the same sequence, at the positions that it has there."""
    task = q.train.Task("B", str(world.folder / "model"), str(world.folder / "tokens"), 256, 2, "code")
    dense, sparse = {"mode": "dense"}, {"mode": "sparse", "density": 0.5}
    whole = q.train.Spec((q.schedules.Segment(2, dense),), 2, 1e-3, 5, "final")
    part = q.train.Spec((q.schedules.Segment(2, sparse, Fraction(1, 4)),), 2, 1e-3, 5, "final")
    offsets = []
    for full, window in zip(q.train.batches(task, whole), q.train.batches(task, part), strict=True):
        assert window["input_ids"].shape == (2, 64) and "position_ids" not in full
        for ids, places, row in zip(window["input_ids"], window["position_ids"], full["input_ids"], strict=True):
            assert torch.equal(row[places], ids)
            offsets.append(int(places[0]))
    assert len(set(offsets)) > 1


def test_windows_are_trained_in_any_mode(world: Any, q: Any) -> None:
    """Selection works within the window, at the places that it has in the whole sequence."""
    task = q.train.Task("B", str(world.folder / "model"), str(world.folder / "tokens"), 512, 2, "code")
    text = "50% sparse density=0.5 local=0 window=1/2; 50% skip keep=0.5 policy=random shared window=1/2"
    half, whole = (q.schedules.parse(t) for t in (text, text.replace(" window=1/2", "")))
    losses = []
    for stages in (half, whole):
        made = tuple(q.schedules.Segment(2, s.phase, s.window) for s in stages)
        result = q.train.train(task, q.train.Spec(made, 1, 1e-2, 5, "final"))
        assert result["steps"] == 4 and math.isfinite(result["train_loss"])
        losses.append(q.train.mean_loss(result))
    assert losses[0] != losses[1]


def test_workers_share_the_runs(world: Any) -> None:
    result = world.command(*SMALL, "--no-sweep", "--jobs", 2)
    assert result["missing"] == [] and result["runs"]["count"] == 7 and world.trained == []


@pytest.mark.parametrize(
    "visible, expected",
    [(None, ["0", "1", "2"]), ("3,1, 2", ["3", "1", "2"]), ("GPU-7a,GPU-9,0", ["GPU-7a", "GPU-9", "0"])],
)
def test_workers_stay_on_the_gpus_of_the_command(
    q: Any, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert q.quality.visible_gpus() == expected


# ---- pages -----------------------------------------------------------------------------------------------------------


def test_table_and_figure(world: Any, q: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = world.command(*SMALL, "--sequences", 2, 4, "--no-sweep")
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(q.pages, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(q.pages, "IMAGES", tmp_path)
    assert q.pages.tables() == []
    (tmp_path / "results" / "quality-tiny-B.json").write_text(json.dumps(result))
    text = "\n".join(q.pages.tables())
    for row in result["rows"]:
        assert f"| {row['name']}" in text
    assert "64K" in text and "256K" in text and "quality-tiny-B.json" in text and "quality-tiny-B.svg" in text

    assert q.pages.main(["--check"]) == 1
    assert q.pages.main([]) == 0 and q.pages.main(["--check"]) == 0
    drawn = (tmp_path / "quality-tiny-B.svg").read_text()
    tree = ElementTree.fromstring(drawn)
    marks = [e for e in tree.iter() if "mark" in e.get("class", "")]
    # Lines: two ways at two lengths. Below, each length's runs of both budgets, at their costs of either length.
    assert len(marks) == 2 * 2 + 2 * 2 * 4 and "front" in drawn and "prefers-color-scheme: dark" in drawn


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_costs_can_be_measured(
    q: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything that schedules of this lemo are made of; afterwards none of them lacks a cost."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    costs = importlib.import_module("quality_costs")
    out = tmp_path / "costs.json"
    words = ["--context", "256", "--model", "tiny", "--steps", "1", "--out", str(out)]
    assert costs.main([*words, "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names[0] == "dense keep 1 at 256" and {"dense keep 1 at 128", "skip keep 0.5 at 256"} <= set(names)
    assert costs.main(words) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["row"] for row in rows] == names and all(row["step_ms"] > 0 for row in rows)
    assert {row["policy"] for row in rows if row["row"] == "skip keep 0.5 at 256"} == {"predictors"}  # the dearest
    known = q.schedules.Costs.read([out], "tiny")
    for row in q.schedules.ROWS:
        if q.schedules.unavailable(row) is None:
            assert all(rate > 0 for rate in known.of_row(row, 256))


def test_chosen_steps_next_to_a_common_one(
    q: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No dense step: the common one stands in its place, and the file is not that of the dense step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    costs, common = importlib.import_module("quality_costs"), importlib.import_module("common")
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(costs, "WARM_TOKENS", 128)
    words = ["--context", "256", "--model", "tiny", "--steps", "1", "--common", "skip keep 0.3 at 256"]
    also = ["sparse density=0.125 window=1/2", "sparse keep=0.5 density=0.25 policy=random shared window=1/2"]
    words += ["--only", "backward", "sparse keep 1 density 0.25 at 128", "--also", *also]
    assert costs.main(words) == 0
    path = tmp_path / "benchmarks" / "results" / "costs-cpu-256-chained.json"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    rows = {row["row"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name: row["context"] for name, row in rows.items()} == {
        "skip keep 0.3 at 256": 256,
        "backward keep 0.5 weighted at 256": 256,
        "sparse keep 1 density 0.25 at 128": 128,
        "sparse keep 1 density 0.125 at 128": 128,
        "sparse keep 0.5 density 0.25 at 128": 128,
    }
    assert all(row["step_ms"] > 0 and row["steps"] == 1 and row["warmup_context"] == 128 for row in rows.values())

    dense = {"row": "dense", "method": "lemo", "mode": "dense", "context": 256, "recompute": "full", "step_ms": 100.0}
    shared = rows["skip keep 0.3 at 256"] | {"step_ms": 10.0}
    gpu = json.loads(path.read_text())["gpu"]
    other = tmp_path / "costs-cpu-256.json"
    other.write_text(json.dumps({"gpu": gpu, "rows": [dense | {"model": shared["model"]}, shared]}))
    known = q.schedules.Costs.read([path, other], "tiny")
    row = q.schedules.Row("r", "100% backward keep=0.5 policy=random weighted")
    ratio = rows["backward keep 0.5 weighted at 256"]["step_ms"] / rows["skip keep 0.3 at 256"]["step_ms"]
    assert known.of_row(row, 256) == [ratio * 10.0 / 100.0] and len(known.chained(row, 256)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--common", "skip keep 0.31 at 256"], "--common: no step is called 'skip keep 0.31 at 256'; there are dense"),
        (["--only", "spares"], "--only: no step's name contains 'spares'"),
        (["--also", "50 sparse"], "--also '50 sparse': "),
    ],
)
def test_steps_that_do_not_exist(q: Any, words: list[str], message: str) -> None:
    costs = importlib.import_module("quality_costs")
    with pytest.raises(SystemExit, match=re.escape(message)):
        costs.main(["--context", "256", "--list", *words])
