"""Files as text or as records: compression, text encodings, JSON, CSV, Parquet and Arrow."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lemo.data.documents import DataError

JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
COLUMNAR = (".parquet", ".arrow", ".feather")
RECORDS = (*JSON_LINES, ".json", *SEPARATORS, *COLUMNAR)
TOKENS = (".bin", ".npy")
COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
# What the decompressors raise for a damaged file; zstandard's own error is a plain Exception.
_DAMAGE = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)

# (where it was found, the record) of every record.
Records = Iterator[tuple[str, Any]]


class NoRecordsError(DataError):
    """A JSON file that is not a data set: a mistake if the user named it, left out if a folder holds it."""


def kind_of(path: Path) -> str:
    """The suffix that names a file's format, in lower case, without that of the compression."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, decompressed."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise DataError(
                f"{path}: reading Zstandard files needs a package: pip install 'lemo[datasets]' (or zstandard)"
            ) from None
        return zstandard.open(path, "rb")
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".lzma": lzma.open}
    return openers.get(suffix, open)(path, "rb")


def damaged(error: Exception, path: Path) -> DataError | None:
    """What to raise in place of a decompressor's error; None for any other error."""
    compressed = path.suffix.lower() in COMPRESSED
    if isinstance(error, _DAMAGE) or (compressed and isinstance(error, OSError) and not error.strerror):
        return DataError(f"{path}: cannot be decompressed ({error}); the file is damaged or cut short")
    if type(error).__name__ == "ZstdError":
        return DataError(f"{path}: cannot be decompressed ({error}); the file is damaged or cut short")
    return None


def read_bytes(path: Path) -> bytes:
    try:
        with open_bytes(path) as f:
            return f.read()
    except Exception as error:
        raise damaged(error, path) or error from None


def read_text(path: Path, named: bool) -> str | None:
    """The text of a file; None for a binary file met in a folder, an error for one named by the user."""
    if kind_of(path) in ARCHIVES:
        if named:
            raise DataError(f"{path}: an archive; unpack it and give the folder")
        return None
    raw = read_bytes(path)
    try:
        zero = raw.find(b"\0")
        if zero >= 0:
            raise UnicodeDecodeError("utf-8", raw, zero, zero + 1, "zero byte")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if named:
            place = error.start + len(raw) - len(error.object)  # a byte order mark at the start is not in `object`
            raise DataError(
                f"{path}: not a UTF-8 text file ({error.reason} at byte {place}); convert it (iconv -t utf-8); token "
                "files are named *.bin or *.npy"
            ) from None
        return None


def read_records(path: Path, columns: Callable[[list[str]], list[str]]) -> Records:
    """The records of a JSON, CSV, Parquet or Arrow file. Raises DataError, naming file and line or record.

    columns: which of the columns found are wanted; the others of a columnar file are not read.
    """
    kind = kind_of(path)
    try:
        if kind in COLUMNAR:
            yield from _columnar(path, kind, columns)
            return
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as text:
            if kind in SEPARATORS:
                yield from _separated(text, path, SEPARATORS[kind], columns)
            elif kind == ".json":
                yield from _json(text, path)
            else:
                yield from _json_lines(text, path)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); convert it (iconv -t utf-8)") from None
    except Exception as error:
        raise damaged(error, path) or error from None


def _parse(text: str) -> Any:
    """The JSON value. Raises JSONDecodeError, also if Python's parser fails with another error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None
    except ValueError as error:  # a number of thousands of digits
        raise json.JSONDecodeError(str(error).split(";")[0], text, 0) from None


def _json_lines(lines: IO[str], path: Path, first: int = 1) -> Records:
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        try:
            record = _parse(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg}); one object per line is expected") from None
        yield f"{path}, line {number}", record


def _json(text: IO[str], path: Path) -> Records:
    """A .json file is a list of records or has one record per line."""
    line, first = text.readline(), 1
    while line and not line.strip():
        line, first = text.readline(), first + 1
    if line.lstrip().startswith("{"):
        try:
            _parse(line)
        except json.JSONDecodeError:
            pass
        else:
            yield from _json_lines(io.StringIO(line), path, first)
            yield from _json_lines(text, path, first + 1)
            return
    try:
        value = _parse(line + text.read())
    except json.JSONDecodeError as error:
        raise NoRecordsError(
            f"{path}, line {first + error.lineno - 1}: not JSON ({error.msg}); a list of records or one record per "
            "line is expected (text that is not a data set: rename it to *.txt)"
        ) from None
    if isinstance(value, dict):
        raise NoRecordsError(
            f"{path}: one object with the keys {_some(value)}; a list of records or one record per line is expected "
            "(text that is not a data set: rename it to *.txt)"
        )
    if not isinstance(value, list) or any(not isinstance(record, dict) for record in value):
        raise NoRecordsError(f"{path}: a {type(value).__name__} that does not hold records (objects) alone")
    for number, record in enumerate(value, 1):
        yield f"{path}, record {number}", record


def _some(names: Any) -> str:
    found = sorted(map(str, names))
    return ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")


def _check_unique(names: list[str], wanted: list[str], path: Path) -> None:
    """Raises DataError if a column that is to be read appears more than once."""
    for name in wanted:
        if names.count(name) > 1:
            raise DataError(f"{path}: {names.count(name)} columns are called '{name}'; rename all but one of them")


def _separated(text: IO[str], path: Path, separator: str, columns: Callable[[list[str]], list[str]]) -> Records:
    csv.field_size_limit(2**31 - 1)  # a field may be a book
    reader = csv.reader(text, delimiter=separator, strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if header is None:
                header = fields
                _check_unique(header, columns(header), path)
            elif fields and len(fields) != len(header):
                raise DataError(
                    f"{path}, line {line}: {len(fields)} fields, but the first line names {len(header)} columns; quote "
                    "fields that hold separators or line breaks"
                )
            elif fields:
                yield f"{path}, line {line}", dict(zip(header, fields, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}; the quotes of its fields do not match") from None


def _columnar(path: Path, kind: str, columns: Callable[[list[str]], list[str]]) -> Records:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading {kind} files needs pyarrow: pip install 'lemo[datasets]'") from None
    plain = path.suffix.lower() not in COMPRESSED
    source: Any = str(path) if plain else pyarrow.BufferReader(read_bytes(path))
    try:
        number = 0
        for names, batch in _batches(pyarrow, source, kind):
            wanted = columns(names)
            _check_unique(names, wanted, path)
            for record in (batch.select(wanted) if wanted else batch).to_pylist():
                number += 1
                yield f"{path}, record {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as {kind[1:]} ({str(error).splitlines()[0]})") from None


def _batches(pyarrow: Any, source: Any, kind: str) -> Iterator[tuple[list[str], Any]]:
    if kind == ".parquet":
        file = pyarrow.parquet.ParquetFile(source)
        for batch in file.iter_batches(batch_size=1024):
            yield batch.schema.names, batch
        return
    # `datasets` writes streams, Feather files have a footer.
    opened: Any = pyarrow.memory_map(source) if isinstance(source, str) else source
    try:
        batches: Any = pyarrow.ipc.open_stream(opened)
    except pyarrow.ArrowInvalid:
        opened.seek(0)
        file = pyarrow.ipc.open_file(opened)
        batches = (file.get_batch(i) for i in range(file.num_record_batches))
    for batch in batches:
        yield batch.schema.names, batch
