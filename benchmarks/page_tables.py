"""Results files, and how tables of them are written; for summary.py and the *_pages.py, which make the pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Table = tuple[str, list[str], list[list[str]]]  # title, header, rows


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def in_thousands(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]


def source(name: str, result: dict[str, Any]) -> str:
    gpu, versions = result["gpu"], result["versions"]
    return (
        f"`benchmarks/results/{name}.json`: {gpu}, torch {versions['torch']}, commit {result['commit']}, "
        f"{result['date'][:10]}; `{result['command']}`" + (f". {result['note']}" if "note" in result else "")
    )


def left_out(result: dict[str, Any]) -> list[str]:
    """Rows and peers that the file lacks, with the reasons; those with the same reason are named together."""
    lacking = result.get("left_out", [])
    named = lacking.items() if isinstance(lacking, dict) else ((one["row"], one["reason"]) for one in lacking)
    reasons: dict[str, list[str]] = {}
    for row, reason in named:
        reasons.setdefault(reason.rstrip("."), []).append(row)
    mark = "; " if any("," in row for rows in reasons.values() for row in rows) else ", "
    return [f"Left out: {mark.join(rows)}: {reason}." for reason, rows in reasons.items()]


def peer_cells(row: dict[str, Any]) -> list[str]:
    return [row["peer"], f"{row['peer_ms']:.3f}", f"{row['ratio']:.2f}"]


def measured_table(name: str, make: Callable[[dict[str, Any]], Table]) -> list[str]:
    """A table of a results file, if it exists."""
    if (result := load(name)) is None:
        return []
    title, header, rows = make(result)
    return [title, "", *markdown(header, rows), "", " ".join([*left_out(result), source(name, result)]), ""]
