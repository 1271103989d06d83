"""Fine-tuning from the command line: the log, the adapter, checkpoints, exact resumption."""

from __future__ import annotations

import json
import shutil
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from lemo.cli import main
from lemo.data import load_documents
from lemo.training import settings
from lemo.training.finetune import finetune as finetune_documents
from lemo.training.settings import FinetuneSettings, default_schedule, parse_schedule
from lemo.training.trainer import RunInProgress
from lemo.training.windows import tokens_read
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

SCHEDULE = "skip:0.5:update_norm@0.5,backward:0.5:weighted@0.25,dense@0.25"
SIZES = "--context 64 --block-size 8 --steps 8 --batch 2 --warmup 2 --lr 1e-2"
OPTIONS = [*SIZES.split(" "), "--save-every", "3", "--quiet"]


def finetune(model: Path, data: Path, out: Path, *options: str) -> int:
    return main(["finetune", "--model", str(model), "--data", str(data), "--out", str(out), *OPTIONS, *options])


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.fixture(scope="module")
def finished(model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert finetune(model_folder, text_folder, out, "--schedule", SCHEDULE, "--held-out", "0.1") == 0
    return out


def test_a_memory_budget_and_offload(
    model_folder: Path, text_folder: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same adapter, and what was chosen in the log and in `lemo info`."""
    options = ("--schedule", SCHEDULE, "--held-out", "0.1", "--memory-budget", "1GiB", "--offload", "1")
    assert finetune(model_folder, text_folder, tmp_path / "run", *options) == 0
    assert_same_adapter(finished, tmp_path / "run")
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert steps[0]["memory"]["layers"] == {"attention": 1, "none": 1} and steps[0]["memory"]["offloaded"] == 1
    said = capsys.readouterr().err
    for numbers, phase in (("1-4", "skip keep 0.5"), ("5-6", "backward keep 0.5"), ("7-8", "dense keep 1")):
        assert f"planned for steps {numbers}, {phase}: layers recompute" in said
    assert main(["info", str(tmp_path / "run")]) == 0
    assert "what layers save" in (text := capsys.readouterr().out) and "memory_budget: 1073741824" in text


def test_a_budget_that_is_too_small_makes_no_run(
    model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    schedule = ("--schedule", "skip:window=1/2@0.5,dense@0.5")
    assert finetune(model_folder, text_folder, tmp_path / "run", "--memory-budget", "1KiB", *schedule) == 2
    said = capsys.readouterr().err
    assert "the steps of 2 phases do not fit: mode 'skip' keep 0.5 with 64 tokens needs at least" in said
    assert "; mode 'dense' keep 1 with 128 tokens needs at least" in said
    assert not (tmp_path / "run" / "run.json").exists()


def test_the_run_folder(finished: Path) -> None:
    # The last two: every third step, and the last one.
    assert sorted(p.name for p in finished.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    log = records(finished)
    steps = [r for r in log if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    for r in steps:
        assert r["tokens_per_second"] > 0 and r["peak_memory_bytes"] > 0 and r["lr"] is not None
        assert len(r["kept"]) == 2
    assert all(0 < k < 0.9 for k in steps[0]["kept"])
    assert steps[-1]["kept"] == [1.0, 1.0]
    assert len({json.dumps(r["phase"]) for r in steps}) == 3
    assert [r["event"] for r in log if "event" in r] == ["start", "held-out", "end"]
    assert log[-2]["perplexity"] > 1


def test_a_warm_up_that_is_longer_than_the_run_is_reported(
    model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    for warmup, reported in (("1", False), ("2", True)):
        assert finetune(model_folder, text_folder, tmp_path / warmup, "--steps", "1", "--warmup", warmup) == 0
        said = capsys.readouterr().err
        assert ("of which the run has 1: it ends at 50% of 0.01" in said) == reported


def test_training_lowers_the_loss(model_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    options = ["--steps", "30", "--lr", "3e-2", "--save-every", "0", "--batch", "1"]
    targets = ["--lora-targets", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"]
    for name in ("skip", "dense"):
        assert finetune(model_folder, text_folder, tmp_path / name, "--schedule", name, *options, *targets) == 0
        losses = [r["loss"] for r in records(tmp_path / name) if "loss" in r]
        assert sum(losses[-5:]) / 5 < losses[0] - 0.2
    assert not list((tmp_path / "skip").glob("checkpoint-*"))


def test_phases_of_shorter_windows(model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Dense steps on parts of the windows, then on whole ones: what is trained on, logged, drawn, and resumed."""
    options = ("--schedule", "dense:window=1/4@0.5,dense@0.5", "--steps", "4", "--save-every", "1", "--maps", "4")
    out = tmp_path / "run"
    assert finetune(model_folder, text_folder, out, *options, "--keep-checkpoints", "4") == 0
    steps = [r for r in records(out) if "loss" in r]
    assert [r["phase"].get("window") for r in steps] == [0.25, 0.25, None, None]
    assert all(r["loss_tokens"] <= 2 * 15 for r in steps[:2]) and all(r["loss_tokens"] > 2 * 40 for r in steps[2:])
    maps = [json.loads(line) for line in (out / "maps.jsonl").read_text().splitlines()]
    assert [sum(r["lengths"]) for r in maps] == [16, 16, 64, 64] and all(r["documents"] for r in maps)
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    assert "dense 1.0 window 0.25" in capsys.readouterr().out
    for number in (2, 3, 4):  # within the first phase
        shutil.rmtree(out / f"checkpoint-{number}")
    shutil.move(out / "adapter", tmp_path / "adapter")
    assert main(["finetune", "--out", str(out), "--resume", "--quiet"]) == 0
    whole = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in weights(out).items())
    for schedule, said in (
        ("dense:window=2", "window is '2', expected a share of the context like 1/4"),
        ("dense:window=1/0", "window is '1/0', expected a share"),
        ("skip:window=1/16", "expected windows of at least one block of 8 tokens"),
    ):
        assert finetune(model_folder, text_folder, tmp_path / "no", "--schedule", schedule) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="window= cuts the data of lemo finetune"):
        parse_schedule("dense:window=1/4")


def test_dense_windows_shorter_than_a_block(model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Nothing is chosen by blocks, so their size changes no bit; and everything that reads the run can do without."""
    options = ("--context", "16", "--steps", "2", "--dense", "--held-out", "0.2", "--quiet")
    for size in (8, 16, 64):
        assert finetune(model_folder, text_folder, tmp_path / str(size), *options, "--block-size", str(size)) == 0
    for other in ("16", "64"):
        assert_same_adapter(tmp_path / "8", tmp_path / other)
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "64"), "--html", str(page)]) == 0 and page.stat().st_size
    capsys.readouterr()
    command = ["estimate", "--model", str(model_folder), "--context", "16", "--dense", "--json"]
    found = []
    for number in ("8", "64"):
        assert main([*command, "--block-size", number]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


def test_shorter_windows_in_every_mode(model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Blocks and tiles are chosen within the part, whose tokens are those that a dense phase would train on."""
    parts = ("skip:0.5:random:window=1/2", "backward:0.5:window=1/2", "sparse:0.5:local=0:window=1/2", "dense")
    options = ("--steps", "4", "--save-every", "1", "--maps", "4", "--keep-checkpoints", "4", "--quiet")
    out, dense = tmp_path / "run", tmp_path / "dense"
    assert finetune(model_folder, text_folder, out, "--schedule", ",".join(parts), *options) == 0
    plain = ",".join(["dense:window=1/2"] * 3 + ["dense"])
    assert finetune(model_folder, text_folder, dense, "--schedule", plain, *options) == 0

    steps = [r for r in records(out) if "loss" in r]
    assert [(r["phase"]["mode"], r["phase"].get("window")) for r in steps] == [
        ("skip", 0.5),
        ("backward", 0.5),
        ("sparse", 0.5),
        ("dense", None),
    ]
    assert all(0.2 < k < 0.8 for r in steps[:2] for k in r["kept"]) and all(k == 1 for k in steps[2]["kept"])
    mine, theirs = ([json.loads(line) for line in (f / "maps.jsonl").read_text().splitlines()] for f in (out, dense))
    assert [sum(r["lengths"]) for r in mine] == [32, 32, 32, 64]
    assert [(r["lengths"], r["documents"]) for r in mine] == [(r["lengths"], r["documents"]) for r in theirs]

    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "skip 0.5 random window 0.5" in printed and "sparse 1.0 density 0.5 window 0.5" in printed
    for number in (2, 3, 4):
        shutil.rmtree(out / f"checkpoint-{number}")
    shutil.move(out / "adapter", tmp_path / "adapter")
    assert main(["finetune", "--out", str(out), "--resume", "--quiet"]) == 0
    whole = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in weights(out).items())


def test_a_window_of_a_mode_is_a_dense_step_of_it(model_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    """Everything kept, every mode trains on the same part at the same positions: the same losses."""
    losses = {}
    for name in ("skip:1.0:random", "sparse:1.0", "dense"):
        out = tmp_path / name.replace(":", "-")
        assert finetune(model_folder, text_folder, out, "--schedule", f"{name}:window=1/4", "--steps", "2") == 0
        losses[name] = [r["loss"] for r in records(out) if "loss" in r]
    assert losses["skip:1.0:random"] == pytest.approx(losses["dense"], abs=1e-5)
    assert losses["sparse:1.0"] == pytest.approx(losses["dense"], abs=1e-5)


def test_kinds_of_lora(model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """What PEFT is asked for, and that a run resumes with it, exactly."""
    kind = ("--dora", "--rslora", "--modules-to-save", "norm", "lm_head", "--lora-targets", "all-linear")
    out, small = tmp_path / "run", ("--steps", "3", "--save-every", "1", "--dense")
    assert finetune(model_folder, text_folder, out, *kind, *small) == 0
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert saved["use_dora"] and saved["use_rslora"] and set(saved["modules_to_save"]) == {"norm", "lm_head"}
    assert {"gate_proj", "q_proj"} <= {name.rpartition(".")[2] for name in saved["target_modules"]}
    names = " ".join(weights(out))
    assert "lora_magnitude_vector" in names and "model.norm.weight" in names and "lm_head.weight" in names
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-3")
    shutil.rmtree(out / "adapter")
    assert main(["finetune", "--out", str(out), "--resume", "--quiet", "--dora"]) == 0
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before
    capsys.readouterr()
    assert finetune(model_folder, text_folder, tmp_path / "no", "--modules-to-save", "nose") == 2
    assert "modules_to_save ['nose']: the model has no module nose" in capsys.readouterr().err
    assert finetune(model_folder, text_folder, tmp_path / "no", "--modules-to-save", "q_proj") == 2
    assert "modules_to_save ['q_proj']: q_proj would have no LoRA, which lora_targets" in capsys.readouterr().err


def test_sparse_phases(new_model, text_folder: Path, tmp_path: Path, capsys: Any) -> None:
    """Lists of tiles in a whole run: logged, reported, drawn, and resumed exactly."""
    pytest.importorskip("matplotlib")
    model = new_model(tmp_path / "model", positions=1024)
    schedule = "sparse:0.4@0.5,sparse:keys=256:keep=0.8:random@0.25,dense@0.25"
    options = ("--schedule", schedule, "--context", "640", "--batch", "1", "--steps", "4", "--save-every", "1")
    kept = ("--keep-checkpoints", "4")
    out, data = tmp_path / "run", tmp_path / "text"
    data.mkdir()
    (data / "long.txt").write_text(2 * "".join(p.read_text() for p in sorted(text_folder.glob("*.txt"))))
    assert finetune(model, data, out, *options, *kept) == 0
    steps = [r for r in records(out) if "loss" in r]
    assert [r["phase"]["mode"] for r in steps] == ["sparse", "sparse", "sparse", "dense"]
    assert steps[0]["phase"]["density"] == 0.4 and steps[2]["phase"]["keys"] == 256
    for r in steps[:3]:
        assert all(0 < d < 1 for d in r["density"]) and all(0 < c < 1 for c in r["covered"])
    assert "density" not in steps[3] and steps[2]["kept"] == [0.8, 0.8]
    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "sparse 1.0 density 0.4" in printed and "sparse 0.8 random keys 256" in printed
    assert (out / "report.png").stat().st_size > 1000
    for number in (3, 4):  # resumed within the second phase
        shutil.rmtree(out / f"checkpoint-{number}")
    shutil.move(out / "adapter", tmp_path / "adapter")
    assert main(["finetune", "--out", str(out), "--resume", "--quiet"]) == 0
    whole = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(value, whole[name]) for name, value in weights(out).items())


def test_a_run_folder_below_the_home_folder(
    model_folder: Path, text_folder: Path, tokenizer, tmp_path: Path, monkeypatch
) -> None:
    """Trainer follows ~ by itself: checkpoints must not go elsewhere than the rest."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    documents = load_documents([str(text_folder)], tokenizer, progress=False)
    settings = FinetuneSettings(context=64, block_size=8, steps=1, schedule="dense")
    result = finetune_documents(model, documents, settings, "~/run", save_every=1, progress=False)
    assert result.adapter == tmp_path / "run" / "adapter"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == ["adapter", "checkpoint-1", "run"]


def test_the_adapter_loads_with_peft_alone(finished: Path, model_folder: Path, run_script) -> None:
    script = textwrap.dedent(
        """
        import sys
        sys.modules["lemo"] = None  # any import of it fails
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        ids = torch.arange(2, 18)[None]
        base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
        with torch.no_grad():
            before = base(input_ids=ids).logits
            after = PeftModel.from_pretrained(base, sys.argv[2])(input_ids=ids).logits
        assert not torch.equal(before, after)
        """
    )
    code, said = run_script(script, str(model_folder), str(finished / "adapter"))
    assert code == 0, said
    assert not [p.name for p in (finished / "adapter").iterdir() if "lemo" in p.name or p.name == "training_args.bin"]


def test_the_same_settings_give_the_same_adapter(
    finished: Path, model_folder: Path, text_folder: Path, tmp_path: Path
) -> None:
    assert finetune(model_folder, text_folder, tmp_path / "again", "--schedule", SCHEDULE, "--held-out", "0.1") == 0
    assert_same_adapter(finished, tmp_path / "again")


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    import lemo.training.checkpoint as c
    from lemo.cli import main
    step, moment = sys.argv[1], sys.argv[2]
    die = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
    real = c.write_folder
    def write_folder(target, write, *args, **kwargs):
        if target.name == "checkpoint-" + step:
            if moment == "half-written":
                def write(folder, whole=write):
                    whole(folder)
                    os.truncate(folder / "optimizer.pt", 100)
                    die()
            else:
                os.rename = die
        return real(target, write, *args, **kwargs)
    c.write_folder = write_folder
    main(sys.argv[3:])
    """
)


@pytest.mark.parametrize(("step", "moment", "last"), [("6", "half-written", 3), ("3", "before-rename", 0)])
def test_killed_while_saving_resumes_bit_for_bit(
    finished: Path,
    model_folder: Path,
    text_folder: Path,
    tmp_path: Path,
    capsys,
    run_script,
    step: str,
    moment: str,
    last: int,
) -> None:
    out = tmp_path / "killed"
    command = ["finetune", "--model", str(model_folder), "--data", str(text_folder), "--out", str(out), *OPTIONS]
    command += ["--schedule", SCHEDULE, "--held-out", "0.1"]
    code, said = run_script(KILLED, step, moment, *command)
    assert code == -signal.SIGKILL, said
    assert [p.name for p in out.glob("checkpoint-*")] == ([f"checkpoint-{last}"] if last else [])
    assert not (out / "adapter").exists()
    # Nothing but the folder is needed to resume.
    assert main(["finetune", "--out", str(out), "--resume", "--quiet", "--save-every", "3"]) == 0
    said = capsys.readouterr().err
    assert "not used" in said and "stopped while writing" in said
    assert (f"resuming from step {last}" if last else "starting again from step 0") in said
    assert_same_adapter(finished, out)
    assert not list(out.glob(".writing-*"))
    log = records(out)
    assert [r["step"] for r in log if "loss" in r] == list(range(1, 9))
    whole = [r for r in records(finished) if "loss" in r]
    for a, b in zip([r for r in log if "loss" in r], whole, strict=True):
        assert all(a[k] == b[k] for k in ("step", "loss", "lr", "kept", "phase"))


def test_resuming_with_accumulation_and_a_decaying_rate(model_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    """Stopped by an error in the middle of a pass over the data, with every part of the state in play."""
    options = ["--accumulate", "2", "--lr-schedule", "cosine", "--lora-dropout", "0.0", "--schedule", "skip:random"]
    assert finetune(model_folder, text_folder, tmp_path / "whole", *options) == 0
    with pytest.MonkeyPatch.context() as patch:
        from lemo.training.finetune import RunLog

        real = RunLog.write

        def write(self, **record):
            if record.get("step") == 7 and "loss" in record:
                raise OSError(28, "No space left on device")
            real(self, **record)

        patch.setattr(RunLog, "write", write)
        assert finetune(model_folder, text_folder, tmp_path / "parts", *options) == 2
    assert main(["finetune", "--out", str(tmp_path / "parts"), "--resume", "--quiet"]) == 0
    assert_same_adapter(tmp_path / "whole", tmp_path / "parts")


def test_a_full_disk_while_saving(model_folder: Path, text_folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "full"
    real = torch.save

    def save(obj, path, *args, **kwargs):
        if "checkpoint-6" in str(path) and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))
        return real(obj, path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert finetune(model_folder, text_folder, out, "--dense") == 2
    said = capsys.readouterr().err
    assert "no space left" in said and "--resume" in said and "Traceback" not in said
    assert [p.name for p in sorted(out.glob("*check*"))] == ["checkpoint-3"] and not list(out.glob(".writing*"))
    assert main(["finetune", "--out", str(out), "--resume", "--quiet"]) == 0
    assert finetune(model_folder, text_folder, tmp_path / "whole", "--dense") == 0
    assert_same_adapter(out, tmp_path / "whole")


def test_a_full_disk_at_the_very_end(finished: Path, model_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    """All steps are done and the adapter cannot be written: the last checkpoint still holds everything."""
    from peft import PeftModel

    out, real = tmp_path / "run", PeftModel.save_pretrained

    def save(self, folder, *args, **kwargs):
        if ".writing-adapter" in str(folder):
            raise OSError(28, "No space left on device", str(folder))
        return real(self, folder, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", save)
        assert finetune(model_folder, text_folder, out, "--schedule", SCHEDULE, "--held-out", "0.1") == 2
    assert not (out / "adapter").exists()
    assert main(["finetune", "--out", str(out), "--resume", "--quiet"]) == 0
    assert_same_adapter(finished, out)


def test_accumulation_is_the_same_as_a_larger_batch(model_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    """Windows hold different numbers of labels, so this fails unless every label of a step weighs the same."""
    assert finetune(model_folder, text_folder, tmp_path / "one", "--dense", "--batch", "4") == 0
    assert finetune(model_folder, text_folder, tmp_path / "two", "--dense", "--accumulate", "2") == 0
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_resuming_a_finished_run_does_nothing(finished: Path, capsys) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != ".lock"}
    assert main(["finetune", "--out", str(finished), "--resume", "--quiet"]) == 0
    assert "complete already" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*") if p.name != ".lock"} == before


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (("--schedule", "sparse", "--keep", "0.3"), "--keep 0.3 has no effect"),
        (("--schedule", "sparse@0.8,dense@0.2", "--policy", "random"), "--policy random has no effect"),
        (("--schedule", "sparse:keep=.3:exact,dense", "--policy", "random"), "--policy random has no effect"),
    ],
)
def test_options_that_reach_no_phase(options: tuple[str, ...], refused: str, tmp_path: Path, capsys: Any) -> None:
    assert finetune("/nowhere", "/nowhere", tmp_path / "run", *options) != 0
    assert refused in capsys.readouterr().err


def test_the_schedule_of_a_run_that_names_none(
    model_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By its context, which is below the limit, then at it; a resumed run keeps its own."""
    assert [default_schedule(n, None, None, None) for n in (32767, 32768)] == ["default", "long-context"]
    assert [default_schedule(n, None, None, None, True) for n in (32767, 32768)] == ["default", "extension"]
    assert [default_schedule(32768, keep, None, None, True) for keep in (0.5,)] == ["default"]
    assert [default_schedule(n, None, None, None, True, True) for n in (32767, 32768)] == ["default", "whole-documents"]
    assert [s.phase.mode for s in FinetuneSettings(schedule="long-context").stages()] == ["dense", "sparse"]
    read = {name: tokens_read(FinetuneSettings(schedule=name, steps=200)) for name in settings.PRESETS}
    assert read.pop("long-context") == (182 / 4 + 18) / 200 and read.pop("extension") == (194 / 8 + 6) / 200
    assert set(read.values()) == {1.0}

    def schedule(name: str, *options: str) -> str:
        assert finetune(model_folder, text_folder, tmp_path / name, *options) == 0
        return json.loads((tmp_path / name / "run.json").read_text())["settings"]["schedule"]

    default, long = (settings.PRESETS[name] for name in ("default", "long-context"))
    assert schedule("below") == default
    monkeypatch.setattr(settings, "LONG_CONTEXT", 64)
    capsys.readouterr()
    assert schedule("at") == long
    assert "its steps read 34% of the tokens of dense ones" in capsys.readouterr().err
    assert schedule("asked", "--policy", "random") == default
    assert schedule("below", "--resume") == default


def test_a_loss_that_is_no_number(new_model, text_folder: Path, tmp_path: Path, capsys: Any) -> None:
    model = new_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "run"
    assert finetune(model, text_folder, out, "--dense") == 1
    assert "the loss is nan at step 1" in capsys.readouterr().err
    text = (out / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    (step,) = [r for r in records(out) if "loss" in r]
    assert step["loss"] is None and "loss is nan" in step["note"]
    assert main(["report", str(out), "--no-png"]) == 0


def test_weights_that_are_no_numbers_are_not_saved(
    model_folder: Path, text_folder: Path, tmp_path: Path, capsys
) -> None:
    """The log would only see it at step 8, after two checkpoints."""
    out = tmp_path / "run"
    assert finetune(model_folder, text_folder, out, "--dense", "--lr", "1e37", "--log-every", "8") == 1
    said = capsys.readouterr().err
    assert "not finite at step 3" in said and "Lower --lr" in said
    assert not list(out.glob("*check*")) and not (out / "adapter").exists()


def test_windows_without_a_label_are_blamed_on_the_data() -> None:
    from types import SimpleNamespace

    labels = [[-100, 3], [-100, -100], [-100, 4], [-100, 5]]
    run: Any = SimpleNamespace(settings=FinetuneSettings(batch=2), log_every=1, windows_per_step=2)
    run.windows = [{"labels": torch.tensor(values)} for values in labels]
    assert RunInProgress.advice(run, 1).startswith("1 of the 2 windows")
    assert RunInProgress.advice(run, 2).startswith("Lower --lr")


def test_a_calibration_for_another_share_is_reported(
    model_folder: Path, text_folder: Path, calibration_folder: Path, tmp_path: Path, capsys
) -> None:
    calibrated = ["--calibration", str(calibration_folder), "--steps", "1"]
    for keep, schedule, expected in (
        ("0.25", "skip", "made for --keep 0.5, the schedule keeps 0.25:"),
        ("0.5", "skip:0.25:sampled,skip:0.75:predictors,dense", "the schedule keeps 0.25 and 0.75:"),
        ("0.5", "skip", None),
        ("0.25", "skip:random,backward:update_norm", None),
    ):
        out = tmp_path / (keep + schedule.replace(":", "-"))
        assert finetune(model_folder, text_folder, out, *calibrated, "--keep", keep, "--schedule", schedule) == 0
        said = capsys.readouterr().err
        assert ("the calibration was made for" in said) == (expected is not None)
        assert expected is None or expected in said
