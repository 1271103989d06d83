"""Sources -> tokenized documents."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lemo.data.documents import DataError, Documents, compact
from lemo.data.encode import ChatEncoder, TextEncoder
from lemo.data.records import Chat, Pair, RecordOptions, Tokens
from lemo.data.sources import Piece, Sources, is_blank
from lemo.data.tokens import TOKEN_DTYPES, TokenFormat

# A single tokenizer call: large enough to keep its threads busy, small enough for the progress bar to move.
_CHARACTERS_PER_CALL = 1 << 21


# Many arguments, but two of them positional: the rest are options by name, as the command has them.
def load_documents(
    sources: Sequence[str],
    tokenizer: Any = None,
    *,
    text_field: str | None = None,
    vocab_size: int | None = None,
    token_dtype: str | None = None,
    end_of_text: int | None = None,
    special_tokens: str = "auto",
    answers_only: bool = False,
    joined: bool = False,
    per_file: bool = False,
    max_tokens: int | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> Documents:
    """Read and tokenize every source (see the package's text for what a source may be).

    tokenizer: a transformers tokenizer; may be None if all sources hold tokens.
    text_field: the field of records to use; by default input_ids, text, messages, or prompt and completion.
    token_dtype: "uint16" or "uint32", the width of token files without a header.
    end_of_text: the token that ends documents in token files (default: the tokenizer's).
    special_tokens: whether special tokens written out in text are the tokens: "auto", "parse" or "plain"
      (`lemo.data.encode.TextEncoder`).
    answers_only: of conversations and of prompts with completions, only the answers become labels.
    joined: treat each source as one long stream, as most pretraining does; documents then see one another.
    per_file: label documents by file rather than by source.
    max_tokens: stop reading a source after this many tokens.
    report: called with a line on whatever was left out, or read in a way that one might not expect.
    Raises DataError.
    """
    if not sources:
        raise DataError("no data given; name text files, folders, globs, *.jsonl, *.bin or hf:NAME")
    if token_dtype not in (None, *TOKEN_DTYPES):
        raise DataError(f"token_dtype {token_dtype!r}: expected uint16 or uint32")
    size = vocab_size if vocab_size is not None or tokenizer is None else len(tokenizer)
    encoder = _Encoder(tokenizer, special_tokens, answers_only)
    known = _token_format(encoder.text, size, token_dtype, end_of_text)
    options = RecordOptions(text_field, answers_only, known)
    names: dict[str, int] = {}
    found = Sources(options, lambda label: names.setdefault(label, len(names)), per_file)
    parts = _Parts()
    with _progress(progress, desc="reading", unit=" tokens", unit_scale=True) as bar:
        for source in sources:
            start = len(parts.arrays)
            parts.read(encoder.encode(found.pieces(source)), max_tokens, bar.update)
            if len(parts.arrays) == start:
                raise DataError(_nothing_in(source, found))
            if joined:
                parts.join(start)
    if report:
        for line in (*found.left.lines(), *encoder.lines(), *parts.lines(tokenizer)):
            report(line)
    documents = parts.documents(list(names))
    if vocab_size is not None:
        _check_vocabulary(documents, vocab_size)
    return documents


def _check_vocabulary(documents: Documents, vocab_size: int) -> None:
    largest = int(documents.tokens.max())
    if largest >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {largest}, outside the model's vocabulary of {vocab_size}; name the model's "
            "own tokenizer with --tokenizer"
        )


def _token_format(
    text: TextEncoder | None, vocab_size: int | None, dtype: str | None, end_of_text: int | None
) -> TokenFormat:
    if text is None:
        return TokenFormat(vocab_size, dtype, end_of_text)
    if end_of_text is None:
        end_of_text = text.eos
    pad = text.tokenizer.pad_token_id
    # A token with another meaning may be text.
    if pad in (text.tokenizer.unk_token_id, text.bos):
        pad = None
    return TokenFormat(vocab_size, dtype, end_of_text, text.adds_bos and text.bos == end_of_text, pad)


def _nothing_in(source: str, found: Sources) -> str:
    if found.left.no_records:
        example = found.left.no_records[0]
        return f"{source}: no data in it; {example}, for one, holds no records of text or tokens (see --text-field)"
    return f"{source}: no text in it (every document is empty or binary)"


def _progress(enabled: bool, **kwargs: Any) -> Any:
    from tqdm import tqdm

    return tqdm(disable=not enabled, file=sys.stderr, dynamic_ncols=True, **kwargs)


class _Parts:
    """The documents so far."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.trained: list[np.ndarray | None] = []
        self.origins: list[int] = []
        self.empty = self.unlabelled = 0

    def add(self, origin: int, tokens: Tokens, most: int | None) -> int:
        """The number of tokens taken, `most` of them at most."""
        ids, trained = tokens.ids[:most], tokens.trained
        if not len(ids):
            self.empty += 1
            return 0
        if trained is not None:
            trained = trained[:most]
            self.unlabelled += not trained[1:].any()
        self.arrays.append(compact(ids))
        self.trained.append(trained)
        self.origins.append(origin)
        return len(ids)

    def read(self, pieces: Iterator[tuple[Piece, Tokens]], most: int | None, advance: Callable[[int], object]) -> None:
        """The documents of one source, `most` tokens at most. advance: called with every number of tokens taken."""
        taken = 0
        for piece, tokens in pieces:
            kept = self.add(piece.origin, tokens, None if most is None else most - taken)
            taken += kept
            advance(kept)
            if most is not None and taken >= most:
                break

    def join(self, start: int) -> None:
        """Replace the documents from `start` on by one for each origin."""
        merged: dict[int, list[int]] = {}
        for i in range(start, len(self.arrays)):
            merged.setdefault(self.origins[i], []).append(i)
        joined = []
        for origin, members in merged.items():
            masks: np.ndarray | None = None
            if any(self.trained[i] is not None for i in members):
                ones = [np.ones(len(self.arrays[i]), bool) for i in members]
                given = [self.trained[i] for i in members]
                masks = np.concatenate([o if g is None else g for o, g in zip(ones, given, strict=True)])
            joined.append((origin, np.concatenate([self.arrays[i] for i in members]), masks))
        del self.arrays[start:], self.origins[start:], self.trained[start:]
        for origin, ids, masks in joined:
            self.origins.append(origin)
            self.arrays.append(ids)
            self.trained.append(masks)

    def documents(self, names: list[str]) -> Documents:
        """names: by origin. Origins without a document have none in the result: each name is a domain to evaluate."""
        used = sorted(set(self.origins))
        origins = np.searchsorted(used, self.origins).tolist()
        return Documents.from_arrays(self.arrays, origins, [names[i] for i in used], self.trained)

    def lines(self, tokenizer: Any) -> Iterator[str]:
        if self.empty:
            yield f"left out {self.empty} empty document{'s' if self.empty > 1 else ''}"
        if self.unlabelled:
            yield f"{self.unlabelled} of {len(self.arrays)} documents have no labels: nothing in them is learned"
        bos = None if tokenizer is None else tokenizer.bos_token_id
        doubled = 0 if bos is None else sum(len(a) > 1 and a[0] == bos and a[1] == bos for a in self.arrays)
        if doubled:
            yield f"{doubled} documents begin with two {tokenizer.bos_token} tokens; they are used as they are"


class _Encoder:
    """Tokenizes what the sources hold, texts in batches; the order stays."""

    def __init__(self, tokenizer: Any, special_tokens: str, answers_only: bool) -> None:
        self.answers_only = answers_only
        self.text = None if tokenizer is None else TextEncoder(tokenizer, special_tokens)
        self.chat = None if self.text is None else ChatEncoder(self.text, answers_only)

    def lines(self) -> Iterable[str]:
        return [] if self.text is None else self.text.notes.lines(self.text.tokenizer)

    def encode(self, pieces: Iterable[Piece]) -> Iterator[tuple[Piece, Tokens]]:
        batch: list[Piece] = []
        characters = 0
        for piece in pieces:
            text = self._plain_text(piece)
            if text is None:
                yield from self._flush(batch)
                characters = 0
                yield piece, self._single(piece)
                continue
            batch.append(Piece(piece.origin, piece.where, text))
            characters += len(text)
            if characters >= _CHARACTERS_PER_CALL:
                yield from self._flush(batch)
                characters = 0
        yield from self._flush(batch)

    def _plain_text(self, piece: Piece) -> str | None:
        """The text to tokenize, or None if the content needs more than that."""
        content = piece.content
        if isinstance(content, Tokens) or is_blank(content):
            return None
        if self.text is None:
            raise DataError(
                f"{piece.where}: text needs a tokenizer, and the model's folder has none; name one with --tokenizer"
            )
        if isinstance(content, Pair) and not self.answers_only:
            return content.prompt + content.completion
        if isinstance(content, str) and self.answers_only:
            raise DataError(
                f"{piece.where}: --answers-only needs conversations (messages, or prompt and completion) and this is "
                "text; leave the option out, or name the field with --text-field"
            )
        return content if isinstance(content, str) else None

    def _flush(self, batch: list[Piece]) -> Iterator[tuple[Piece, Tokens]]:
        if batch:
            assert self.text is not None
            arrays = self.text.encode([str(p.content) for p in batch])
            pieces = batch.copy()
            batch.clear()
            yield from zip(pieces, map(Tokens, arrays), strict=True)

    def _single(self, piece: Piece) -> Tokens:
        content = piece.content
        if isinstance(content, Tokens):
            return content
        if isinstance(content, Pair) and self.text is not None:
            return self.text.encode_pair(content, piece.where)
        if isinstance(content, Chat) and self.chat is not None:
            return self.chat.encode(content, piece.where)
        return Tokens(np.zeros(0, np.int32))
