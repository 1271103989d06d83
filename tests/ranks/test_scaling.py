"""The benchmark and the example of several GPUs, on small models in two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("part", ["ddp", "fsdp", "sequence"])
def test_smoke_run(ranks, part):
    (rows, file), (other, none) = (result[part] for result in ranks(2, "support.scaling_jobs.smoke"))
    assert rows == other and none is None and file["rows"] == rows and file["model"] == "tiny"
    assert [(r["row"], r["processes"]) for r in rows] == [(n, s) for n in ("dense", "skip-0.5") for s in (1, 2)]
    tokens = {1: 512, 2: 512 if part == "sequence" else 1024}
    for row in rows:
        assert "error" not in row
        assert row["tokens_per_second"] == pytest.approx(1e3 * tokens[row["processes"]] / row["step_ms"], rel=0.05)
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["processes"], abs=1e-3)
    if part == "sequence":
        assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=2e-4)


def test_the_example_runs_with_every_engine(launch, tmp_path):
    """DDP and FSDP2 see the same windows and draw the same blocks: they leave the same adapter."""
    script = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    data = ["--model", str(ROOT / "demo" / "model"), "--data", str(ROOT / "python" / "lemo" / "_moved.py")]
    found = {}
    for engine in ("ddp", "fsdp", "sequence"):
        options = ["--engine", engine, "--steps", "3", "--context", "128", "--out", str(tmp_path / engine)]
        done = launch(2, script, str(ROOT / "examples" / "several_gpus.py"), *options, *data)
        assert [code for code, _ in done] == [0, 0], done
        assert done[0][1].count("loss ") == 3 and "loss " not in done[1][1]
        found[engine] = load_file(tmp_path / engine / "adapter_model.safetensors")
    assert found["ddp"].keys() == found["fsdp"].keys() == found["sequence"].keys()
    for name, weight in found["ddp"].items():
        torch.testing.assert_close(found["fsdp"][name], weight, rtol=1e-3, atol=1e-5)
    assert any(w.abs().max() > 1e-4 for n, w in found["sequence"].items() if "lora_B" in n)
