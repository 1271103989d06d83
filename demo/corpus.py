"""What the demo's language model reads: the sources and documentation of Python's own standard library.

Three kinds of text, nothing from site-packages:
  * the .py files of one or more installed Pythons (identical files are read once),
  * the language reference topics that come with pydoc,
  * the help text of built-in and extension modules, which have no .py source.
Machine-made tables (character maps, build configuration) are left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import pydoc
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "cjkencodings", "idle_test"}
LARGEST_FILE = 300_000  # bytes; longer files are tables
HELD_OUT_PER_MILLE = 40


@dataclass(frozen=True)
class Document:
    """One text, its name (`version/relative/path`), and whether pretraining must not see it."""

    name: str
    text: str
    held_out: bool


def is_held_out(name: str) -> bool:
    """Split by module name, so that two versions of one module never end up on both sides."""
    stem = Path(name).stem if Path(name).stem != "__init__" else Path(name).parent.name
    digest = hashlib.sha256(stem.removeprefix("test_").strip("_").encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PER_MILLE


def is_table(path: Path) -> bool:
    return path.parent.name == "encodings" or path.name.startswith("_sysconfigdata") or path.name == "topics.py"


def source_files(root: Path) -> Iterator[Path]:
    """The .py files below `root`, in path order: neighbors come from the same package."""
    for path in sorted(root.rglob("*.py")):
        readable = SKIPPED_FOLDERS.isdisjoint(path.relative_to(root).parts) and not is_table(path)
        if readable and 0 < path.stat().st_size <= LARGEST_FILE:
            yield path


def library_documents(roots: list[Path]) -> Iterator[Document]:
    """Every distinct source file of the standard libraries at `roots`."""
    seen: set[bytes] = set()
    for root in roots:
        for path in source_files(root):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # files that test other encodings
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                name = f"{root.name}/{path.relative_to(root)}"
                yield Document(name, text, is_held_out(name))


def help_documents() -> Iterator[Document]:
    """Reference topics, and the rendered help of modules without Python source, of the running interpreter."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic, text in sorted(topics.items()):
        yield Document(f"topics/{topic}", text, is_held_out(f"topics/{topic}"))
    extensions = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    names = set(sys.builtin_module_names) | {path.name.split(".")[0] for path in extensions.glob("*.so")}
    for name in sorted(names - {"antigravity", "this", "readline"}):
        if name.startswith(("_test", "_xx", "xx")):
            continue
        with contextlib.suppress(ImportError), contextlib.redirect_stdout(io.StringIO()):
            text = pydoc.plain(pydoc.render_doc(importlib.import_module(name)))
            yield Document(f"help/{name}", text, is_held_out(f"help/{name}"))


def default_roots() -> list[Path]:
    return [Path(sysconfig.get_path("stdlib"))]
