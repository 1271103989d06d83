"""Reading sources, splitting, packing."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from lemo.data import (
    IGNORE_INDEX,
    CutWindows,
    DataError,
    Documents,
    PackedWindows,
    evaluation_pieces,
    evaluation_spans,
    permutation,
    split_held_out,
)


def documents_of(lengths: list[int]) -> Documents:
    """Document d holds the tokens 1000 d, 1000 d + 1, ...: every token says where it came from."""
    arrays = [np.arange(n, dtype=np.int32) + 1000 * d for d, n in enumerate(lengths)]
    return Documents.from_arrays(arrays, [0] * len(lengths), ["made"])


@pytest.mark.parametrize("lengths", [[5], [64, 64], [1, 1, 1, 1, 1], [7, 130, 3, 64, 1, 200, 2], [999] * 5])
@pytest.mark.parametrize("context", [2, 5, 64])
def test_packing_properties(lengths: list[int], context: int) -> None:
    documents = documents_of(lengths)
    if documents.num_tokens < context or max(lengths) == 1:
        with pytest.raises(DataError, match=r"fewer than one context|no window of .* has a token to predict"):
            PackedWindows(documents, context, seed=3)
        return
    lines: list[str] = []
    windows = PackedWindows(documents, context, seed=3, report=lines.append)
    dropped = documents.num_tokens // context - len(windows)
    assert len(lines) == (dropped > 0) and (context == 2 or not dropped)
    seen: list[int] = []
    for i in range(len(windows)):
        item = windows[i]
        ids, labels, positions = (item[k] for k in ("input_ids", "labels", "position_ids"))
        assert ids.shape == labels.shape == positions.shape == (context,)
        seen += ids.tolist()
        starts = positions == 0
        assert starts[0]
        # Inside a document both positions and its tokens go up by one; the label is ignored where one begins.
        inside = ~starts[1:]
        assert torch.equal(positions[1:][inside], positions[:-1][inside] + 1)
        assert torch.equal(ids[1:][inside], ids[:-1][inside] + 1)
        assert torch.equal(labels, ids.masked_fill(starts, IGNORE_INDEX))
        cu = windows.cu_seqlens(i)
        assert cu[0] == 0 and cu[-1] == context
        assert torch.equal(cu[:-1], torch.nonzero(starts).flatten().int())
        assert (labels != IGNORE_INDEX).any()
    # Nothing twice, and all but the tail that fills no window and windows without a label is there.
    assert len(set(seen)) == len(seen) == (documents.num_tokens // context - dropped) * context


def test_cut_windows_are_parts_at_shifted_places() -> None:
    """Of every window that is to have fewer tokens; with the positions that these have in the whole, and a label."""
    lengths = [7, 130, 3, 64, 1, 200, 2, 95]
    masks = [np.arange(n) % 50 == 7 for n in lengths]  # a few labels, which most parts lie beside
    for trained in (None, masks):
        arrays = [documents_of(lengths).document(d) for d in range(len(lengths))]
        documents = Documents.from_arrays(arrays, [0] * len(lengths), ["made"], trained)
        whole = PackedWindows(documents, 64, seed=3, length=40)
        windows = CutWindows(documents, 64, seed=3, tokens_of=lambda i: 16 if i % 2 else 64, length=40)
        again = CutWindows(documents, 64, seed=3, tokens_of=lambda i: 16, length=40)
        places = set()
        for i in range(40):
            item, all_of_it = windows[i], whole[i]
            if i % 2 == 0:
                assert all(torch.equal(item[name], values) for name, values in all_of_it.items())
                assert windows.spans(i) == whole.spans(i)
                continue
            ids = item["input_ids"]
            start = int((all_of_it["input_ids"] == ids[0]).nonzero()[0])
            places.add(start)
            for name, values in all_of_it.items():
                part = values[start : start + 16].clone()
                if name == "labels":
                    part[0] = IGNORE_INDEX
                assert torch.equal(item[name], part)
            assert (item["labels"] != IGNORE_INDEX).any()
            assert torch.equal(torch.from_numpy(np.concatenate(windows.pieces(i))), ids.int())
            assert all(torch.equal(again[i][name], values) for name, values in item.items())
        assert len(places) > 10 and max(places) <= 48


def test_masked_tokens_are_no_labels_and_windows_without_one_are_left_out() -> None:
    documents = documents_of([70, 40, 90])
    # One answer in each of two documents, and a document without any.
    masks = [np.zeros(n, bool) for n in (70, 40, 90)]
    masks[0][50:60] = True
    masks[2][5:9] = True
    documents = Documents.from_arrays([documents.document(i) for i in range(3)], [0, 0, 0], ["made"], masks)
    answers = {*range(50, 60), *range(2005, 2009)}
    lines: list[str] = []
    windows = PackedWindows(documents, 10, seed=2, report=lines.append)
    assert len(windows) < 20 and f"left out {20 - len(windows)} of 20 windows" in lines[0]
    long = PackedWindows(documents, 10, seed=2, length=60)
    seen = [long[i] for i in range(60)]
    # Pass after pass holds every answer but for those that begin a window or stand in the tail of the pass.
    for start in range(0, 60 - len(windows), len(windows)):
        labels = torch.cat([x["labels"] for x in seen[start : start + len(windows)]])
        assert set(labels.tolist()) - {IGNORE_INDEX} <= answers
    for item in seen:
        kept = item["labels"] != IGNORE_INDEX
        assert kept.any() and torch.equal(item["labels"][kept], item["input_ids"][kept])
    # The place in the data is the index, in whatever order windows are read.
    again = PackedWindows(documents, 10, seed=2, length=60)
    assert all(torch.equal(again[i]["input_ids"], seen[i]["input_ids"]) for i in (57, 3, 40, 0))
    assert sum(stop - start for d, start, stop in evaluation_spans(documents, 10)) == 20
    with pytest.raises(DataError, match="labels of the data are all ignored"):
        PackedWindows(documents.select([1]), 10, seed=2)


def test_the_mask_goes_where_its_tokens_go() -> None:
    masks = [np.array([False, True]), None, np.array([True, False, False])]
    arrays = [np.array([1, 2]), np.array([3, 4]), np.array([5, 6, 7])]
    documents = Documents.from_arrays(arrays, [0, 1, 0], ["a", "b"], masks)
    assert documents.trained is not None and documents.trained.tolist() == [False, True, True, True, True, False, False]
    picked = documents.select([2, 0])
    assert picked.trained is not None and picked.trained.tolist() == [True, False, False, False, True]
    plain = Documents.from_arrays(arrays, [0, 1, 0], ["a", "b"])
    assert plain.trained is None and plain.fingerprint() != documents.fingerprint()
    # The digest of what older runs recorded: int64 tokens, then int64 offsets.
    expected = hashlib.sha256(np.arange(1, 8).astype("<i8").tobytes() + np.array([0, 2, 4, 7], "<i8").tobytes())
    assert plain.fingerprint() == expected.hexdigest()


def test_order_depends_on_the_seed_and_the_pass_alone() -> None:
    documents = documents_of([50, 80, 20, 90, 60, 33])

    def tokens(seed: int, indices: range) -> list[int]:
        windows = PackedWindows(documents, 16, seed=seed, length=60)
        return torch.cat([windows[i]["input_ids"] for i in indices]).tolist()

    n = documents.num_tokens // 16
    assert tokens(1, range(n)) == tokens(1, range(n))
    assert tokens(1, range(n)) != tokens(2, range(n))
    assert tokens(1, range(n)) != tokens(1, range(n, 2 * n))
    # Reading from the middle gives what reading from the start gives there: the place in the data is the index.
    assert tokens(1, range(30, 40)) == tokens(1, range(40))[30 * 16 :]
    assert sorted(permutation(7, 0, 100).tolist()) == list(range(100))
    assert permutation(7, 3, 50).tolist() == sorted(range(50), key=lambda i: splitmix64(7, 3, i))


def splitmix64(seed: int, stream: int, index: int) -> int:
    """The order is part of what makes a run repeatable: it may not change with numpy's version or with ours."""
    mask = 2**64 - 1
    z = (seed * 0xD1342543DE82EF95 + stream * 0x2545F4914F6CDD1D + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def test_held_out_split() -> None:
    many = documents_of([10 + d for d in range(40)])
    train, held = split_held_out(many, 0.1, seed=5)
    assert set(train.tokens) | set(held.tokens) == set(many.tokens)
    assert not set(train.tokens) & set(held.tokens)
    assert 0.1 * many.num_tokens <= held.num_tokens <= 0.1 * many.num_tokens + 50
    assert split_held_out(many, 0.1, seed=5)[1].tokens.tolist() == held.tokens.tolist()
    assert split_held_out(many, 0.1, seed=6)[1].tokens.tolist() != held.tokens.tolist()
    few = documents_of([100, 300])
    train, held = split_held_out(few, 0.25, seed=5)
    assert held.lengths().tolist() == [25, 75] and train.lengths().tolist() == [75, 225]
    assert held.document(0).tolist() == list(range(75, 100))
    with pytest.raises(DataError, match="between 0 and 1"):
        split_held_out(few, 1.5, seed=1)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.2, 0.5])
@pytest.mark.parametrize(
    "lengths",
    [
        [100] * 40 + [100_000],
        [100_000] * 3 + [50] * 200,
        [37] * 500,
        [5] * 30 + [4000, 3000],
        [20_000, 3, 3, 3],
        [1000],
        [2**i for i in range(1, 17)],
        [2**i for i in range(1, 17)] * 2,
        [25] * 3,
    ],
    ids=lambda lengths: f"{len(lengths)}x{max(lengths)}",
)
def test_about_as_many_tokens_are_held_out_as_asked(lengths: list[int], fraction: float) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = Documents(np.arange(offsets[-1]), offsets, np.zeros(len(lengths), np.int32), ("made",))
    for seed in range(4):
        lines: list[str] = []
        train, held = split_held_out(documents, fraction, seed, lines.append)
        share = held.num_tokens / documents.num_tokens
        # Two tokens are the least that can be held out of a document.
        assert fraction / 2 <= share <= max(2 * fraction, 2 / documents.num_tokens) + 1e-9
        assert sorted([*train.tokens.tolist(), *held.tokens.tolist()]) == documents.tokens.tolist()
        assert len(lines) == 1 and f"held out {held.num_tokens} of {documents.num_tokens} tokens" in lines[0]
        again = split_held_out(documents, fraction, seed)
        assert again[1].fingerprint() == held.fingerprint() and again[0].fingerprint() == train.fingerprint()


def test_a_document_too_long_to_hold_out_gives_its_end() -> None:
    lines: list[str] = []
    train, held = split_held_out(documents_of([100] * 40 + [100_000]), 0.05, 1, lines.append)
    assert held.lengths().tolist() == [100, 100, 5000] and train.lengths().max() == 95_000
    assert (
        "2 whole documents" in lines[0]
        and "the last 5000 tokens of document 40, from made, with 100000 tokens" in lines[0]
    )


def test_evaluation_pieces() -> None:
    documents = documents_of([100, 1, 33, 32])
    pieces = evaluation_pieces(documents, 32)
    assert [(d, len(p)) for d, p in pieces] == [(0, 32), (0, 32), (0, 32), (0, 4), (2, 32), (3, 32)]
    assert sum(len(p) for _, p in evaluation_pieces(documents, 32, max_tokens=50)) == 50
