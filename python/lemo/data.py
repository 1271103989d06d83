"""Text and token files -> documents -> windows packed to the context.

Sources are given as strings, `[NAME=]WHERE`:

  notes.txt             any text file: one document (UTF-8)
  corpus.jsonl          one JSON object per line, the text in `text_field`
  tokens.bin            raw uint16 tokens; documents end at the tokenizer's end-of-text token where it has one
  folder/               every file of these kinds below it, sorted; or a data set `save_to_disk` wrote
  'src/**/*.py'         a glob
  hf:NAME[:SPLIT]       a Hugging Face data set by name (default split: train)

NAME labels the source in reports (default: the last part of the path).

A window is `context` tokens cut from documents laid end to end; `position_ids` restart at 0 and the label is ignored
wherever a document begins, so nothing crosses a document boundary. Order depends on the seed alone, not on any
library's random generator.
"""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

IGNORE_INDEX = -100
# A single tokenizer call: large enough to keep its threads busy, small enough for the progress bar to move.
_CHARACTERS_PER_CALL = 1 << 21
# With fewer documents than this, a held-out split of whole documents would be one author's or none.
_MIN_DOCUMENTS_TO_SPLIT = 20


class DataError(ValueError):
    """The data cannot be used; the message says which file or field and what to do."""


@dataclass(frozen=True)
class Documents:
    """Tokenised documents, end to end.

    tokens: integer array [N].  offsets: int64 [D + 1], the first token of every document.
    origins: int32 [D], index into `names` of the source every document came from.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    origins: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def document(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """Hex digest of the tokens and the document boundaries."""
        digest = hashlib.sha256()
        digest.update(np.ascontiguousarray(self.tokens, dtype=np.int64).tobytes())
        digest.update(np.ascontiguousarray(self.offsets, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def select(self, indices: Sequence[int] | np.ndarray) -> Documents:
        """These documents, in this order."""
        return Documents.from_arrays(
            [self.document(int(i)) for i in indices], [int(self.origins[int(i)]) for i in indices], self.names
        )

    def by_name(self) -> dict[str, Documents]:
        """One set per source, in the order the sources were given."""
        return {name: self.select(np.flatnonzero(self.origins == i)) for i, name in enumerate(self.names)}

    @staticmethod
    def from_arrays(arrays: Sequence[np.ndarray], origins: Sequence[int], names: Sequence[str]) -> Documents:
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        if arrays:
            np.cumsum([len(a) for a in arrays], out=offsets[1:])
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        return Documents(tokens, offsets, np.asarray(origins, dtype=np.int32), tuple(names))


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """One document as found: text still to be tokenised, or tokens."""

    origin: int
    content: str | np.ndarray


def _split_name(source: str) -> tuple[str | None, str]:
    name, equals, where = source.partition("=")
    if equals and name and "/" not in name and not Path(source).exists():
        return name, where
    return None, source


def _expand(where: str, per_file: bool) -> list[tuple[str, Path]]:
    """(label, file) of every file a path, folder or glob stands for."""
    path = Path(where).expanduser()
    if path.is_file():
        return [(path.stem, path)]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        if not files:
            raise DataError(f"{where}: the folder holds no files")
        label = path.resolve().name
    else:
        files = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not files:
            hint = "" if any(c in where for c in "*?[") else f"; for a data set by name write hf:{where}"
            raise DataError(f"{where}: no such file or folder, and no file matches it as a glob{hint}")
        label = where
    return [(p.stem if per_file else label, p) for p in files]


def _read_text(path: Path, named: bool) -> str | None:
    """The text of a file; None for a binary file met in a folder, an error for one named by the user."""
    raw = path.read_bytes()
    try:
        if b"\0" in raw[:4096]:
            raise UnicodeDecodeError("utf-8", b"", 0, 1, "holds zero bytes")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if named:
            raise DataError(
                f"{path}: not a UTF-8 text file ({error.reason}); "
                "convert it (iconv -t utf-8); token files are named *.bin"
            ) from None
        return None


def _read_jsonl(path: Path, text_field: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not JSON ({error.msg}); one object per line is expected"
                ) from None
            yield _field(record, text_field, f"{path}, line {number}")


def _field(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict) or text_field not in record:
        found = sorted(record) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: no field '{text_field}' (found: {found}); name the text's field with --text-field")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field '{text_field}' is {type(text).__name__}, expected a string")
    return text


def _read_bin(path: Path, vocab_size: int | None, end_of_text: int | None) -> list[np.ndarray]:
    size = path.stat().st_size
    if size % 2:
        raise DataError(
            f"{path}: {size} bytes is no whole number of uint16 tokens; the file is truncated or no token file"
        )
    tokens = np.fromfile(path, dtype=np.uint16)
    if vocab_size is not None and len(tokens) and int(tokens.max()) >= vocab_size:
        at = int(np.argmax(tokens >= vocab_size))
        raise DataError(
            f"{path}: token {int(tokens[at])} at position {at} lies outside the model's vocabulary of {vocab_size}; "
            "the file was made with another tokenizer"
        )
    if end_of_text is None:
        return [tokens]
    ends = np.flatnonzero(tokens == end_of_text) + 1
    return [part for part in np.split(tokens, ends) if len(part)]


def _import_datasets(where: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{where}: reading a Hugging Face data set needs the package: pip install datasets") from None
    return datasets


def _read_dataset(where: str, text_field: str) -> Iterator[str]:
    datasets = _import_datasets(where)
    if where.startswith("hf:"):
        name, _, split = where[3:].partition(":")
        try:
            data = datasets.load_dataset(name, split=split or "train")
        except Exception as error:  # the hub, the network and the data set's own code all raise their own kinds
            raise DataError(f"{where}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    else:
        data = datasets.load_from_disk(where)
        if isinstance(data, datasets.DatasetDict):
            if "train" not in data:
                raise DataError(f"{where}: has the splits {sorted(data)}; name one: {where}/SPLIT")
            data = data["train"]
    for i, record in enumerate(data):
        yield _field(record, text_field, f"{where}, record {i}")


def _is_saved_dataset(path: Path) -> bool:
    return path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file())


def _pieces_of(
    source: str,
    origin: Callable[[str], int],
    text_field: str,
    vocab_size: int | None,
    end_of_text: int | None,
    per_file: bool,
    skipped: list[str],
) -> Iterator[_Piece]:
    name, where = _split_name(source)
    if where.startswith("hf:") or _is_saved_dataset(Path(where)):
        label = name or (where[3:].split(":")[0] if where.startswith("hf:") else Path(where).resolve().name)
        for text in _read_dataset(where, text_field):
            yield _Piece(origin(label), text)
        return
    files = _expand(where, per_file)
    for label, path in files:
        index = origin(name if name and not per_file else label)
        if path.suffix == ".bin":
            for tokens in _read_bin(path, vocab_size, end_of_text):
                yield _Piece(index, tokens)
        elif path.suffix == ".jsonl":
            for text in _read_jsonl(path, text_field):
                yield _Piece(index, text)
        else:
            content = _read_text(path, named=len(files) == 1)
            if content is None:
                skipped.append(str(path))
            else:
                yield _Piece(index, content)


def _progress(enabled: bool, **kwargs: Any) -> Any:
    from tqdm import tqdm

    return tqdm(disable=not enabled, file=sys.stderr, dynamic_ncols=True, **kwargs)


def _encode(texts: list[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Token ids with the tokenizer's own special tokens, ended by its end-of-text token where it has one."""
    end = tokenizer.eos_token_id
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
        yield np.asarray(ids, dtype=np.int32)


def load_documents(
    sources: Sequence[str],
    tokenizer: Any = None,
    *,
    text_field: str = "text",
    vocab_size: int | None = None,
    joined: bool = False,
    per_file: bool = False,
    max_tokens: int | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> Documents:
    """Read and tokenise every source (see the module's text for what a source may be).

    tokenizer: a transformers tokenizer; may be None where all sources are token files.
    joined: treat each source as one long stream, as most pretraining does; documents then see one another.
    per_file: label documents by file rather than by source.
    max_tokens: stop reading a source after this many tokens.
    report: called with a line on whatever was left out.
    Raises DataError.
    """
    if not sources:
        raise DataError("no data given; name text files, folders, globs, *.jsonl, *.bin or hf:NAME")
    end_of_text = None if tokenizer is None else tokenizer.eos_token_id
    names: dict[str, int] = {}
    arrays: list[np.ndarray] = []
    origins: list[int] = []
    skipped: list[str] = []
    empty = 0

    def origin(label: str) -> int:
        return names.setdefault(label, len(names))

    with _progress(progress, desc="reading", unit=" tokens", unit_scale=True) as bar:
        for source in sources:
            start, taken = len(arrays), 0
            pieces = _pieces_of(source, origin, text_field, vocab_size, end_of_text, per_file, skipped)
            for piece, tokens in _tokenised(pieces, tokenizer, source):
                if not len(tokens):
                    empty += 1
                    continue
                if max_tokens is not None:
                    tokens = tokens[: max_tokens - taken]
                arrays.append(tokens)
                origins.append(piece.origin)
                taken += len(tokens)
                bar.update(len(tokens))
                if max_tokens is not None and taken >= max_tokens:
                    break
            if len(arrays) == start:
                raise DataError(f"{source}: no text in it (every document is empty or binary)")
            if joined:
                _join(arrays, origins, start)
    if report:
        if skipped:
            report(f"left out {len(skipped)} files that are no UTF-8 text, {skipped[0]} for one")
        if empty:
            report(f"left out {empty} empty documents")
    documents = Documents.from_arrays(arrays, origins, list(names))
    if vocab_size is not None and int(documents.tokens.max()) >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {int(documents.tokens.max())}, outside the model's vocabulary of {vocab_size}; "
            "name the model's own tokenizer with --tokenizer"
        )
    return documents


def _tokenised(pieces: Iterable[_Piece], tokenizer: Any, source: str) -> Iterator[tuple[_Piece, np.ndarray]]:
    batch: list[_Piece] = []
    characters = 0

    def flush() -> Iterator[tuple[_Piece, np.ndarray]]:
        if batch:
            yield from zip(batch, _encode([str(p.content) for p in batch], tokenizer), strict=True)
            batch.clear()

    for piece in pieces:
        if isinstance(piece.content, np.ndarray):
            yield from flush()
            yield piece, piece.content
            continue
        if tokenizer is None:
            raise DataError(
                f"{source}: text needs a tokenizer, and the model's folder has none; name one with --tokenizer"
            )
        if not piece.content.strip():
            yield piece, np.zeros(0, dtype=np.int32)
            continue
        batch.append(piece)
        characters += len(piece.content)
        if characters >= _CHARACTERS_PER_CALL:
            yield from flush()
            characters = 0
    yield from flush()


def _join(arrays: list[np.ndarray], origins: list[int], start: int) -> None:
    """Replace arrays[start:] by one array per origin."""
    merged: dict[int, list[np.ndarray]] = {}
    for array, index in zip(arrays[start:], origins[start:], strict=True):
        merged.setdefault(index, []).append(array)
    del arrays[start:], origins[start:]
    for index, parts in merged.items():
        arrays.append(np.concatenate(parts))
        origins.append(index)


# ---- order, splits, windows ------------------------------------------------------------------------------------------


def _hash(seed: int, stream: int, count: int) -> np.ndarray:
    """splitmix64 of (seed, stream, 0..count-1): the same order on every machine and numpy."""
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        start = np.uint64((seed * 0xD1342543DE82EF95 + stream * 0x2545F4914F6CDD1D) % 2**64)
        z = start + np.arange(1, count + 1, dtype=np.uint64) * golden
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permutation(seed: int, stream: int, count: int) -> np.ndarray:
    """A fixed permutation of 0..count-1 for each (seed, stream). int64 [count]."""
    return np.argsort(_hash(seed, stream, count), kind="stable")


def split_held_out(documents: Documents, fraction: float, seed: int) -> tuple[Documents, Documents]:
    """(train, held out): whole documents chosen by the seed, or the end of each where there are few.

    No token is in both. Raises DataError where a part would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"held-out fraction {fraction}: expected a number between 0 and 1")
    if len(documents) < _MIN_DOCUMENTS_TO_SPLIT:
        heads, tails = [], []
        for i in range(len(documents)):
            tokens = documents.document(i)
            cut = len(tokens) - round(fraction * len(tokens))
            heads.append(tokens[:cut])
            tails.append(tokens[cut:])
        parts = []
        for arrays in (heads, tails):
            keep = [i for i, a in enumerate(arrays) if len(a)]
            parts.append(
                Documents.from_arrays(
                    [arrays[i] for i in keep], [int(documents.origins[i]) for i in keep], documents.names
                )
            )
        train, held = parts
    else:
        order = permutation(seed, 1 << 20, len(documents))
        filled = np.cumsum(documents.lengths()[order])
        count = int(np.searchsorted(filled, fraction * documents.num_tokens)) + 1
        held, train = documents.select(np.sort(order[:count])), documents.select(np.sort(order[count:]))
    if not train.num_tokens or not held.num_tokens:
        raise DataError(
            f"holding out {fraction:g} of {documents.num_tokens} tokens in {len(documents)} documents leaves one part "
            "empty; give more data or another fraction"
        )
    return train, held


class PackedWindows(torch.utils.data.Dataset):
    """`length` training windows: pass after pass over the documents, each pass in its own order.

    Item i is a dict of int64 tensors [context]: input_ids, labels (IGNORE_INDEX where a document begins: nothing
    before it may predict it), position_ids (0 where a document begins). A document is cut where a window ends and goes
    on in the next window as a document of its own. The last tokens of a pass that fill no window are left out of it.
    """

    def __init__(self, documents: Documents, context: int, *, seed: int, length: int | None = None) -> None:
        if context < 2:
            raise DataError(f"context {context}: expected at least 2 tokens")
        self.documents, self.context, self.seed = documents, context, seed
        self.per_pass = documents.num_tokens // context
        if not self.per_pass:
            raise DataError(
                f"the data has {documents.num_tokens} tokens, fewer than one context of {context}; give more data or a "
                "smaller --context"
            )
        self.length = self.per_pass if length is None else length
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.length

    def _layout(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of the documents, their starts in the stream, and the order of the windows, in pass `number`."""
        if number not in self._layouts:
            order = permutation(self.seed, 2 * number, len(self.documents))
            starts = np.concatenate([[0], np.cumsum(self.documents.lengths()[order])])
            windows = permutation(self.seed, 2 * number + 1, self.per_pass)
            self._layouts = {number: (order, starts, windows)}
        return self._layouts[number]

    def pieces(self, i: int) -> list[np.ndarray]:
        """The (parts of) documents in window i; their lengths add up to the context."""
        if not 0 <= i < self.length:
            raise IndexError(i)
        number, place = divmod(i, self.per_pass)
        order, starts, windows = self._layout(number)
        first = int(windows[place]) * self.context
        last = first + self.context
        parts = []
        d = int(np.searchsorted(starts, first, side="right")) - 1
        while d < len(order) and starts[d] < last:
            tokens = self.documents.document(int(order[d]))
            part = tokens[max(0, first - int(starts[d])) : last - int(starts[d])]
            if len(part):
                parts.append(part)
            d += 1
        return parts

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        parts = self.pieces(i)
        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        positions = torch.cat([torch.arange(len(p)) for p in parts])
        labels = ids.masked_fill(positions == 0, IGNORE_INDEX)
        return {"input_ids": ids, "labels": labels, "position_ids": positions}

    def cu_seqlens(self, i: int) -> torch.Tensor:
        """int32 [D + 1]: first token of every document part of window i, and the context."""
        lengths = [len(p) for p in self.pieces(i)]
        return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def evaluation_pieces(
    documents: Documents, context: int, max_tokens: int | None = None
) -> list[tuple[int, np.ndarray]]:
    """(document, tokens) cut into pieces of at most `context` tokens, in order; single tokens are left out.

    max_tokens: stop once this many tokens are taken.
    """
    out, taken = [], 0
    for d in range(len(documents)):
        tokens = documents.document(d)
        for start in range(0, len(tokens), context):
            piece = tokens[start : start + context]
            if max_tokens is not None:
                piece = piece[: max_tokens - taken]
            if len(piece) > 1:
                out.append((d, piece))
                taken += len(piece)
            if max_tokens is not None and taken >= max_tokens - 1:
                return out
    return out
