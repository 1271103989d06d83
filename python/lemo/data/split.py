"""Holding a part of the documents out of training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lemo.data.documents import DataError, Documents
from lemo.data.order import permutation

# With fewer documents than this, a held-out split of whole documents would be one author's or none.
_MIN_DOCUMENTS_TO_SPLIT = 20
# A part of a document with fewer tokens has nothing to predict.
_MIN_TOKENS = 2
# Held-out tokens, as a multiple of what was asked for, from which a document is cut rather than taken whole.
_MOST = 2.0


def split_held_out(
    documents: Documents, fraction: float, seed: int, report: Callable[[str], None] | None = None
) -> tuple[Documents, Documents]:
    """(train, held out), divided by tokens: about `fraction` of them is held out and no token is in both.

    Whole documents are held out, chosen by the seed. A document too long for that (longer than all that is to be held
    out) gives its end instead, `fraction` of it, as does every document if there are few. Much more than the
    fraction is held out only if no document can be cut to prevent it.

    report: called with a line on what was held out. Raises DataError if a part would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"held-out fraction {fraction}: expected a number between 0 and 1")
    lengths = documents.lengths()
    target = fraction * documents.num_tokens
    tails = np.array([round(fraction * int(n)) for n in lengths], dtype=np.int64)
    few = len(documents) < _MIN_DOCUMENTS_TO_SPLIT
    cut = (tails >= _MIN_TOKENS) & (lengths - tails >= _MIN_TOKENS) & (few | (lengths > target))
    held = np.where(cut, tails, 0)
    _hold_whole(held, lengths, cut, fraction, permutation(seed, 1 << 20, len(documents)))
    spans = [(int(i), int(lengths[i] - held[i]), int(lengths[i])) for i in np.flatnonzero(held)]
    rest = [(int(i), 0, int(lengths[i] - held[i])) for i in np.flatnonzero(held < lengths)]
    if not spans or not rest:
        raise DataError(
            f"holding out {fraction:g} of {documents.num_tokens} tokens in {len(documents)} documents leaves one part "
            "empty; give more data or another fraction"
        )
    if report:
        report(_describe(documents, held, fraction))
    return documents.cut(rest), documents.cut(spans)


def _hold_whole(held: np.ndarray, lengths: np.ndarray, cut: np.ndarray, fraction: float, order: np.ndarray) -> None:
    """Hold out documents that are not cut, in this order, until they make up their share; the last may be cut too."""
    order = order[~cut[order] & (lengths[order] > 0)]
    share = fraction * int(lengths[order].sum())
    most = _MOST * fraction * int(lengths.sum())
    taken = 0
    for i in order:
        if taken >= share:
            return
        length = int(lengths[i])
        everything = int(held.sum()) + length >= int(lengths.sum())
        if everything or int(held.sum()) + length > most:
            missing = max(_MIN_TOKENS, round(share - taken))
            if length - missing >= _MIN_TOKENS:
                held[i] = missing
                return
            if everything or held.any():
                continue
        held[i] = length
        taken += length


def _describe(documents: Documents, held: np.ndarray, fraction: float) -> str:
    lengths = documents.lengths()
    total, tokens = int(lengths.sum()), int(held.sum())
    whole = int(((held == lengths) & (held > 0)).sum())
    cut = np.flatnonzero((held > 0) & (held < lengths))
    parts = [f"{whole} whole document{'s' if whole > 1 else ''}"] if whole else []
    if len(cut):
        longest = int(cut[np.argmax(lengths[cut])])
        name = documents.names[documents.origins[longest]]
        which = f"document {longest}, from {name}, with {int(lengths[longest])} tokens"
        if len(cut) > 1:
            which = f"{len(cut)} documents, the longest of them {which}"
        parts.append(f"the last {int(held[cut].sum())} tokens of {which}")
    return (
        f"held out {tokens} of {total} tokens ({100 * tokens / total:.1f} %, asked for {100 * fraction:g} %): "
        + " and ".join(parts)
    )
