"""Tokenized documents laid end to end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Hashing converts to int64; in pieces, so that the copy stays small compared with the tokens.
_TOKENS_PER_HASH = 1 << 20


class DataError(ValueError):
    """The data cannot be used; the message names the file or field and what to do."""


@dataclass(frozen=True)
class Documents:
    """Tokenized documents, end to end.

    tokens: integer array [N].  offsets: int64 [D + 1], the first token of every document.
    origins: int32 [D], index into `names` of the source every document came from.
    trained: bool [N], the tokens that are labels; None if all of them are.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    origins: np.ndarray
    names: tuple[str, ...]
    trained: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    def document(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def labelled(self, i: int) -> np.ndarray | None:
        """bool mask of document i's labels; None if every token is one."""
        return None if self.trained is None else self.trained[self.offsets[i] : self.offsets[i + 1]]

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """Hex digest of the tokens, the document boundaries and, if there is one, the mask of labels."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.offsets):
            for start in range(0, len(array), _TOKENS_PER_HASH):
                part = array[start : start + _TOKENS_PER_HASH]
                digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        if self.trained is not None:
            digest.update(b"trained" + np.packbits(self.trained).tobytes())
        return digest.hexdigest()

    def select(self, indices: Sequence[int] | np.ndarray) -> Documents:
        """These documents, in this order."""
        return self.cut([(int(i), 0, int(self.offsets[i + 1] - self.offsets[i])) for i in indices])

    def cut(self, spans: Sequence[tuple[int, int, int]]) -> Documents:
        """A document for every (document, start, stop), in this order."""
        places = [(int(self.offsets[i]) + start, int(self.offsets[i]) + stop) for i, start, stop in spans]
        return Documents.from_arrays(
            [self.tokens[start:stop] for start, stop in places],
            [int(self.origins[i]) for i, _, _ in spans],
            self.names,
            None if self.trained is None else [self.trained[start:stop] for start, stop in places],
        )

    def by_name(self) -> dict[str, Documents]:
        """One set per source, in the order the sources were given."""
        return {name: self.select(np.flatnonzero(self.origins == i)) for i, name in enumerate(self.names)}

    @staticmethod
    def from_arrays(
        arrays: Sequence[np.ndarray],
        origins: Sequence[int],
        names: Sequence[str],
        trained: Sequence[np.ndarray | None] | None = None,
    ) -> Documents:
        """trained: a mask for every document, or None in place of one whose tokens are all labels."""
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        if arrays:
            np.cumsum([len(a) for a in arrays], out=offsets[1:])
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        mask: np.ndarray | None = None
        if trained is not None and any(t is not None for t in trained):
            mask = np.ones(len(tokens), dtype=bool)
            for i, part in enumerate(trained):
                if part is not None:
                    mask[offsets[i] : offsets[i + 1]] = part
        return Documents(tokens, offsets, np.asarray(origins, dtype=np.int32), tuple(names), mask)


def compact(tokens: np.ndarray) -> np.ndarray:
    """The same tokens in the smallest of uint16 and int32 that holds them."""
    fits = not len(tokens) or (int(tokens.max()) < 1 << 16 and int(tokens.min()) >= 0)
    return tokens.astype(np.uint16 if fits else np.int32, copy=False)
