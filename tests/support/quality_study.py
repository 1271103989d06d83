"""Costs and words of small quality studies."""

import json
from pathlib import Path
from typing import Any

DENSE, HALF, BACKWARD = ("dense", 1.0, False), ("skip", 0.5, False), ("backward", 0.5, True)
SMALL = ("--context", 256, "--only", "random subset 0.5", "--seeds", 1, 2, "--sequences", 4, "--cost-at", 65536, 262144)


def cost_file(path: Path, steps: dict[int, dict[tuple[str, float, bool], float]], gpu: str | None = None) -> Path:
    """As benchmarks/step.py writes it. steps: by tokens, milliseconds of (mode, keep, weighted)."""
    same = {"method": "lemo", "recompute": "full", "model": "llama3-8b", "density": None}
    rows: list[dict[str, Any]] = [{"method": "the peer", "recompute": "full", "model": "llama3-8b", "context": 65536}]
    rows[0] |= {"mode": "dense", "keep": 1.0, "step_ms": 1.0}
    for context, of in steps.items():
        for (mode, keep, weighted), ms in of.items():
            rows.append(same | {"context": context, "mode": mode, "keep": keep, "weighted": weighted, "step_ms": ms})
    path.write_text(json.dumps({"gpu": gpu, "rows": rows}))
    return path
