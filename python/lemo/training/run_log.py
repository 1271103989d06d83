"""The log of a run: JSON lines that survive a crash, and reading them even if damaged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lemo.training.checkpoint import CheckpointError, write_text

LOG_FILE = "log.jsonl"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_ratios(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(v) for v in value)


def _is_interval(value: Any) -> bool:
    return value is None or (_is_ratios(value) and len(value) == 2)


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


# What readers rely on; other fields may hold anything.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "step": lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
    "event": lambda v: isinstance(v, str),
    "loss": _is_number_or_null,
    "tokens_per_second": _is_number,
    "peak_memory_bytes": _is_number,
    "kept": _is_ratios,
    "density": _is_ratios,
    "perplexity": _is_number_or_null,
    "interval": _is_interval,
}


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not all(good(value[n]) for n, good in _FIELDS.items() if n in value):
        return False
    held_out = value.get("event") == "held-out"
    return ("step" in value or not (held_out or "loss" in value)) and ("perplexity" in value or not held_out)


def read_log(path: Path, report: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """The intact lines of a log. A line that a crash cut short or that was damaged is left out, and reported."""
    records, bad = [], []
    try:
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            record = False
        if record is None:
            continue
        if _is_record(record):
            records.append(record)
        else:
            bad.append(number)
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        report(f"{path}: left out line {bad[0]}{more}, cut short or damaged")
    return records


def _json_values(value: Any, where: str, lost: list[str]) -> Any:
    """The value with null in place of numbers that JSON lacks; `lost` records what stood there."""
    if isinstance(value, float) and not math.isfinite(value):
        lost.append(f"{where} is {value}")
        return None
    if isinstance(value, dict):
        return {k: _json_values(v, f"{where}.{k}" if where else str(k), lost) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_values(v, f"{where}[{i}]", lost) for i, v in enumerate(value)]
    return value


class RunLog:
    """Appends JSON lines, each flushed at once. active: whether this process writes the log; others discard it."""

    def __init__(self, path: Path, active: bool = True) -> None:
        self.path, self.active = path, active

    def cut(self, step: int, report: Callable[[str], None] = lambda line: None) -> None:
        """Drop what was logged after `step`: those steps are about to be done again."""
        records = [r for r in read_log(self.path, report) if r.get("step", 0) <= step and r.get("event") != "end"]
        write_text(self.path, "".join(json.dumps(r) + "\n" for r in records))

    def write(self, **record: Any) -> None:
        if not self.active:
            return
        lost: list[str] = []
        values = _json_values(record, "", lost)
        if lost:
            values["note"] = ", ".join(lost)
        try:
            with self.path.open("a") as f:
                f.write(json.dumps(values, allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}; checkpoints are intact") from error
