"""The demo's fine-tuning text: Python sources of the packages that the demo's own set-up installed.

Pretraining read the standard library only, so nothing here has been seen. Files are split between training and held-out
text by a hash of their path: the same split on every machine that has the same packages.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft")
SMALLEST_FILE = 16_000  # characters: about one context of 4096 tokens
LARGEST_FILE = 300_000
HELD_OUT_PERCENT = 15
SEED = 1


@dataclass(frozen=True)
class SourceFile:
    """name: package and path below it.  held_out: kept from calibration and training."""

    name: str
    path: Path
    held_out: bool


def is_held_out(name: str) -> bool:
    """Split by folder and file name, so that the answer does not depend on which other files exist."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def is_standard_library(path: Path) -> bool:
    """Whether pretraining could have read the file: below the standard library and not in site-packages."""
    standard = Path(sysconfig.get_path("stdlib")).resolve()
    path = path.resolve()
    inside = path.is_relative_to(standard)
    return inside and {"site-packages", "dist-packages"}.isdisjoint(path.relative_to(standard).parts)


def source_files(packages: tuple[str, ...] = PACKAGES) -> list[SourceFile]:
    """Every .py file of `packages` that fills a window, in a fixed random order. Raises ValueError if there is none."""
    found = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).rglob("*.py")):
                if is_standard_library(path) or not SMALLEST_FILE <= path.stat().st_size <= LARGEST_FILE:
                    continue
                name = f"{package}/{path.relative_to(folder).as_posix()}"
                found.append(SourceFile(name, path, is_held_out(name)))
    if not found:
        raise ValueError(f"no source files found in the packages {', '.join(packages)}; is the set-up complete?")
    random.Random(SEED).shuffle(found)
    return found


def write_jsonl(files: list[SourceFile], out: Path, characters: int, characters_each: int | None = None) -> int:
    """Write {"text", "name"} records until `characters` are written; returns the number of files.

    characters_each: only the beginning of every file, so that more files fit.
    """
    total = count = 0
    with out.open("w", encoding="utf-8") as stream:
        for file in files:
            if total >= characters:
                break
            try:
                text = file.path.read_text(encoding="utf-8")[:characters_each]
            except UnicodeDecodeError:
                continue
            stream.write(json.dumps({"text": text, "name": file.name}) + "\n")
            total += len(text)
            count += 1
    return count
