"""The benchmark of several GPUs, on a tiny shape in two processes."""

from __future__ import annotations

import pytest


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
