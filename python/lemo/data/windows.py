"""Training windows and evaluation pieces of a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lemo.data.documents import DataError, Documents
from lemo.data.order import draws, permutation
from lemo.data.records import IGNORE_INDEX

# (document, start, stop): a part of a document, in its own tokens.
Span = tuple[int, int, int]

_PLACES = 1 << 32  # of the streams of a seed that passes over the data do not reach


class PackedWindows(torch.utils.data.Dataset):
    """`length` training windows: pass after pass over the documents, each pass in its own order.

    Item i is a dict of int64 tensors [context]: input_ids, labels (IGNORE_INDEX at the start of a document, as nothing
    before it may predict it, and wherever the documents' mask excludes a token), position_ids (0 at the start of a
    document). A document cut by the end of a window continues in the next window as a separate document. The last
    tokens of a pass that fill no window are left out of it, and so are windows without a label: they teach nothing.

    length: windows in all, default one pass.  report: called with a line on windows that were left out.
    """

    def __init__(
        self,
        documents: Documents,
        context: int,
        *,
        seed: int,
        length: int | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        if context < 2:
            raise DataError(f"context {context}: expected at least 2 tokens")
        self.documents, self.context, self.seed = documents, context, seed
        self.per_pass = documents.num_tokens // context
        if not self.per_pass:
            raise DataError(
                f"the data has {documents.num_tokens} tokens, fewer than one context of {context}; give more data or a "
                "smaller --context"
            )
        # Labels before each token: what windows hold is a difference. Without a mask and with documents of two tokens
        # or more, any three neighbors hold a label.
        self._labels: np.ndarray | None = None
        if documents.trained is not None or context < 3 or int(documents.lengths().min()) < 2:
            trained = np.ones(documents.num_tokens, bool) if documents.trained is None else documents.trained
            self._labels = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
        self._ends = [0]
        self._layouts: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        first = len(self._layout(0)[2])
        if not first:
            raise DataError(
                f"no window of {context} tokens has a token to predict; the labels of the data are all ignored, or its "
                "documents have one token each"
            )
        if report and first < self.per_pass:
            report(f"left out {self.per_pass - first} of {self.per_pass} windows of a pass, which have no labels")
        self.length = first if length is None else length

    def __len__(self) -> int:
        return self.length

    def _layout(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of the documents, their starts in the stream, and the order of the windows, in pass `number`."""
        if number not in self._layouts:
            order = permutation(self.seed, 2 * number, len(self.documents))
            starts = np.concatenate([[0], np.cumsum(self.documents.lengths()[order])])
            windows = permutation(self.seed, 2 * number + 1, self.per_pass)
            if self._labels is not None:
                windows = windows[self._labels_per_window(self._labels, order, starts)[windows] > 0]
            self._layouts = {number: (order, starts, windows)}
            if number + 1 == len(self._ends):
                self._ends.append(self._ends[-1] + len(windows))
        return self._layouts[number]

    def _labels_per_window(self, labels: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """int64 [per_pass]: labels of every window; the first token of each part of a document is never one."""
        cuts = np.union1d(starts, np.arange(self.per_pass + 1) * self.context)
        cuts = cuts[cuts <= self.per_pass * self.context]
        begin, end = cuts[:-1], cuts[1:]
        # The places of those parts in the documents' own tokens.
        place = np.searchsorted(starts, begin, side="right") - 1
        shift = self.documents.offsets[order[place]] - starts[place]
        counts = labels[end + shift] - labels[begin + 1 + shift]
        return np.bincount(begin // self.context, weights=counts, minlength=self.per_pass).astype(np.int64)

    def _find(self, i: int) -> tuple[int, int]:
        """(pass, place in it) of window i."""
        if self._labels is None:
            return divmod(i, self.per_pass)
        while self._ends[-1] <= i:
            self._layout(len(self._ends) - 1)
        number = int(np.searchsorted(self._ends, i, side="right")) - 1
        return number, i - self._ends[number]

    def tokens(self, i: int) -> int:
        """Of window i."""
        return self.context

    def spans(self, i: int) -> list[Span]:
        """The parts of documents in window i, in order; their lengths add up to its tokens."""
        return self._whole(i)

    def _whole(self, i: int) -> list[Span]:
        if not 0 <= i < self.length:
            raise IndexError(i)
        number, place = self._find(i)
        order, starts, windows = self._layout(number)
        first = int(windows[place]) * self.context
        last = first + self.context
        parts = []
        d = int(np.searchsorted(starts, first, side="right")) - 1
        while d < len(order) and starts[d] < last:
            start, stop = max(first, int(starts[d])), min(last, int(starts[d + 1]))
            if stop > start:
                parts.append((int(order[d]), start - int(starts[d]), stop - int(starts[d])))
            d += 1
        return parts

    def pieces(self, i: int) -> list[np.ndarray]:
        """The tokens of each part of a document in window i."""
        return [self.documents.document(d)[start:stop] for d, start, stop in self.spans(i)]

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self._part(i, self._item(self._whole(i)))

    def _part(self, i: int, item: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is trained on, of all of window i."""
        return item

    def _item(self, spans: Sequence[Span]) -> dict[str, torch.Tensor]:
        parts = [self.documents.document(d)[start:stop] for d, start, stop in spans]
        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        positions = torch.cat([torch.arange(len(p)) for p in parts])
        ignored = positions == 0
        masks = [self.documents.labelled(d) for d, _, _ in spans]
        if masks[0] is not None:
            mask = np.concatenate([m[a:b] for m, (_, a, b) in zip(masks, spans, strict=True) if m is not None])
            ignored |= torch.from_numpy(~mask)
        return {"input_ids": ids, "labels": ids.masked_fill(ignored, IGNORE_INDEX), "position_ids": positions}

    def cu_seqlens(self, i: int) -> torch.Tensor:
        """int32 [D + 1]: first token of every document part of window i, and the context."""
        lengths = [stop - start for _, start, stop in self.spans(i)]
        return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


class CutWindows(PackedWindows):
    """`PackedWindows` of which some are cut: to `tokens_of(i)` tokens, at a place that depends on (seed, i) alone.

    Positions stay those in the whole window, so that short windows train all of a long context's positions. The part
    has a label if the window does.
    """

    def __init__(
        self,
        documents: Documents,
        context: int,
        *,
        seed: int,
        tokens_of: Callable[[int], int],
        length: int | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__(documents, context, seed=seed, length=length, report=report)
        self._tokens_of = tokens_of

    def tokens(self, i: int) -> int:
        return self._tokens_of(i)

    def _start(self, i: int, labels: torch.Tensor) -> int:
        """The first token of window i that stays, from the labels [context] of all of it."""
        tokens, room = self.tokens(i), self.context - self.tokens(i)
        start = int(draws(self.seed, _PLACES, i, 1)[0] % (room + 1))
        if (labels[start + 1 : start + tokens] != IGNORE_INDEX).any():
            return start
        labelled = (labels != IGNORE_INDEX).nonzero()[:, 0]
        one = int(labelled[int(draws(self.seed, _PLACES + 1, i, 1)[0] % len(labelled))])
        return min(max(one - tokens // 2, 0), room)

    def spans(self, i: int) -> list[Span]:
        whole = self._whole(i)
        if self.tokens(i) == self.context:
            return whole
        start = self._start(i, self._item(whole)["labels"])
        parts, at = [], 0
        for d, a, b in whole:
            first, last = max(start - at, 0), min(start + self.tokens(i) - at, b - a)
            if first < last:
                parts.append((d, a + first, a + last))
            at += b - a
        return parts

    def _part(self, i: int, item: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.tokens(i) == self.context:
            return item
        start = self._start(i, item["labels"])
        part = {name: values[start : start + self.tokens(i)].clone() for name, values in item.items()}
        part["labels"][0] = IGNORE_INDEX  # nothing before it is there to predict it
        return part


def evaluation_spans(documents: Documents, context: int, max_tokens: int | None = None) -> list[Span]:
    """Documents cut into parts of at most `context` tokens, in order; parts that predict no label are left out.

    max_tokens: stop once this many tokens are taken.
    """
    out: list[Span] = []
    taken = 0
    lengths = documents.lengths()
    for d in range(len(documents)):
        labelled = documents.labelled(d)
        for start in range(0, int(lengths[d]), context):
            stop = min(start + context, int(lengths[d]))
            if max_tokens is not None:
                stop = min(stop, start + max_tokens - taken)
            if stop - start > 1 and (labelled is None or labelled[start + 1 : stop].any()):
                out.append((d, start, stop))
                taken += stop - start
            if max_tokens is not None and taken >= max_tokens - 1:
                return out
    return out


def evaluation_pieces(
    documents: Documents, context: int, max_tokens: int | None = None
) -> list[tuple[int, np.ndarray]]:
    """(document, tokens) of every part of `evaluation_spans`."""
    spans = evaluation_spans(documents, context, max_tokens)
    return [(d, documents.document(d)[start:stop]) for d, start, stop in spans]
