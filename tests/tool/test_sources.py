"""Reading sources: kinds of files, records, what is left out, what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lemo.cli.common import absolute
from lemo.data import DataError, Documents, load_documents, write_tokens


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
    assert lines == ["left out 1 empty document"] * 2


def test_a_damaged_data_set_is_named(tmp_path: Path, tokenizer) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").unlink()
    with pytest.raises(DataError, match="one: cannot be loaded"):
        load_documents([str(tmp_path / "one")], tokenizer, progress=False)


@pytest.mark.parametrize("place", [10, 4095, 4096, 50_000])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("bad", [b"\0", b"\xff"])
def test_a_byte_that_is_no_text_is_refused_with_its_place(tmp_path: Path, tokenizer, place: int, mark, bad) -> None:
    content = bytearray(mark + b"words " * 10_000)
    content[place : place + 1] = bad
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.txt: not a UTF-8 text file \(.* at byte {place}\)"):
        load_documents([str(path)], tokenizer, progress=False)
    (tmp_path / "b.txt").write_text("more words")
    lines: list[str] = []
    documents = load_documents([str(tmp_path)], tokenizer, progress=False, report=lines.append)
    assert len(documents) == 1 and "left out files that are not UTF-8 text: 1" in " ".join(lines)


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


def texts_of(documents: Documents, tokenizer) -> list[str]:
    return [tokenizer.decode(documents.document(i), skip_special_tokens=True) for i in range(len(documents))]


TEXTS = ["the block of tokens", "keeps its own place", "every other layer"]
ROWS = [{"text": t, "url": f"http://{i}"} for i, t in enumerate(TEXTS)]


def parquet(path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)


def arrow(path: Path, opener: str = "new_stream") -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.Table.from_pylist(ROWS)
    with getattr(pa.ipc, opener)(path, table.schema) as writer:
        writer.write_table(table)


def zst(path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    path.write_bytes(zstandard.ZstdCompressor().compress(lines().encode()))


def lines() -> str:
    return "".join(json.dumps(row) + "\n" for row in ROWS)


FILES: dict[str, Callable[[Path], object]] = {
    "lines.jsonl": lambda p: p.write_text(lines()),
    "lines.json": lambda p: p.write_text("\n" + lines()),
    "list.json": lambda p: p.write_text(json.dumps(ROWS, indent=2)),
    "UPPER.JSONL": lambda p: p.write_text(lines()),
    "upper.JSON": lambda p: p.write_text(json.dumps(ROWS)),
    "lines.ndjson": lambda p: p.write_text("\ufeff" + lines(), encoding="utf-8"),
    "table.csv": lambda p: p.write_text("url,text\n" + "".join(f'{r["url"]},"{r["text"]}"\n' for r in ROWS)),
    "table.TSV": lambda p: p.write_text("text\turl\r\n" + "".join(f"{r['text']}\t{r['url']}\r\n" for r in ROWS)),
    "part.parquet": parquet,
    "stream.arrow": arrow,
    "file.feather": lambda p: arrow(p, "new_file"),
    "lines.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines().encode())),
    "lines.json.bz2": lambda p: p.write_bytes(bz2.compress(lines().encode())),
    "lines.jsonl.XZ": lambda p: p.write_bytes(lzma.compress(lines().encode())),
    "lines.jsonl.zst": zst,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", ["file", "folder", "glob"])
def test_every_kind_of_records_gives_the_same_documents(name: str, place: str, tmp_path: Path, tokenizer) -> None:
    FILES[name](tmp_path / name)
    source = {"file": tmp_path / name, "folder": tmp_path, "glob": tmp_path / "*"}[place]
    said: list[str] = []
    documents = load_documents([str(source)], tokenizer, progress=False, report=said.append)
    assert texts_of(documents, tokenizer) == TEXTS and not said


@pytest.mark.parametrize("name", ["a.TXT", "a.txt.gz", "a.md.xz", "a", "a.gz"])
def test_text_files_of_other_names(name: str, tmp_path: Path, tokenizer) -> None:
    packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".xz": lzma.compress}
    pack = packers.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(b"the block of tokens"))
    assert texts_of(load_documents([str(tmp_path / name)], tokenizer, progress=False), tokenizer) == TEXTS[:1]


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "cut compression": ("a.jsonl.gz", gzip.compress(lines().encode() * 50)[:60], "a.jsonl.gz.*damaged or cut short"),
    "not compressed": ("a.txt.gz", b"the block of tokens", "a.txt.gz: cannot be decompressed"),
    "not xz": ("a.jsonl.xz", b"the block of tokens", "a.jsonl.xz: cannot be decompressed"),
    "one object": ("a.json", b'{"version": 1,\n"model": {}}', "one object with the keys model, version"),
    "half a list": ("a.json", b'[{"text": "a"},\n{"te', "a.json, line 2: not JSON"),
    "list of numbers": ("a.json", b"[1, 2]", "does not hold records"),
    "field in a list": ("a.json", b'[{"text": "a"}, {"body": "b"}]', "record 2: no field 'text'.*body.*--text-field"),
    "latin-1": ("a.jsonl", '{"text": "caf\u00e9"}'.encode("latin-1"), "a.jsonl: not UTF-8"),
    "csv without the column": ("a.csv", b"title;body\na;b\n", "a.csv, line 2: no field 'text'.*title;body"),
    "csv of uneven rows": ("a.csv", b'text,url\na,"x\ny"\na,b,c\n', "a.csv, line 4: 3 fields.*2 columns"),
    "csv with an open quote": ("a.csv", b'text\n"a\n', "a.csv, line 2"),
    "damaged parquet": ("a.parquet", b"PAR1 no", "a.parquet: cannot be read as parquet"),
    "damaged arrow": ("a.arrow", b"ARROW", "a.arrow: cannot be read as arrow"),
    "nested too deeply": ("a.json", b"[" * 100000, "a.json, line 1: not JSON .nested too deeply"),
    "a line nested too deeply": ("a.jsonl", b'{"text": ""}\n{"text":' + b"[" * 100000, "a.jsonl, line 2: not JSON"),
    "a number of 5000 digits": ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: not JSON"),
    "half a surrogate pair": ("a.jsonl", b'{"text": "a\\ud83d"}', "line 1, field 'text': character 2 .*d83d"),
    "csv with a column twice": ("a.csv", b"text,text\na,b\n", "a.csv: 2 columns are called 'text'"),
    "archive": ("a.tar.gz", gzip.compress(b"x"), "a.tar.gz: an archive; unpack it"),
    "zip": ("a.zip", b"PK\3\4", "a.zip: an archive"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_name_the_file_and_the_place(name: str, tmp_path: Path, tokenizer) -> None:
    file, content, message = BROKEN[name]
    if "parquet" in file or "arrow" in file:
        pytest.importorskip("pyarrow")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_documents([str(tmp_path / file)], tokenizer, progress=False)


def test_a_parquet_column_twice_is_refused(tmp_path: Path, tokenizer) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="2 columns are called 'text'"):
        load_documents([str(tmp_path / "a.parquet")], tokenizer, progress=False)


@pytest.mark.parametrize("source", ["", "dev=", "hf:", "dev=hf:", " "])
def test_an_empty_name_is_not_the_current_folder(source: str, tmp_path: Path, tokenizer, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("the block")
    monkeypatch.chdir(tmp_path)
    assert absolute(source) == source
    with pytest.raises(DataError, match="names no file, folder or data set"):
        load_documents([source], tokenizer, progress=False)


def test_what_is_neither_a_file_nor_a_folder(tmp_path: Path, tokenizer) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("link")
    for name, message in (("pipe", "a pipe or a device"), ("link", "a symbolic link to link")):
        with pytest.raises(DataError, match=f"{name}: neither a file nor a folder .{message}"):
            load_documents([str(tmp_path / name)], tokenizer, progress=False)


def test_files_without_a_document_are_no_domains(tmp_path: Path, tokenizer) -> None:
    for name, text in {"a.txt": "", "b.txt": "the block", "c.json": '{"x": 1}', "d.txt": "of tokens"}.items():
        (tmp_path / name).write_text(text)
    documents = load_documents([str(tmp_path)], tokenizer, per_file=True, progress=False)
    assert documents.names == ("b", "d")
    assert {n: len(d) for n, d in documents.by_name().items()} == {"b": 1, "d": 1}


def test_null_texts_are_empty_documents(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "the block"}\n')
    said: list[str] = []
    assert len(load_documents([str(tmp_path / "a.jsonl")], tokenizer, progress=False, report=said.append)) == 1
    assert said == ["left out 1 empty document"]


def test_hidden_files_and_folders_are_left_out_and_reported(tmp_path: Path, tokenizer) -> None:
    corpus = tmp_path / ".cache" / "corpus"  # a hidden folder above the source is the user's business
    for name in (".git/hooks/x.sample", ".ipynb_checkpoints/n.txt", "a/.b/c.txt", ".hidden", "a/n.txt"):
        (corpus / name).parent.mkdir(parents=True, exist_ok=True)
        (corpus / name).write_text("the block of tokens")
    (corpus / "a" / "loop").symlink_to(corpus, target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "m.txt").write_text("keeps its own place")
    (corpus / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    said: list[str] = []
    documents = load_documents([str(corpus)], tokenizer, progress=False, report=said.append)
    assert texts_of(documents, tokenizer) == TEXTS[:2]
    assert len(said) == 1 and "left out hidden files and folders: 4 (" in said[0] and str(corpus) in said[0]
    by_glob = load_documents([str(corpus / "**")], tokenizer, progress=False)
    assert set(texts_of(by_glob, tokenizer)) == set(TEXTS[:2])


def test_json_that_is_no_data_is_left_out_of_folders(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "package.json").write_text('{"name": "x",\n"version": "1"}')
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "one-line.json").write_text('{"name": "x"}')
    (tmp_path / "list.json").write_text('[{"name": "x"}]')
    (tmp_path / "n.txt").write_text(TEXTS[0])
    said: list[str] = []
    documents = load_documents([str(tmp_path)], tokenizer, progress=False, report=said.append)
    assert texts_of(documents, tokenizer) == TEXTS[:1]
    assert len(said) == 1 and "left out JSON files without records of text, tokens or messages: 4 (" in said[0]


def test_a_folder_of_records_and_texts_is_said(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text(lines())
    (tmp_path / "README.md").write_text(TEXTS[0])
    said: list[str] = []
    assert len(load_documents([str(tmp_path)], tokenizer, progress=False, report=said.append)) == 4
    assert len(said) == 1 and "next to 3 records, files read whole as text: 1 (" in said[0] and "README.md" in said[0]


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [48, 65536, 65537, 128256])
def test_token_files_of_every_width(vocab_size: int, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, vocab_size, 5000)
    ids[7] = vocab_size - 1
    path = tmp_path / "t.bin"

    def load(**options) -> list[int]:
        loaded = load_documents([str(path)], None, vocab_size=vocab_size, progress=False, **options)
        assert loaded.tokens.dtype == (np.uint16 if vocab_size <= 65536 else np.int32)
        return loaded.tokens.tolist()

    write_tokens(path, ids)
    assert load() == ids.tolist()
    write_tokens(path, ids, "uint32")
    assert load() == ids.tolist()
    np.save(tmp_path / "t", ids)
    path = tmp_path / "t.npy"
    assert load() == ids.tolist()
    path = tmp_path / "t.bin"
    ids.astype("<u4").tofile(path)
    assert load(token_dtype="uint32") == ids.tolist()
    with pytest.raises(DataError, match=r"t.bin: (has no header|every second).*--token-dtype"):
        load()
    ids.astype("<u2").tofile(path)
    if vocab_size > 65536:
        with pytest.raises(DataError, match=r"cannot hold a vocabulary of.*--token-dtype uint32"):
            load()
    else:
        assert load() == ids.tolist()
        with pytest.raises(DataError, match=r"uint16|outside the model's vocabulary"):
            load(token_dtype="uint32")


def test_headers_are_read_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "t.bin"

    def load() -> list[int]:
        return load_documents([str(path)], None, vocab_size=70000, progress=False).tokens.tolist()

    for magic, version, width in ((20240520, 1, "<u2"), (20240801, 7, "<u4")):
        header = np.zeros(256, "<i4")
        header[:3] = magic, version, 3
        path.write_bytes(header.tobytes() + np.array([1, 2, 65535], width).tobytes())
        assert load() == [1, 2, 65535]
    write_tokens(path, [1, 2, 69999])
    whole = path.read_bytes()
    for damage in (whole[:-1], whole + b"\0", whole[:20]):
        path.write_bytes(damage)
        with pytest.raises(DataError, match="truncated"):
            load()
    path.write_bytes(whole[:7] + b"\x02" + whole[8:])
    with pytest.raises(DataError, match="version 2"):
        load()
    write_tokens(path, [1, 70000])
    with pytest.raises(DataError, match="token 70000 at position 1"):
        load()
    for wrong in ([-1], [2**32], [0.5], [[1]]):
        with pytest.raises(ValueError, match="tokens"):
            write_tokens(path, wrong)
    np.save(tmp_path / "f.npy", np.zeros(3))
    with pytest.raises(DataError, match="float64"):
        load_documents([str(tmp_path / "f.npy")], None, progress=False)


def test_padding_makes_no_documents(tmp_path: Path, tokenizer) -> None:
    rng = np.random.default_rng(1)
    rows = np.zeros((20, 128), np.uint16)  # 0 is the end-of-text token
    for row in rows:
        n = int(rng.integers(5, 100))
        row[:n] = rng.integers(2, 20, n)
    rows.tofile(tmp_path / "t.bin")
    np.save(tmp_path / "rows.npy", rows)
    for name in ("t.bin", "rows.npy"):
        said: list[str] = []
        documents = load_documents([str(tmp_path / name)], tokenizer, progress=False, report=said.append)
        assert len(documents) == 20
        assert [documents.document(i).tolist() for i in range(20)] == [[*r[r > 0].tolist(), 0] for r in rows]
        dropped = rows.size - documents.num_tokens
        assert len(said) == 1 and f"documents of nothing else: {dropped} (" in said[0]


def test_a_token_that_begins_documents_and_ends_them(tmp_path: Path, model_folder: Path) -> None:
    """OPT's </s>: of a run, the first ends a document and the last begins the next one."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"bos_token": "<eos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    np.array([0, 5, 6, 0, 0, 7, 0, 0, 0, 0, 8, 9, 0, 0, 0], np.uint16).tofile(tmp_path / "t.bin")
    documents = load_documents([str(tmp_path / "t.bin")], tokenizer, progress=False)
    assert [documents.document(i).tolist() for i in range(len(documents))] == [[0, 5, 6, 0], [0, 7, 0], [0, 8, 9, 0]]


def test_padding_tokens_of_their_own_separate_rows(tmp_path: Path, model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    pad = tokenizer.pad_token_id
    np.array([5, 6, 0, pad, pad, 7, pad, 8, pad, pad, pad, 9], np.uint16).tofile(tmp_path / "t.bin")
    documents = load_documents([str(tmp_path / "t.bin")], tokenizer, progress=False)
    assert [documents.document(i).tolist() for i in range(len(documents))] == [[5, 6, 0], [7, pad, 8], [9]]


# ---- records of tokens -----------------------------------------------------------------------------------------------


def test_tokenised_records_are_used_as_they_are(tmp_path: Path, tokenizer) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 0], "text": "left out"},
        {"input_ids": [8, 9, 0, 0, 0], "attention_mask": [1, 1, 1, 0, 0]},
        {"input_ids": [5, 6, 0, 0, 0]},
        {"input_ids": [5, 6, 7, 0], "labels": [-100, -100, 7, 0]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said: list[str] = []
    documents = load_documents([str(tmp_path / "a.jsonl")], tokenizer, progress=False, report=said.append)
    assert [documents.document(i).tolist() for i in range(4)] == [[5, 6, 7, 0], [8, 9, 0], [5, 6, 0], [5, 6, 7, 0]]
    assert documents.trained is not None
    assert documents.trained.tolist() == [True] * 10 + [False, False, True, True]
    assert any("'input_ids' is used, not text" in line for line in said)
    assert any("documents of nothing else: 4 (" in line for line in said)
    as_text = load_documents([str(tmp_path / "a.jsonl")], tokenizer, text_field="input_ids", progress=False)
    assert as_text.fingerprint() == documents.fingerprint()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": [5, 60]}, "line 1, field 'input_ids': token 60 at position 1.*vocabulary of 48"),
        ({"input_ids": [-1]}, "token -1"),
        ({"input_ids": "[1, 2]"}, "'input_ids' is str"),
        ({"input_ids": [1.5]}, "a list of float"),
        ({"input_ids": [[1]]}, "dimensions"),
        ({"input_ids": [[1, 2], [3]]}, "a list of list"),
        ({"input_ids": [5, 6], "labels": [6, 7]}, "label 6 at position 0.*unshifted"),
        ({"input_ids": [5, 6], "labels": [5]}, "'labels' must hold one integer"),
    ],
)
def test_wrong_token_records(record: dict, message: str, tmp_path: Path, tokenizer) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        load_documents([str(tmp_path / "a.jsonl")], tokenizer, vocab_size=48, progress=False)


def test_tokenised_parquet_with_labels(tmp_path: Path, tokenizer) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "other": "x"}] * 3
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    documents = load_documents([str(tmp_path / "a.parquet")], None, progress=False)
    assert (
        len(documents) == 3 and documents.trained is not None and documents.trained.tolist() == [False, True, True] * 3
    )
