"""Reading sources, splitting, packing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lemo.data import (
    IGNORE_INDEX,
    DataError,
    Documents,
    PackedWindows,
    evaluation_pieces,
    load_documents,
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
    if documents.num_tokens < context:
        with pytest.raises(DataError, match="fewer than one context"):
            PackedWindows(documents, context, seed=3)
        return
    windows = PackedWindows(documents, context, seed=3)
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
    # Nothing twice, and all but the tail that fills no window is there.
    assert len(set(seen)) == len(seen) == documents.num_tokens // context * context


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


def test_evaluation_pieces() -> None:
    documents = documents_of([100, 1, 33, 32])
    pieces = evaluation_pieces(documents, 32)
    assert [(d, len(p)) for d, p in pieces] == [(0, 32), (0, 32), (0, 32), (0, 4), (2, 32), (3, 32)]
    assert sum(len(p) for _, p in evaluation_pieces(documents, 32, max_tokens=50)) == 50


def test_text_jsonl_folder_glob_and_names(text_folder: Path, jsonl_file: Path, tokenizer) -> None:
    def load(*sources: str, **options) -> Documents:
        return load_documents(sources, tokenizer, progress=False, **options)

    folder = load(str(text_folder))
    assert len(folder) == 24 and folder.names == (text_folder.name,)
    assert all(folder.document(i)[-1] == tokenizer.eos_token_id for i in range(24))
    by_glob = load(str(text_folder / "*.txt"))
    assert by_glob.fingerprint() == folder.fingerprint()
    named = load(f"a={jsonl_file}", f"b={text_folder / 'd00.txt'}")
    assert named.names == ("a", "b") and [len(d) for d in named.by_name().values()] == [12, 1]
    assert named.by_name()["b"].tokens.tolist() == folder.document(0).tolist()
    assert load(str(text_folder), per_file=True).names[:2] == ("d00", "d01")
    joined = load(str(text_folder), joined=True)
    assert len(joined) == 1 and joined.num_tokens == folder.num_tokens
    assert load(str(text_folder), max_tokens=100).num_tokens == 100


def test_token_files_split_at_the_end_of_text(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "tokens.bin"
    np.array([5, 6, 0, 7, 0, 8, 9], dtype=np.uint16).tofile(path)
    documents = load_documents([str(path)], tokenizer, progress=False)
    assert [documents.document(i).tolist() for i in range(3)] == [[5, 6, 0], [7, 0], [8, 9]]
    assert len(load_documents([str(path)], None, progress=False)) == 1


def test_saved_datasets(tmp_path: Path, tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": ["the block", "of tokens", ""]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    lines: list[str] = []
    for name in ("one", "splits"):
        documents = load_documents([str(tmp_path / name)], tokenizer, progress=False, report=lines.append)
        assert len(documents) == 2 and documents.names == (name,)
    assert lines == ["left out 1 empty documents"] * 2


def test_binary_files_in_a_folder_are_left_out_and_reported(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.txt").write_text("the block of tokens")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0\0")
    lines: list[str] = []
    assert len(load_documents([str(tmp_path)], tokenizer, progress=False, report=lines.append)) == 1
    assert len(lines) == 1 and "b.png" in lines[0]


def test_records_keep_their_order_through_batched_tokenisation(tmp_path: Path, tokenizer) -> None:
    path = tmp_path / "r.jsonl"
    texts = ["the block", "", "of tokens", "keeps its own place"]
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    documents = load_documents([str(path)], tokenizer, progress=False)
    back = [tokenizer.decode(documents.document(i)[:-1]) for i in range(len(documents))]
    assert back == [t for t in texts if t]
