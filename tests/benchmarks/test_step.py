"""The benchmark of one LoRA step on a tiny shape, and what the pages and the figure make of its results."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
LIGER = "transformers + PEFT + Liger"


def step(*arguments: object) -> subprocess.CompletedProcess[str]:
    """benchmarks/step.py without a GPU, wherever the test runs."""
    command = [sys.executable, "benchmarks/step.py", *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The results file of a run that took every row, and its output."""
    out = tmp_path_factory.mktemp("results") / "step-cpu.json"
    done = step("--model", "tiny", "--layers", 2, "--context", 320, "--steps", 2, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of benchmarks/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("summary", "step_pages", "figure", "step", "common")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_every_row_is_measured_against_the_peer(smoke: tuple[dict[str, Any], str], benchmarks: Any) -> None:
    result, printed = smoke
    rows = {row["row"]: row for row in result["rows"]}
    assert list(rows) == ["peer", *(name for name in benchmarks.step.ROWS if name not in benchmarks.step.MORE)]
    peer = rows["peer"]
    for name, row in rows.items():
        assert (row["context"], row["recompute"], row["model"], row["steps"]) == (320, "full", "tiny, 2 layers", 2)
        assert row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"]
        assert row["peer"] == "transformers + PEFT" and row["peer_step_ms"] == peer["step_ms"]
        assert row["time_ratio"] == pytest.approx(peer["step_ms"] / row["step_ms"], abs=1e-3)
        assert "peak_mib" not in row and "memory_ratio" not in row  # nothing to measure without a GPU
        assert f"\n{name}  320" in printed
    kept = {name: row["kept"] for name, row in rows.items() if name != "peer"}
    assert kept["dense"] == 1.0 and kept["skip-0.5"] == kept["skip-0.5-calibrated"] == 0.6  # of five blocks
    assert kept["skip-0.3"] == kept["skip-0.3-calibrated"] == 0.4 and 0 < kept["backward-0.5"] < 1
    policies = {name: row["policy"] for name, row in rows.items()}
    assert policies["skip-0.5"] == "update_norm" and policies["skip-0.5-calibrated"] == "sampled shared"
    # Everything is within 8K keys: the step is the dense one.
    assert rows["sparse-8k-keys"]["computed"] == 1.0 and rows["sparse-8k-keys"]["loss"] == rows["dense"]["loss"]
    assert kept["skip-0.3-sparse-8k-keys"] == kept["skip-0.3"]
    for name, row in rows.items():
        if name != "peer":
            assert row["dense_ratio"] == pytest.approx(rows["dense"]["step_ms"] / row["step_ms"], abs=1e-3)
    assert rows["dense"]["loss"] == pytest.approx(peer["loss"], abs=1e-3)
    assert rows["skip-0.5"]["loss"] != rows["dense"]["loss"]


def test_the_check_comes_first_and_left_out_rows_have_reasons(smoke: tuple[dict[str, Any], str]) -> None:
    result, printed = smoke
    check = result["check"]
    assert check["loss_error"] <= check["loss_limit"] and 0 < check["gradient_error"] <= check["gradient_limit"]
    assert result["left_out"] == [{"row": LIGER, "reason": "liger-kernel needs a GPU"}]
    assert f"left out: {LIGER}: liger-kernel needs a GPU" in printed
    assert result["command"].startswith("python benchmarks/step.py --model tiny") and "--out" not in result["command"]


def test_no_weaker_peer_unasked() -> None:
    done = step("--model", "tiny", "--peer", "liger")
    assert done.returncode != 0
    assert "cannot run: liger-kernel needs a GPU. --peer plain compares with transformers + PEFT" in done.stderr


def test_a_wrong_loss_ends_the_run(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark would time something else than the peer's step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = benchmarks.step.make_base("tiny", layers=1)
    monkeypatch.setitem(benchmarks.step.ROWS, "dense", benchmarks.step.Row("skip", 0.5))
    with pytest.raises(SystemExit, match="nothing eliminated does not compute the peer's loss"):
        benchmarks.step.check(base, "transformers + PEFT", benchmarks.step.Saving("full"), 256)


def test_a_row_that_does_not_fit(benchmarks: Any) -> None:
    """512K tokens may fit with lemo and not with the peer: the rows stay, without ratios."""

    @contextlib.contextmanager
    def full() -> Any:
        yield full_model, None

    def full_model(**batch: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    full_model.parameters = lambda: [torch.nn.Parameter(torch.zeros(1))]  # type: ignore[attr-defined]
    base = SimpleNamespace(cuda=False, device=torch.device("cpu"), config=SimpleNamespace(vocab_size=10))
    found = benchmarks.step.measure(base, full(), 64, 1)
    assert found == {"error": "out of memory"}
    row = benchmarks.step.compare({"step_ms": 2.0, "peak_mib": 3}, {"method": LIGER, **found}, None)
    assert row == {"step_ms": 2.0, "peak_mib": 3, "peer": LIGER}


@pytest.mark.parametrize(("fits", "reference"), [(True, "none"), (False, "full")])
@pytest.mark.parametrize("recompute", [["none"], ["attention", "none"], ["none", "full"]])
def test_a_peer_that_cannot_save_everything_recomputes(
    benchmarks: Any, monkeypatch: pytest.MonkeyPatch, recompute: list[str], fits: bool, reference: str
) -> None:
    """Lemo's rows are then compared with the peer's fastest way that fits."""

    def peer_rows(base: Any, peers: Any, what: str, *_: Any) -> Any:
        yield {"recompute": what, **({"step_ms": 1.0} if fits or what == "full" else {"error": "out of memory"})}

    monkeypatch.setattr(benchmarks.step, "peer_rows", peer_rows)
    added: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> dict[str, Any]:
        added.append(row)
        return row

    found = benchmarks.step.measure_peers(None, [LIGER], recompute, 64, 1, add)
    assert found["none"]["recompute"] == reference and "step_ms" in found["none"]
    assert [row["recompute"] for row in added].count("full") == (recompute != ["none"] or not fits)


# ---- pages -----------------------------------------------------------------------------------------------------------


def write_result(folder: Path, name: str, context: int, date: str, fits: bool = True) -> None:
    same = {"context": context, "recompute": "full", "model": "llama3-8b", "peer": LIGER, "keep": 1.0, "policy": None}
    same |= {"weighted": False}
    peer = {"row": "peer", "method": LIGER, "mode": "dense"} | same
    peer |= {"step_ms": 14000.0, "peak_mib": 40960, "time_ratio": 1.0, "memory_ratio": 1.0}
    table = {
        "skip-0.3": ("skip", 0.3, 2000.0, 20480),
        "dense": ("dense", 1.0, 12500.0, 36864),
        "skip-0.5": ("skip", 0.5, 4000.0, 25600),
        "backward-0.5": ("backward", 0.5, 7000.0, 32768),
        "skip-0.5-calibrated": ("skip", 0.5, 4100.0, 25600),
    }
    rows = [peer if fits else peer | {"error": "out of memory"}]
    for row, (mode, keep, ms, mib) in table.items():
        values = {"row": row, "method": "lemo", "mode": mode, "keep": keep, "weighted": mode == "backward"}
        values |= {"step_ms": ms, "peak_mib": mib, "policy": "update_norm"}
        if fits:
            values |= {"time_ratio": 14000.0 / ms, "memory_ratio": mib / 40960}
        rows.append(same | values)
    result = {"gpu": "NVIDIA H100", "versions": {"torch": "2.11.0"}, "commit": "0" * 12, "date": date, "rows": rows}
    result |= {"command": "python benchmarks/step.py", "left_out": []}
    result["check"] = {"loss_error": 1e-5, "gradient_error": 0.02, "context": 2048}
    (folder / f"{name}.json").write_text(json.dumps(result))


@pytest.fixture
def results(benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(benchmarks.step_pages, "RESULTS", tmp_path)
    return tmp_path


def test_headline_and_figure(benchmarks: Any, results: Path) -> None:
    """Five rows in the order of the story, from the newest file that has them."""
    write_result(results, "step-h200", 65536, "2026-11-28T10:00:00+00:00")
    write_result(results, "step-a", 65536, "2026-11-27T10:00:00+00:00")
    write_result(results, "step-b", 16384, "2026-11-29T10:00:00+00:00")
    lines = benchmarks.step_pages.headline_table()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[2:] == [
        [LIGER, "14.00 s", "1.00 x", "40.0 GiB", "1.00 x"],
        ["lemo, nothing eliminated", "12.50 s", "1.12 x", "36.0 GiB", "0.90 x"],
        ["lemo, `skip` 0.5", "4.00 s", "3.50 x", "25.0 GiB", "0.62 x"],
        ["lemo, `skip` 0.3", "2.00 s", "7.00 x", "20.0 GiB", "0.50 x"],
        ["lemo, `backward` 0.5 weighted", "7.00 s", "2.00 x", "32.0 GiB", "0.80 x"],
    ]
    assert "64K tokens" in lines[0] and "step-h200.json" in lines[-1]

    drawn = benchmarks.figure.picture(benchmarks.step_pages.headline())
    assert drawn == benchmarks.figure.picture(benchmarks.step_pages.headline())
    bars = [
        e for e in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}rect") if e.get("class") != "ground"
    ]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert len(widths) == 10
    assert [w / widths[0] for w in widths[:5]] == pytest.approx([1, 12.5 / 14, 4 / 14, 2 / 14, 7 / 14], abs=1e-3)
    assert [w / widths[5] for w in widths[5:]] == pytest.approx([1, 0.9, 0.625, 0.5, 0.8], abs=1e-3)
    assert "prefers-color-scheme: dark" in drawn


def test_offloaded_rows_follow_the_headline(benchmarks: Any, results: Path) -> None:
    """Those that save attention's output; not the only one that saves everything."""
    write_result(results, "step-h200", 65536, "2026-11-28T10:00:00+00:00")
    path = results / "step-saved-h200.json"
    write_result(results, path.stem, 65536, "2026-11-28T09:00:00+00:00")
    result = json.loads(path.read_text())
    for row in result["rows"][1:]:
        row |= {"recompute": "attention", "offload": "all", "host_mib": 2048.0}
    backward = next(row for row in result["rows"] if row["mode"] == "backward")
    result["rows"].append(backward | {"recompute": "none", "step_ms": 5600.0, "time_ratio": 2.5})
    path.write_text(json.dumps(result))
    found = [line for line in benchmarks.step_pages.offloaded() if line.startswith("| lemo, `backward`")]
    assert [line.split("|")[1:4] for line in found] == [
        [" lemo, `backward` 0.5 weighted ", " 7.00 s ", " 2.00 x "],
    ]


def test_without_a_peer_there_is_no_headline(benchmarks: Any, results: Path) -> None:
    assert benchmarks.step_pages.headline() is None
    write_result(results, "step-h100", 65536, "2026-11-28T10:00:00+00:00", fits=False)
    assert benchmarks.step_pages.headline() is None  # no ratio to a peer that did not fit


def test_full_tables(benchmarks: Any, results: Path, smoke: tuple[dict[str, Any], str]) -> None:
    """Of a real file, without memory, and of one with rows that did not fit."""
    (results / "step-cpu.json").write_text(json.dumps(smoke[0]))
    write_result(results, "step-h100", 524288, "2026-11-28T10:00:00+00:00", fits=False)
    text = "\n".join(benchmarks.step_pages.steps())
    assert "| 512K | full | transformers + PEFT + Liger |  | out of memory |" in text
    assert "| 512K | full | lemo, `skip` 0.3 | update_norm | 2,000 ms |  |  | 20,480 MiB |  | " in text
    assert "| 320 | full | lemo, `skip` 0.5 | sampled shared |" in text
    assert f"Left out: {LIGER}: liger-kernel needs a GPU." in text


def test_markers_are_needed(benchmarks: Any, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- headline: benchmarks/summary.py -->\nold\n<!-- end of headline -->\nb\n")
    text = benchmarks.summary.rewritten(page, "headline", ["new", ""])
    assert text == "a\n<!-- headline: benchmarks/summary.py -->\nnew\n<!-- end of headline -->\nb\n"
    with pytest.raises(SystemExit, match=r"README\.md: expected one line <!-- measured"):
        benchmarks.summary.rewritten(page, "measured", [])


def test_without_a_peer(tmp_path: Path) -> None:
    out = tmp_path / "step-cpu.json"
    rows = ("dense", "sparse-0.25")
    common = ("--model", "tiny", "--layers", 1, "--context", 700, "--steps", 1, "--peer", "none")
    done = step(*common, "--only", *rows, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["check"] is None and result["left_out"] == [{"row": "peer", "reason": "--peer none"}]
    assert [row["row"] for row in result["rows"]] == list(rows)
    assert all("time_ratio" not in row and row["dense_ratio"] > 0 for row in result["rows"])
    assert 0.5 < result["rows"][1]["computed"] < 1 and result["rows"][1]["density"] == 0.25


def test_a_command_can_be_pasted(benchmarks: Any) -> None:
    given = ["benchmarks/quality_costs.py", "--out", "/tmp/a.json", "--only", "skip keep 0.5", "--model", "/data/m"]
    assert benchmarks.common.command(given) == ("python benchmarks/quality_costs.py --only 'skip keep 0.5' --model m")
    script = str(benchmarks.common.ROOT / "benchmarks" / "step.py")  # started from elsewhere
    assert benchmarks.common.command([script, "--context", "512"]) == "python benchmarks/step.py --context 512"


# ---- what is saved, and peers ----------------------------------------------------------------------------------------


def test_what_is_saved_and_where(tmp_path: Path, benchmarks: Any) -> None:
    """Every combination is a row; none of them changes a loss, and ratios are to lemo's dense step saved alike."""
    out = tmp_path / "step-cpu.json"
    ways = ("--recompute", "full", "attention", "none", "--offload", 0, 1, "all")
    small = ("--model", "tiny", "--layers", 2, "--context", 320, "--steps", 1)
    done = step(*small, *ways, "--peer", "plain", "liger-offload", "--only", "dense", "backward-0.5", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    by = {(row["row"], row["recompute"], row["offload"]): row for row in result["rows"]}
    dense = {key[1:]: row for key, row in by.items() if key[0] == "dense"}
    backward = {key[1:]: row for key, row in by.items() if key[0] == "backward-0.5"}
    moved = [(recompute, layers) for recompute in ("full", "attention") for layers in (0, 1, "all")]
    assert list(dense) == [*moved, ("none", 0)]
    # With "attention" it saves what it saves with "full"; and everything of it can be moved.
    assert list(backward) == [(recompute, layers) for recompute in ("full", "none") for layers in (0, 1, "all")]
    assert len({row["loss"] for row in dense.values()}) == len({row["loss"] for row in backward.values()}) == 1
    row = 320 * 128 * 4  # bytes of a layer's input, and of attention's output; the log-sum-exp of two heads
    assert "host_mib" not in dense["attention", 0]
    # Of both layers only the first one's rows leave: the last one's are needed back at once.
    assert dense["full", "all"]["host_mib"] == dense["full", 1]["host_mib"] == row / 2**20
    assert dense["attention", 1]["host_mib"] == (2 * row + 320 * 2 * 4) / 2**20
    assert dense["attention", "all"]["host_mib"] == dense["attention", 1]["host_mib"]
    assert backward["none", "all"]["host_mib"] > 2 * backward["full", "all"]["host_mib"]
    for way, row in backward.items():
        if way in dense:
            assert row["dense_ratio"] == pytest.approx(dense[way]["step_ms"] / row["step_ms"], abs=1e-3)
    for recompute, of in (("full", "full"), ("attention", "full"), ("none", "none")):
        found = [row for row in (*dense.values(), *backward.values()) if row["recompute"] == recompute]
        assert found and all(row["peer_step_ms"] == by["peer", of, 0]["step_ms"] for row in found)
    assert "TRL activation offloading" in result["left_out"][0]["row"]
    assert benchmarks.step_pages.saved(dense["attention", "all"]) == "attention, all layers offloaded"
    assert benchmarks.step_pages.saved(by["peer", "full", 0]) == "full"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--recompute", "none", "--offload", "all", "--only", "dense", "backward-0.5"),
            "--recompute none with --offload is for mode backward, and leaves no way to measure dense:",
        ),
        (
            ("--offload", "few"),
            "expected all, auto, none, a number of layers or a size of host memory, like 64GiB; got 'few'",
        ),
        (("--model", "tiny", "--offload", "4"), "--offload: the model has 3 layers, got 4"),
        (("--peer", "none", "plain"), "--peer: expected none or names of peers"),
        (
            ("--memory-budget", "1GiB", "--recompute", "full", "attention"),
            "--memory-budget decides what lemo recomputes",
        ),
    ],
)
def test_options_that_do_not_fit_together(
    benchmarks: Any, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmarks.step.parse(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_a_budget_leaves_to_say(benchmarks: Any) -> None:
    step = benchmarks.step
    args = step.parse(["--memory-budget", "40GiB", "--offload", "auto", "none", "--recompute-layers", "4"])
    auto, none = step.savings(step.ROWS["dense"], args)
    assert (auto.offload, none.offload) == ("auto", 0)
    assert auto.fields == {
        "recompute": "by budget",
        "offload": "auto",
        "memory_budget": 40 << 30,
        "recompute_layers": 4,
    }
    config = step.settings(step.ROWS["dense"], auto, Path())
    assert (config.recompute, config.offload, config.budget, config.recompute_layers) == ("auto", "auto", 40 << 30, 4)
    assert benchmarks.step_pages.saved(auto.fields) == "by budget, offload auto"
    assert step.settings(step.ROWS["dense"], step.Saving("full", "all"), Path()).offload is True


def test_which_peers_run(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first must run; of the others, those that cannot are left out with their reasons."""
    step = benchmarks.step
    monkeypatch.setattr(step, "missing", lambda name: "no trl" if "TRL" in name else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert step.choose_peers(None, "llama3-8b") == ([LIGER], [])
    names, left_out = step.choose_peers(["liger", "plain", "trl"], "llama3-8b")
    assert names == [LIGER, "transformers + PEFT"]
    assert left_out == [{"row": "transformers + PEFT + TRL chunked loss", "reason": "no trl"}]
    with pytest.raises(SystemExit, match="cannot run: no trl"):
        step.choose_peers(["trl", "liger"], "llama3-8b")
    with pytest.raises(SystemExit, match=r"Llama models only, and opt-1\.3b is not one"):
        step.choose_peers(None, "opt-1.3b")
    assert step.choose_peers(["none"], "opt-1.3b")[0] == []


def test_the_loss_of_trl_is_its_trainers(benchmarks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is called as `add_fused_lm_head` does, and the step has the plain peer's loss and gradients."""
    utils = pytest.importorskip("trl.trainer.utils")
    rivals = benchmarks.step.sys.modules["rivals"]
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == rivals._CHUNK
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base = benchmarks.step.make_base("tiny", layers=1)
    ids = benchmarks.step.document(base, 96)
    found = {}
    for name in (rivals.PLAIN, rivals.TRL):
        with rivals.peer(base, name, "full") as (model, _):
            found[name] = benchmarks.step.gradients(model, ids)
    with rivals.peer(base, rivals.PLAIN, "full") as (model, _):
        utils.add_fused_lm_head(model.get_base_model(), outputs=rivals._OUTPUTS)
        fused = model(input_ids=ids, labels=ids, fused_lm_head=True).loss
    assert found[rivals.TRL][0] == fused.item() == pytest.approx(found[rivals.PLAIN][0], rel=1e-5)
    torch.testing.assert_close(found[rivals.TRL][1], found[rivals.PLAIN][1], rtol=1e-4, atol=1e-6)
