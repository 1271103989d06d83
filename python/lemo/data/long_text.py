"""One long text tokenized in pieces, as it would be tokenized whole.

A tokenizer keeps far more than the ids of the text it is given, so a book at once takes gigabytes. The text is cut
into pieces that overlap, and two neighbors are joined inside the overlap where both read a run of tokens alike, ids
and places in the text. How a tokenizer reads a text depends on what is near: beyond such a run, both pieces read on as
they would in the whole text, and what the cut changed lies outside. If no such run is found (in a text without a space,
for instance), the overlap grows, up to the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

CHARACTERS_PER_PIECE = 1 << 17
_OVERLAP = 1 << 12
# Tokens that two pieces have to read alike to be joined.
_RUN = 24
_PIECES_PER_CALL = 4


def encode_long(tokenizer: Any, text: str, *, split_special_tokens: bool, size: int | None = None) -> np.ndarray:
    """int32 ids of the text, without added special tokens. size: characters per piece."""
    size = size or CHARACTERS_PER_PIECE
    options: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    if split_special_tokens:
        options["split_special_tokens"] = True
    if not getattr(tokenizer, "is_fast", False):
        return np.asarray(tokenizer(text, **options)["input_ids"], dtype=np.int32)
    overlap = min(_OVERLAP, size // 2)
    while size < len(text):
        ids = _joined(tokenizer, text, size, overlap, options)
        if ids is not None:
            return ids
        overlap, size = 8 * overlap, max(size, 32 * overlap)
    return np.asarray(tokenizer(text, **options)["input_ids"], dtype=np.int32)


def _joined(tokenizer: Any, text: str, size: int, overlap: int, options: dict[str, Any]) -> np.ndarray | None:
    parts: list[np.ndarray] = []
    last: _Piece | None = None
    for piece in _pieces(tokenizer, text, size, overlap, options):
        if last is not None:
            place = _agreement(last, piece)
            if place is None:
                return None
            parts.append(last.ids[last.begin : place[0]])
            piece.begin = place[1]
        last = piece
    if last is not None:
        parts.append(last.ids[last.begin :])
    return np.concatenate(parts)


class _Piece:
    """A piece's tokens. begin: the first that belongs to the result."""

    def __init__(self, encoding: Any, start: int, stop: int) -> None:
        self.encoding, self.start, self.stop, self.begin = encoding, start, stop, 0
        self.ids = np.asarray(encoding.ids, dtype=np.int32)

    def place(self, token: int) -> tuple[int, int] | None:
        found = self.encoding.token_to_chars(token)
        return None if found is None else (found[0] + self.start, found[1] + self.start)

    def reads(self, first: int, last: int, backwards: bool) -> list[tuple[int, int, int, int]]:
        """(index, id, first character, end) of the tokens in characters first to last, which end or begin the piece."""
        found = []
        for i in range(len(self.ids) - 1, self.begin - 1, -1) if backwards else range(len(self.ids)):
            place = self.place(i)
            if place is None:
                continue
            if place[0] < first or place[1] > last:
                break
            found.append((i, int(self.ids[i]), *place))
        return found[::-1] if backwards else found


def _pieces(tokenizer: Any, text: str, size: int, overlap: int, options: dict[str, Any]) -> Iterator[_Piece]:
    spans: list[tuple[int, int]] = []
    start = 0
    while not spans or spans[-1][1] < len(text):
        spans.append((start, min(start + size, len(text))))
        start = spans[-1][1] - overlap
    for k in range(0, len(spans), _PIECES_PER_CALL):
        group = spans[k : k + _PIECES_PER_CALL]
        encodings = tokenizer([text[a:b] for a, b in group], **options).encodings
        for encoding, (a, b) in zip(encodings, group, strict=True):
            yield _Piece(encoding, a, b)


def _agreement(left: _Piece, right: _Piece) -> tuple[int, int] | None:
    """(token of left, token of right) at which the right piece takes over; None if they read nothing alike."""
    a = left.reads(right.start, left.stop, backwards=True)
    b = right.reads(right.start, left.stop, backwards=False)
    where: dict[tuple[int, int, int], int] = {}
    for j, token in enumerate(b):
        where.setdefault(token[1:], j)
    middle = len(a) // 2
    half = _RUN // 2
    for i in sorted(range(len(a) - _RUN), key=lambda i: abs(i + half - middle)):
        same = where.get(a[i][1:])
        if same is not None and [t[1:] for t in a[i : i + _RUN]] == [t[1:] for t in b[same : same + _RUN]]:
            return a[i + half][0], b[same + half][0]
    return None
