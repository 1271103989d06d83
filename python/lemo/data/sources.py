"""Sources as the user names them -> documents as found, still to be tokenized."""

from __future__ import annotations

import glob
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lemo.data.documents import DataError
from lemo.data.formats import RECORDS, TOKENS, NoRecordsError, kind_of, read_bytes, read_records, read_text
from lemo.data.records import Content, RecordOptions, Tokens, choose_fields, content_of
from lemo.data.tokens import read_tokens, split_stream


@dataclass(frozen=True)
class Piece:
    """One document as found. where: file and line or record, for messages."""

    origin: int
    where: str
    content: Content


@dataclass
class Left:
    """What was left out of the sources: names, and how much padding."""

    binary: list[str] = field(default_factory=list)
    no_records: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    padding: int = 0
    padded: str = ""
    ambiguous: dict[str, str] = field(default_factory=dict)
    mixed: list[str] = field(default_factory=list)

    def add_padding(self, count: int, where: str) -> None:
        if count:
            self.padding += count
            self.padded = self.padded or where

    def lines(self) -> Iterator[str]:
        yield from (*self.ambiguous.values(), *self.mixed)
        for paths, what in (
            (self.binary, "files that are not UTF-8 text"),
            (self.no_records, "JSON files without records of text, tokens or messages"),
            (self.hidden, "hidden files and folders"),
        ):
            if paths:
                yield f"left out {what}: {len(paths)} ({paths[0]}{', ...' if len(paths) > 1 else ''})"
        if self.padding:
            yield (
                "left out end-of-text and padding tokens that only fill up rows or would be documents of nothing "
                f"else: {self.padding} (from {self.padded} on)"
            )


def split_name(source: str) -> tuple[str | None, str]:
    """(NAME or None, WHERE) of `[NAME=]WHERE`."""
    name, equals, where = source.partition("=")
    if equals and name and "/" not in name and not Path(source).exists():
        return name, where
    return None, source


class Sources:
    """Finds the documents of one source after the other."""

    def __init__(self, options: RecordOptions, origin: Callable[[str], int], per_file: bool) -> None:
        self.options, self.origin, self.per_file = options, origin, per_file
        self.left = Left()

    def pieces(self, source: str) -> Iterator[Piece]:
        name, where = split_name(source)
        if not where.removeprefix("hf:").strip(" :"):
            # An empty path would be the current folder: a shell variable that is not set must not pass for data.
            raise DataError(f"data source '{source}' names no file, folder or data set; for the current folder write .")
        if where.startswith("hf:") or _is_saved_dataset(Path(where).expanduser()):
            label = name or (where[3:].split(":")[0] if where.startswith("hf:") else Path(where).resolve().name)
            yield from self._dataset(where, self.origin(label))
            return
        files, named = self._expand(where)
        texts: list[str] = []
        records = 0
        for label, path in files:
            index = self.origin(name if name and not self.per_file else label)
            for piece in self._file(path, index, named):
                if piece.where == str(path) and isinstance(piece.content, str):
                    texts.append(piece.where)
                else:
                    records += 1
                yield piece
        if texts and records:
            shown = texts[0] + (", ..." if len(texts) > 1 else "")
            self.left.mixed.append(
                f"{where}: next to {records} records, files read whole as text: {len(texts)} ({shown})"
            )

    def _expand(self, where: str) -> tuple[list[tuple[str, Path]], bool]:
        """((label, file) of every file a path, folder or glob stands for, whether it names one file)."""
        path = Path(where).expanduser()
        if path.is_file():
            return [(path.stem, path)], True
        if path.is_dir():
            files = self._walk(path)
            if not files:
                raise DataError(f"{where}: the folder holds no files")
            label = path.resolve().name
        else:
            files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not files and os.path.lexists(path):
                raise DataError(f"{where}: neither a file nor a folder ({_what(path)}); save the data to a file first")
            if not files:
                hint = "" if any(c in where for c in "*?[") else f"; for a data set by name write hf:{where}"
                raise DataError(f"{where}: no such file or folder, and no file matches it as a glob{hint}")
            label = where
        return [(p.stem if self.per_file else label, p) for p in files], False

    def _walk(self, folder: Path) -> list[Path]:
        """Every file below the folder, sorted; hidden ones are left out and noted."""
        files: list[Path] = []
        seen: set[str] = set()
        for parent, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in seen:  # a link to a folder above
                folders.clear()
                continue
            seen.add(real)
            self.left.hidden += [os.path.join(parent, n) for n in (*folders, *names) if n.startswith(".")]
            folders[:] = sorted(n for n in folders if not n.startswith("."))
            files += [
                Path(parent, n) for n in names if not n.startswith(".") and os.path.isfile(os.path.join(parent, n))
            ]
        return sorted(files)

    def _file(self, path: Path, origin: int, named: bool) -> Iterator[Piece]:
        kind = kind_of(path)
        if kind in TOKENS:
            yield from self._tokens(path, kind, origin)
        elif kind in RECORDS:
            yield from self._records(path, kind, origin, named)
        else:
            text = read_text(path, named)
            if text is None:
                self.left.binary.append(str(path))
            else:
                yield Piece(origin, str(path), text)

    def _records(self, path: Path, kind: str, origin: int, named: bool) -> Iterator[Piece]:
        begun = False
        try:
            for where, record in read_records(path, self._columns(str(path))):
                # A folder may hold settings in JSON; in any other format, and further on, it is a mistake.
                if not (begun or named) and kind == ".json" and not choose_fields(record, self.options):
                    raise NoRecordsError(where)
                begun = True
                yield self._piece(origin, where, record)
        except NoRecordsError:
            if named:
                raise
            self.left.no_records.append(str(path))

    def _tokens(self, path: Path, kind: str, origin: int) -> Iterator[Piece]:
        if self.options.answers_only:
            raise DataError(f"{path}: --answers-only needs conversations; a token file does not mark answers")
        known = self.options.tokens
        for row in read_tokens(read_bytes(path), str(path), kind, known):
            documents, padding = split_stream(row, known)
            self.left.add_padding(padding, str(path))
            for document in documents:
                yield Piece(origin, str(path), Tokens(document))

    def _columns(self, where: str) -> Callable[[list[str]], list[str]]:
        def wanted(names: list[str]) -> list[str]:
            self._note_choice(names, where)
            return choose_fields(names, self.options)

        return wanted

    def _note_choice(self, names: Any, where: str) -> None:
        if self.options.text_field is not None or where in self.left.ambiguous:
            return
        others = [n for n in ("input_ids", "text", "messages", "conversations") if n in names]
        chosen = choose_fields(names, self.options)
        if len(others) > 1:
            rest = " and ".join(n for n in others if n != chosen[0])
            self.left.ambiguous[where] = f"{where}: the field '{chosen[0]}' is used, not {rest} (see --text-field)"

    def _piece(self, origin: int, where: str, record: Any) -> Piece:
        content = content_of(record, where, self.options)
        if isinstance(record, dict):
            self._note_choice(record, where.rpartition(", ")[0])
        if isinstance(content, Tokens):
            self.left.add_padding(content.padding, where)
        return Piece(origin, where, content)

    def _dataset(self, where: str, origin: int) -> Iterator[Piece]:
        data = _load_dataset(where)
        wanted = self._columns(where)(data.column_names or [])
        if wanted:
            data = data.select_columns(wanted)
        for i, record in enumerate(data):
            yield self._piece(origin, f"{where}, record {i}", record)


def _what(path: Path) -> str:
    if path.is_symlink() and not os.path.exists(path):
        return f"a symbolic link to {os.readlink(path)}, which cannot be followed"
    return "a pipe or a device, which cannot be read again on --resume"


def _is_saved_dataset(path: Path) -> bool:
    return path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file())


def _load_dataset(where: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{where}: reading a Hugging Face data set needs a package: pip install 'lemo[datasets]'"
        ) from None
    if not where.startswith("hf:"):
        try:
            data = datasets.load_from_disk(os.path.expanduser(where))
        except Exception as error:  # pyarrow, json and the package itself raise their own kinds for a damaged folder
            raise DataError(f"{where}: cannot be loaded: {_first_line(error)}") from error
        if isinstance(data, datasets.DatasetDict):
            if "train" not in data:
                raise DataError(f"{where}: has the splits {sorted(data)}; name one: {where}/SPLIT")
            data = data["train"]
        return data
    name, _, split = where[3:].partition(":")
    # Newer versions run no code of a data set at all and have no such argument.
    known = "trust_remote_code" in inspect.signature(datasets.load_dataset).parameters
    safe: dict[str, Any] = {"trust_remote_code": False} if known else {}
    try:
        return datasets.load_dataset(name, split=split or "train", **safe)
    except Exception as error:  # the hub and the network all raise their own kinds
        raise DataError(f"{where}: cannot be loaded: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_blank(content: Content) -> bool:
    """Whether there is nothing in it."""
    if isinstance(content, str):
        return not content.strip()
    return isinstance(content, Tokens) and not len(np.asarray(content.ids))
