"""What a resumed run believes: other places, changed files, damaged files, odd names, other versions, kills."""

from __future__ import annotations

import json
import shutil
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lemo.cli import main
from lemo.predictors import PredictorSet
from lemo.storage import content_digest
from lemo.training import settings
from lemo.training.checkpoint import MANIFEST, CheckpointError, Checkpoints, locked
from lemo.training.plots import summary
from lemo.training.run_folder import (
    run_settings,
    start_run,
)
from lemo.training.run_log import RunLog, read_log
from lemo.training.settings import FinetuneSettings

SIZES = "--context 64 --block-size 8 --steps 4 --batch 1 --warmup 2 --lr 1e-2"
OPTIONS = [*SIZES.split(" "), "--save-every", "2", "--quiet"]
NEEDED: tuple[str, ...] = ("adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "scheduler.pt")
NEEDED += ("rng_state.pth", "trainer_state.json")


def resume(out: Path, *options: str) -> int:
    return main(["finetune", "--out", str(out), "--resume", "--save-every", "2", "--quiet", *options])


def adapter_of(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


class Setting:
    """A model, a text and a calibration of the test's own, and a run over them that was stopped after step 2."""

    def __init__(self, root: Path) -> None:
        self.root, self.out = root, root / "run"
        self.model, self.text, self.calibration = root / "model", root / "text", root / "calibration"

    def copy(self, folder: Path) -> Setting:
        """Copies of everything at another place. The run still names the places of the original."""
        shutil.copytree(self.root, folder)
        return Setting(folder)


@pytest.fixture(scope="module")
def original(
    model_folder: Path, text_folder: Path, calibration_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    made = Setting(tmp_path_factory.mktemp("original"))
    shutil.copytree(model_folder, made.model)
    shutil.copytree(calibration_folder, made.calibration)
    made.text.mkdir()
    for path in sorted(text_folder.glob("d0*.txt")):
        shutil.copy(path, made.text)
    command = ["finetune", "--model", str(made.model), "--data", str(made.text), "--calibration", str(made.calibration)]
    assert main([*command, "--out", str(made.out), *OPTIONS]) == 0
    return made


@pytest.fixture(scope="module")
def whole(original: Setting) -> bytes:
    """The adapter of the run that was never stopped."""
    return adapter_of(original.out)


@pytest.fixture
def stopped(original: Setting, whole: bytes, tmp_path: Path) -> Setting:
    """A copy of the run, stopped after step 2."""
    made = Setting(tmp_path / "stopped")
    shutil.copytree(original.out, made.out)
    shutil.rmtree(made.out / "adapter")
    shutil.rmtree(made.out / "checkpoint-4")
    made.model, made.text, made.calibration = original.model, original.text, original.calibration
    return made


def change_run(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((out / "run.json").read_text())
    change(values)
    (out / "run.json").write_text(json.dumps(values, indent=1))


# ---- other places ----------------------------------------------------------------------------------------------------


def test_inputs_that_moved(original: Setting, stopped: Setting, whole: bytes, tmp_path: Path, capsys) -> None:
    """Refused where they are gone; accepted at their new place, recorded, and the result is bit for bit the same."""
    moved = original.copy(tmp_path / "moved")
    for name, place in (("model", original.model), ("text", original.text), ("calibration", original.calibration)):
        place.rename(place.with_name("gone-" + name))
    try:
        places = {"--model": moved.model, "--data": moved.text, "--calibration": moved.calibration}
        for i, option in enumerate(places):
            some = [str(x) for pair in list(places.items())[:i] for x in pair]
            assert resume(stopped.out, *some) == 2
            said = capsys.readouterr().err
            assert f"{option} " in said and f"--resume {option} NEW" in said and "Traceback" not in said
        assert resume(stopped.out, *[str(x) for pair in places.items() for x in pair]) == 0
        said = capsys.readouterr().err
        assert "the same content at another place" in said and f"is now {moved.model}" in said
    finally:
        for name, place in (("model", original.model), ("text", original.text), ("calibration", original.calibration)):
            place.with_name("gone-" + name).rename(place)
    assert adapter_of(stopped.out) == whole
    (event,) = run_settings(stopped.out)["events"]
    assert event["step"] == 2 and event["environment"] == {}
    assert event["moved"]["model"] == {"was": str(original.model), "now": str(moved.model)}
    assert set(event["moved"]) == {"model", "data", "calibration"}
    # The next time, the new places are the run's.
    assert run_settings(stopped.out)["inputs"]["data"] == [str(moved.text)]
    shutil.rmtree(stopped.out / "adapter")
    assert resume(stopped.out) == 0 and adapter_of(stopped.out) == whole
    assert len(run_settings(stopped.out)["events"]) == 1


def test_the_default_dtype_may_be_named(stopped: Setting, whole: bytes, capsys) -> None:
    for dtype in ("bfloat16", "float16"):
        assert resume(stopped.out, "--dtype", dtype) == 2
        assert f"dtype: the run has None, now '{dtype}'" in capsys.readouterr().err
    assert resume(stopped.out, "--dtype", "float32") == 0
    assert adapter_of(stopped.out) == whole and run_settings(stopped.out)["inputs"]["dtype"] is None
    shutil.rmtree(stopped.out / "adapter")
    assert resume(stopped.out, "--dtype", "auto") == 0 and adapter_of(stopped.out) == whole


@pytest.mark.parametrize("what", ["model", "data", "calibration"])
def test_other_content_at_a_new_place(
    original: Setting, stopped: Setting, whole: bytes, tmp_path: Path, capsys, what: str
) -> None:
    moved = original.copy(tmp_path / "moved")
    new, field = moved.model, "model_fingerprint.embeddings_and_norms"
    if what == "model":
        change_weights(moved.model / "model.safetensors")
    elif what == "data":
        (moved.text / "d00.txt").write_text("other words of the same place")
        new, field = moved.text, "data_sha256"
    else:
        exchange_calibration(moved.calibration)
        new, field = moved.calibration, "calibration_sha256"
    before = {p: p.read_bytes() for p in stopped.out.rglob("*") if p.is_file()}
    assert resume(stopped.out, f"--{what}", str(new)) == 2
    said = capsys.readouterr().err
    assert f"{field}: the run has" in said and str(new) in said
    assert {p: p.read_bytes() for p in stopped.out.rglob("*") if p.is_file()} == before
    assert resume(stopped.out) == 0 and adapter_of(stopped.out) == whole


def change_weights(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def exchange_calibration(folder: Path) -> None:
    predictors = PredictorSet.load(folder)
    predictors.thresholds = tuple(t + 1 for t in predictors.thresholds)
    predictors.save(folder, overwrite=True)


def test_a_calibration_exchanged_at_its_place(
    original: Setting, stopped: Setting, whole: bytes, tmp_path, capsys
) -> None:
    kept = shutil.copytree(original.calibration, tmp_path / "kept")
    exchange_calibration(original.calibration)
    try:
        assert resume(stopped.out) == 2
        assert "calibration_sha256: the run has" in capsys.readouterr().err
    finally:
        shutil.rmtree(original.calibration)
        shutil.copytree(kept, original.calibration)
    assert resume(stopped.out) == 0 and adapter_of(stopped.out) == whole


def test_another_split_of_the_same_data(
    model_folder: Path, text_folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version of lemo might hold other documents out."""
    import lemo.training.finetune

    out, real = tmp_path / "run", lemo.training.finetune.split_held_out  # type: ignore[attr-defined]
    command = ["finetune", "--model", str(model_folder), "--data", str(text_folder), "--dense", "--held-out", "0.2"]
    assert main([*command, "--out", str(out), *OPTIONS]) == 0
    monkeypatch.setattr(
        lemo.training.finetune, "split_held_out", lambda d, fraction, seed, *_, **__: real(d, fraction, seed + 1)
    )
    shutil.rmtree(out / "adapter")
    assert resume(out) == 2
    assert "training_sha256: the run has" in capsys.readouterr().err


# ---- changed by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 2), ("steps", 6), ("lr", 0.5), ("lora_rank", 4), ("warmup", 1), ("max_grad_norm", 0.1), ("batch", 2)],
)
def test_settings_changed_in_run_json(stopped: Setting, capsys, field: str, value: Any) -> None:
    change_run(stopped.out, lambda run: run["settings"].update({field: value}))
    assert resume(stopped.out) == 2
    said = capsys.readouterr().err
    assert "run.json was changed after the run began" in said
    assert f"{field}: checkpoint-2 has" in said and f"now {value}" in said


def test_a_preset_with_another_meaning_by_now(
    stopped: Setting, whole: bytes, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """The run goes on with the phases that it began with; asking for the preset asks for what it means now."""
    began = run_settings(stopped.out)["settings"]["schedule"]
    assert began == settings.PRESETS["default"] != "default"
    monkeypatch.setitem(settings.PRESETS, "default", "dense")
    assert resume(stopped.out, "--schedule", "default") == 2
    assert f"schedule: the run has {began!r}, now 'dense'" in capsys.readouterr().err
    assert resume(stopped.out) == 0 and adapter_of(stopped.out) == whole


@pytest.mark.parametrize("changed", [False, True])
def test_a_run_that_recorded_the_name_of_its_preset(
    stopped: Setting, whole: bytes, monkeypatch: pytest.MonkeyPatch, capsys, changed: bool
) -> None:
    """As earlier versions did, in run.json and in checkpoints: it means what it meant to them."""
    if changed:
        monkeypatch.setitem(settings._FORMERLY, "default", settings.PRESETS["default"])
        monkeypatch.setitem(settings.PRESETS, "default", "dense")
    for path in (stopped.out / "run.json", *stopped.out.glob(f"checkpoint-*/{MANIFEST}")):
        values = json.loads(path.read_text())
        of = values["settings"] if path.name == "run.json" else values["settings"]["settings"]
        of["schedule"] = "default"
        del values["digest"]
        path.write_text(json.dumps(values | {"digest": content_digest(values)}))
    named = resume(stopped.out, "--schedule", "default")
    if changed:
        assert named == 2 and "now 'dense'" in capsys.readouterr().err
        named = resume(stopped.out)
    assert named == 0 and adapter_of(stopped.out) == whole


def test_what_presets_meant_to_earlier_versions() -> None:
    """A run that records the name has trained that: windows of a quarter, sparse throughout; whole windows."""
    assert FinetuneSettings.from_json({"schedule": "extension"}).window_lengths() == [1024, 4096]
    assert FinetuneSettings(schedule="extension").window_lengths() == [512, 4096]
    before = FinetuneSettings.from_json({"schedule": "long-context"})
    assert before.schedule == settings.PRESETS["whole-documents"] and before.window_lengths() == [4096, 4096]
    assert FinetuneSettings(schedule="long-context").window_lengths() == [1024, 4096]


def test_settings_changed_before_the_first_checkpoint(stopped: Setting, capsys) -> None:
    shutil.rmtree(stopped.out / "checkpoint-2")
    change_run(stopped.out, lambda run: run["settings"].update(lr=0.5))
    assert resume(stopped.out) == 2
    assert "run.json was changed after the run began, and there is no checkpoint" in capsys.readouterr().err


def test_settings_changed_after_the_end(original: Setting, tmp_path: Path, capsys) -> None:
    out = shutil.copytree(original.out, tmp_path / "run")
    change_run(out, lambda run: run["settings"].update(seed=7))
    assert resume(out) == 2
    assert "seed: checkpoint-4 has 1, now 7" in capsys.readouterr().err


def test_a_harmless_change_is_said_and_recorded(stopped: Setting, whole: bytes, capsys) -> None:
    change_run(stopped.out, lambda run: run.update(started="never"))
    assert resume(stopped.out) == 0 and adapter_of(stopped.out) == whole
    assert "run.json was changed after the run began; going by what checkpoint-2 holds" in capsys.readouterr().err
    values = run_settings(stopped.out)
    assert values["digest"] == content_digest(values) and len(values["events"]) == 1


@pytest.mark.parametrize(
    "content",
    ["", "[]", "7", "{}", '{"settings": []}', '{"settings": {"steps": "many"}}', '{"settings": {"lora_targets": 3}}',
     '{"settings": {}, "inputs": [1]}', '{"settings": {}}', '{"settings": {"keep": null}}', "\xff"],
)  # fmt: skip
def test_a_run_json_of_the_wrong_shape(stopped: Setting, capsys, content: str) -> None:
    (stopped.out / "run.json").write_bytes(content.encode("latin1"))
    for command in (["finetune", "--resume", "--out"], ["report", "--no-png"], ["info"]):
        code = main([*command, str(stopped.out)])
        said = capsys.readouterr().err
        assert "Traceback" not in said and "Error:" not in said
        assert code == 2 or command[0] != "finetune"
        assert "run.json" in said or code == 0


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("digest", ["old", "new"])
def test_a_manifest_that_leaves_a_part_out(
    original: Setting, whole: bytes, tmp_path: Path, capsys, missing: str, digest: str
) -> None:
    """The part is needed, whatever the manifest says; the checkpoint before it is used."""
    out = shutil.copytree(original.out, tmp_path / "run")
    shutil.rmtree(out / "adapter")
    path = out / "checkpoint-4" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["files"][missing]
    if digest == "new":
        manifest["digest"] = content_digest(manifest)
    path.write_text(json.dumps(manifest))
    (path.parent / missing).unlink()
    assert resume(out) == 0 and adapter_of(out) == whole
    said = capsys.readouterr().err
    assert "not used" in said and (f"lists no {missing}" if digest == "new" else "its own digest differs") in said
    assert "resuming from step 2" in said


def test_other_versions_are_said_and_recorded(stopped: Setting, whole: bytes, monkeypatch, capsys) -> None:
    monkeypatch.setattr("lemo.__version__", "0.0.9")
    assert resume(stopped.out) == 0 and adapter_of(stopped.out) == whole
    said = capsys.readouterr().err
    assert "WARNING: the run resumes in another environment: lemo was" in said and "is now 0.0.9" in said
    (event,) = run_settings(stopped.out)["events"]
    assert event["environment"]["lemo"]["now"] == "0.0.9" and set(event["environment"]) == {"lemo"}
    assert resume(stopped.out) == 0
    assert "WARNING" not in capsys.readouterr().err


def test_checkpoints_of_another_format_are_not_destroyed(stopped: Setting, capsys) -> None:
    path = stopped.out / "checkpoint-2" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    path.write_text(json.dumps(manifest | {"format": 1}))
    assert resume(stopped.out) == 2
    said = capsys.readouterr().err
    assert "cannot continue" in said and "another version of lemo (format 1" in said
    assert path.is_file()


# ---- odd names -------------------------------------------------------------------------------------------------------


def test_odd_names_of_folders(stopped: Setting, whole: bytes, capsys) -> None:
    """Names that lemo does not write are reported and left alone, through saving and clearing up too."""
    out = stopped.out
    for name in (
        "checkpoint-0001",
        "checkpoint-abc",
        "checkpoint-",
        "checkpoint-²",
        "checkpoint-1 (copy)",
        "checkpoint--3",
    ):
        (out / name).mkdir()
    (out / "checkpoint-1.zip").write_text("a file")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-3")  # a copy is not what step 3 wrote
    odd = sorted(p.name for p in out.glob("checkpoint-*") if p.name != "checkpoint-2")
    assert resume(out, "--keep-checkpoints", "1") == 0 and adapter_of(out) == whole
    said = capsys.readouterr().err
    for name in odd:
        assert f"{name}: " in said
    assert "checkpoint-3: written at step 2" in said and "resuming from step 2" in said
    left = {p.name for p in out.glob("checkpoint-*")}
    assert left == {*odd, "checkpoint-4"} - {"checkpoint-3"}
    assert main(["info", str(out)]) == 0


@pytest.mark.parametrize("kind", ["file", "dangling"])
def test_something_in_the_way_of_a_checkpoint(stopped: Setting, whole: bytes, capsys, kind: str) -> None:
    way = stopped.out / "checkpoint-4"
    way.write_text("mine") if kind == "file" else way.symlink_to("nowhere")
    assert resume(stopped.out) == 2
    said = capsys.readouterr().err
    assert "cannot continue" in said and "checkpoint-4" in said and "Traceback" not in said
    assert way.is_symlink() or way.read_text() == "mine"
    way.unlink()
    assert resume(stopped.out) == 0 and adapter_of(stopped.out) == whole


def test_a_checkpoint_behind_a_symbolic_link(stopped: Setting, whole: bytes, tmp_path: Path) -> None:
    """It is read, for its digests hold; when its turn comes to go, the link goes and what it names stays."""
    (stopped.out / "checkpoint-2").rename(tmp_path / "elsewhere")
    (stopped.out / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    assert resume(stopped.out, "--keep-checkpoints", "1") == 0 and adapter_of(stopped.out) == whole
    assert [p.name for p in stopped.out.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (tmp_path / "elsewhere" / "optimizer.pt").is_file()


def test_an_adapter_that_is_none(stopped: Setting, whole: bytes, capsys) -> None:
    (stopped.out / "adapter").mkdir()
    assert resume(stopped.out) == 2
    assert "adapter is not a complete adapter" in capsys.readouterr().err
    (stopped.out / "adapter").rmdir()
    assert resume(stopped.out) == 0 and adapter_of(stopped.out) == whole


def test_a_later_damaged_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(8, lambda folder: (folder / "weights").write_text("eight"))
    (tmp_path / "checkpoint-8" / "weights").write_text("EIGHT")
    checkpoints.save(6, lambda folder: (folder / "weights").write_text("six"))
    assert [c.step for c in checkpoints.find().checkpoints] == [6]


# ---- stopped at the very beginning and at the very end ---------------------------------------------------------------


@pytest.mark.parametrize("moment", ["written", "flushed"])
def test_killed_while_run_json_is_written(tmp_path: Path, run_script, moment: str) -> None:
    """Nothing had begun: a new run may start in the folder, and what was left in it is gone."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        import lemo.storage
        from lemo.training.checkpoint import locked
        from lemo.training.run_folder import start_run
        die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "written":
            lemo.storage.flush = die
        else:
            os.replace = die
        with locked(Path(sys.argv[1])):
            start_run(Path(sys.argv[1]), {"settings": {}})
        """
    )
    out = tmp_path / "run"
    code, said = run_script(script, str(out), moment)
    assert code == -signal.SIGKILL, said
    assert {p.name[:17] for p in out.iterdir()} == {".lock", ".writing-run.json"}
    with pytest.raises(CheckpointError, match="not a run folder; start a run with"):
        run_settings(out)
    with locked(out):
        start_run(out, {"settings": {"lr": 1}})
    assert sorted(p.name for p in out.iterdir()) == [".lock", "run.json"]
    assert run_settings(out)["settings"] == {"lr": 1}


def test_the_lock_is_held_until_the_adapter_is_there(original: Setting, tmp_path: Path, monkeypatch) -> None:
    import lemo.training.finetune

    real, tried = lemo.training.finetune.write_folder, []  # type: ignore[attr-defined]

    def write_folder(target: Path, *args: Any, **kwargs: Any) -> None:
        if target.name == "adapter":
            with pytest.raises(CheckpointError, match="another process"), locked(target.parent):
                pass
            tried.append(target)
        real(target, *args, **kwargs)

    monkeypatch.setattr(lemo.training.finetune, "write_folder", write_folder)
    out = tmp_path / "run"
    command = ["finetune", "--model", str(original.model), "--data", str(original.text), "--dense"]
    assert main([*command, "--out", str(out), *OPTIONS]) == 0
    assert tried == [out / "adapter"]
    with locked(out):
        pass


# ---- lines of the log ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    ["7", "null", "[]", '"step"', '{"step": "one", "loss": 1}', '{"step": 1, "loss": "x"}', '{"loss": 1}',
     '{"step": 1, "lo', '{"step": 1, "loss": 2, "kept": 3}', '{"event": "held-out", "step": 1}', '{"event": 1}',
     '{"step": true, "loss": 1}', '{"step": 1, "loss": NaN}', "\xff\x00", "[" * 5000],
)  # fmt: skip
def test_log_lines_of_the_wrong_shape(stopped: Setting, whole: bytes, capsys, line: str) -> None:
    path = stopped.out / "log.jsonl"
    intact = read_log(path)
    path.write_bytes(line.encode("latin1") + b"\n" + path.read_bytes())
    lines: list[str] = []
    assert read_log(path, lines.append) == intact
    assert lines == ([] if line == "null" else [f"{path}: left out line 1, cut short or damaged"])
    RunLog(path).cut(2)
    assert read_log(path) == [r for r in intact if r.get("step", 0) <= 2]
    assert main(["report", str(stopped.out), "--no-png"]) == 0


def test_the_log_is_json_whatever_happens(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl")
    log.write(step=3, loss=float("nan"), grad_norm=float("inf"), tokens_per_second=1.0, peak_memory_bytes=2, kept=[1.0])
    text = log.path.read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None and record["grad_norm"] is None
    assert record["note"] == "loss is nan, grad_norm is inf"
    assert "nan" in summary(read_log(log.path))
