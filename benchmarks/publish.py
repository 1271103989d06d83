"""Pages and pictures that are made from results files: rewritten, or checked with --check."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path


def publish(
    description: str | None, made: Callable[[], Iterable[tuple[Path, str]]], arguments: Sequence[str] | None = None
) -> int:
    """Runs such a script, of which made() gives the files and their text: its exit code. --check writes nothing."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a file is out of date")
    args = parser.parse_args(arguments)
    stale = []
    for path, text in made():
        if path.exists() and path.read_text() == text:
            continue
        stale.append(path.name)
        if not args.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if stale:
        print(("out of date: " if args.check else "rewritten: ") + ", ".join(stale))
    return int(args.check and bool(stale))
