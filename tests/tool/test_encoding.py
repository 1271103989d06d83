"""Text and conversations to tokens: special tokens spelled out in text, chat templates, answers, long texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lemo.data import DataError, Documents, encode, load_documents
from lemo.data.long_text import encode_long
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

BOS, EOS, TURN, START = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start|>"
SPECIALS = [BOS, EOS, TURN, START]


def byte_level(bos: bool = True, bos_token: str = BOS, eos_token: str = EOS) -> Any:
    """A byte-level BPE; bos: it puts `bos_token` before every text."""
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    t.train_from_iterator(["the quick brown fox jumps over the lazy dog "] * 20, trainer)
    if bos:
        token = (bos_token, t.token_to_id(bos_token))
        t.post_processor = processors.TemplateProcessing(single=f"{bos_token} $A", special_tokens=[token])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token=bos_token, eos_token=eos_token)


def read(folder: Path, tokenizer: Any, *records: dict | str, **options: Any) -> tuple[Documents, list[str]]:
    rows = [{"text": r} if isinstance(r, str) else r for r in records]
    (folder / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    said: list[str] = []
    documents = load_documents([str(folder / "r.jsonl")], tokenizer, progress=False, report=said.append, **options)
    return documents, said


# ---- special tokens in text ------------------------------------------------------------------------------------------


def test_special_tokens_in_ordinary_text_stay_text(tmp_path: Path) -> None:
    t = byte_level()
    manual = f"write {EOS} to end, and {TURN} after a turn"
    documents, said = read(tmp_path, t, manual, "the lazy dog")
    ids = documents.document(0).tolist()
    assert ids[0] == t.bos_token_id and ids[-1] == t.eos_token_id
    assert not set(ids[1:-1]) & set(t.convert_tokens_to_ids(SPECIALS))
    assert t.decode(ids[1:-1]) == manual
    assert documents.document(1).tolist() == [*t("the lazy dog")["input_ids"], t.eos_token_id]
    assert len(said) == 1 and f"{EOS} in 1" in said[0] and "ordinary text" in said[0]
    documents, said = read(tmp_path, t, manual, special_tokens="parse")
    assert documents.document(0).tolist() == [*t(manual)["input_ids"], t.eos_token_id] and not said


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("text", [f"{BOS}user hi{TURN}", f"{START}user hi{TURN}", f"\n{BOS}{BOS}user{EOS}"])
def test_rendered_conversations_keep_their_tokens_and_one_bos(text: str, bos: bool, tmp_path: Path) -> None:
    t = byte_level(bos)
    documents, said = read(tmp_path, t, text)
    ids = documents.document(0).tolist()
    assert ids.count(t.bos_token_id) == 1 if bos else ids.count(t.bos_token_id) == text.count(BOS)
    assert ids.count(t.eos_token_id) == 1 and ids[-1] == t.eos_token_id
    assert ids.count(t.convert_tokens_to_ids(TURN)) == text.count(TURN)
    assert t.decode(ids).removesuffix(EOS).endswith(text.strip().removesuffix(EOS).rpartition(BOS)[2])
    assert any("as chat templates write it: 1" in line for line in said)
    assert any("adds as well: 1" in line for line in said) == (bos and BOS in text)


def test_plain_means_plain(tmp_path: Path) -> None:
    t = byte_level()
    documents, _ = read(tmp_path, t, f"{BOS}user hi{EOS}", special_tokens="plain")
    ids = documents.document(0).tolist()
    assert t.decode(ids[1:-1]) == f"{BOS}user hi{EOS}" and ids.count(t.bos_token_id) == ids.count(t.eos_token_id) == 1


def test_an_end_of_text_written_at_the_end_is_the_token(tmp_path: Path) -> None:
    t = byte_level()
    documents, said = read(tmp_path, t, f"the lazy dog{EOS}", f"the {EOS} dog{EOS}", EOS)
    assert documents.document(0).tolist() == [*t("the lazy dog")["input_ids"], t.eos_token_id]
    assert documents.document(1).tolist()[1:].count(t.eos_token_id) == 1
    assert len(documents) == 2 and "left out 1 empty document" in said
    assert any(f"end with the text {EOS}: 3" in line for line in said)


def test_one_token_that_begins_and_ends(tmp_path: Path) -> None:
    """GPT-2's: begins no text by itself. OPT's: begins every text."""
    for bos in (False, True):
        t = byte_level(bos, bos_token=EOS)
        documents, _ = read(tmp_path, t, f"{EOS} ends a text", "the dog")
        first = documents.document(0).tolist()
        assert first.count(t.eos_token_id) == 1 + bos
        assert documents.document(1).tolist() == [*t("the dog")["input_ids"], t.eos_token_id]


def test_a_tokenizer_without_offsets_or_arguments(tmp_path: Path) -> None:
    t = ByT5Tokenizer()
    documents, said = read(tmp_path, t, "write </s> here", "plain")
    ids = documents.document(0).tolist()
    assert ids.count(t.eos_token_id) == 1 and t.decode(ids[:-1]) == "write </s> here"
    assert "</s> in 1" in said[0]


# ---- conversations ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = TEMPLATE.replace(
    "{{ m.content }}<|eot_id|>",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|eot_id|>{% endif %}",
)
MESSAGES = [
    {"role": "system", "content": "the fox"},
    {"role": "user", "content": "quick?"},
    {"role": "assistant", "content": "very brown"},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "lazy"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], "system"), "value": m["content"]} for m in MESSAGES
]
ANSWERS = [f"very brown{TURN}", f"lazy{TURN}"]


def chat_tokenizer(template: str | None = TEMPLATE) -> Any:
    t = byte_level()
    t.chat_template = template
    return t


def trained_text(documents: Documents, tokenizer: Any, i: int = 0) -> list[str]:
    """The runs of labels, decoded."""
    ids, mask = documents.document(i), documents.labelled(i)
    assert mask is not None
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
@pytest.mark.parametrize(
    "record",
    [
        {"messages": MESSAGES},
        {"messages": [m | {"name": None, "tool_calls": None} for m in MESSAGES]},
        {"conversations": SHAREGPT},
        {"prompt": MESSAGES[:-1], "completion": MESSAGES[-1:]},
    ],
    ids=["messages", "table", "sharegpt", "completion"],
)
def test_conversations_go_through_the_chat_template(record: dict, template: str, tmp_path: Path) -> None:
    t = chat_tokenizer(template)
    expected = t.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]
    documents, said = read(tmp_path, t, record)
    assert documents.document(0).tolist() == expected and expected[:2].count(t.bos_token_id) == 1
    assert documents.trained is None and not said
    documents, _ = read(tmp_path, t, record, answers_only=True)
    assert documents.document(0).tolist() == expected
    assert trained_text(documents, t) == (ANSWERS[1:] if "prompt" in record else ANSWERS)


def test_text_before_messages_but_for_answers(tmp_path: Path) -> None:
    t = chat_tokenizer()
    record = {"text": "the dog", "messages": MESSAGES}
    documents, said = read(tmp_path, t, record)
    assert t.decode(documents.document(0), skip_special_tokens=True) == "the dog"
    assert len(said) == 1 and "'text' is used, not messages" in said[0] and "--text-field" in said[0]
    assert trained_text(read(tmp_path, t, record, answers_only=True)[0], t) == ANSWERS
    by_name, _ = read(tmp_path, t, record, text_field="messages")
    assert by_name.document(0).tolist() == t.apply_chat_template(MESSAGES, return_dict=True)["input_ids"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("the quick ", "brown fox"), (f"{BOS}the ", "dog"), (f" {START}the ", "dog"), ("the ", f"dog{EOS}"), ("", "dog")],
)
def test_prompts_and_completions(prompt: str, completion: str, bos: bool, tmp_path: Path) -> None:
    t = byte_level(bos)
    record = {"prompt": prompt, "completion": completion}
    whole, _ = read(tmp_path, t, record)
    assert whole.trained is None
    documents, _ = read(tmp_path, t, record, answers_only=True)
    assert documents.tokens.tolist() == whole.tokens.tolist()
    assert "".join(trained_text(documents, t)).lstrip() == completion.removesuffix(EOS) + EOS


def test_special_tokens_inside_messages_are_said(tmp_path: Path) -> None:
    _, said = read(tmp_path, chat_tokenizer(), {"messages": [{"role": "user", "content": f"what is {TURN}?"}]})
    assert len(said) == 1 and "inside a message: 1" in said[0]


FORGETFUL = (  # renders an earlier answer otherwise once another turn follows, as templates that drop reasoning do
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.mark.parametrize(
    ("template", "record", "options", "message"),
    [
        (None, {"messages": MESSAGES}, {}, "line 1: .*chat template.*--tokenizer"),
        ("{{ raise_exception('roles') }}", {"messages": MESSAGES}, {}, "line 1: the chat template refuses.*roles"),
        (TEMPLATE, {"messages": [{"content": "x"}]}, {}, "line 1, field 'messages', message 1: expected.*'role'"),
        (TEMPLATE, {"messages": ["x"]}, {}, "'messages' is a list of str"),
        (TEMPLATE, {"prompt": "x", "completion": [{"role": "user", "content": ""}]}, {}, "'prompt' is str"),
        (TEMPLATE, {"text": "the dog"}, {"answers_only": True}, "line 1: --answers-only needs conversations"),
        (TEMPLATE, {"input_ids": [1, 2]}, {"answers_only": True}, "line 1: --answers-only needs to know the answers"),
        (FORGETFUL, {"messages": MESSAGES}, {"answers_only": True}, "message 3: --answers-only cannot tell"),
        (TEMPLATE, {"messages": MESSAGES, "tools": "{"}, {}, "line 1: field 'tools' is not JSON"),
        (TEMPLATE, {"messages": "hello"}, {}, "'messages' is a string and not the JSON.*--text-field messages"),
        (TEMPLATE, {"messages": [{"role": "user", "content": "\ud83d"}]}, {}, "message 1: character 1 is half"),
        (TEMPLATE, {"prompt": "the", "completion": "\udc00"}, {}, "'completion': character 1 is half"),
        (TEMPLATE, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "a part of type image"),
        (TEMPLATE, {"text": "x"}, {"special_tokens": "some"}, "'some'"),
    ],
)
def test_conversations_that_cannot_be_used(
    template: str | None, record: dict, options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, chat_tokenizer(template), record, **options)


def test_messages_as_json_text_and_content_in_parts(tmp_path: Path) -> None:
    """As tables without lists hold conversations, and as multimodal data sets hold text."""
    tokenizer = chat_tokenizer(TEMPLATE)
    expected = read(tmp_path, tokenizer, {"messages": MESSAGES})[0].fingerprint()
    assert read(tmp_path, tokenizer, {"messages": json.dumps(MESSAGES)})[0].fingerprint() == expected
    parts = [
        {**m, "content": [{"type": "text", "text": t} for t in (m["content"][:2], m["content"][2:])]} for m in MESSAGES
    ]
    assert read(tmp_path, tokenizer, {"messages": parts})[0].fingerprint() == expected
    as_text = read(tmp_path, tokenizer, {"messages": json.dumps(MESSAGES)}, text_field="messages")[0]
    assert as_text.fingerprint() != expected
    with pytest.raises(DataError, match="every document is empty"):
        read(tmp_path, tokenizer, {"messages": ""})


def test_answers_need_places_in_the_text(tmp_path: Path) -> None:
    t = ByT5Tokenizer()
    for template in (TEMPLATE, MARKED):
        t.chat_template = template
        with pytest.raises(DataError, match="line 1: --answers-only needs a tokenizer that knows"):
            read(tmp_path, t, {"messages": MESSAGES}, answers_only=True)
    with pytest.raises(DataError, match="line 1: --answers-only needs a tokenizer that knows"):
        read(tmp_path, t, {"prompt": "a", "completion": "b"}, answers_only=True)


def test_answers_are_not_in_token_files(tmp_path: Path) -> None:
    np.zeros(4, np.uint16).tofile(tmp_path / "t.bin")
    with pytest.raises(DataError, match=r"t.bin: --answers-only"):
        load_documents([str(tmp_path / "t.bin")], None, answers_only=True, progress=False)


def test_masks_of_answers_in_tokenized_records(tmp_path: Path) -> None:
    t = byte_level()
    rows = [{"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1]}, {"input_ids": [5, 6], "completion_mask": [0, 0]}]
    assert read(tmp_path, t, *rows)[0].trained is None
    documents, said = read(tmp_path, t, *rows, answers_only=True)
    assert documents.trained is not None and documents.trained.tolist() == [False, True, True, False, False]
    assert any("1 of 2 documents have no labels" in line for line in said)


# ---- long texts ------------------------------------------------------------------------------------------------------

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def real_text() -> str:
    """This project's own prose and code, with what is hard to cut in between."""
    root = Path(__file__).parents[2]
    files = [*sorted((root / "docs").glob("*.md")), *sorted((root / "python" / "lemo" / "data").glob("*.py"))]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    hard = "  \n\n\n   日本語のテキスト🎉🎉 e\u0301 \r\n\r\n\t\t" + "-" * 700 + " " * 900 + "\n" * 90
    return text[:60_000] + hard + text[60_000:100_000][::-1] + hard


def long_tokenizer(kind: str, text: str) -> Any:
    if kind == "pieces of words":
        t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=900, special_tokens=["[UNK]"], show_progress=False)
    elif kind == "words with spaces":
        t = Tokenizer(models.Unigram())
        t.normalizer, t.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=600, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    elif kind == "no words":  # Llama 2's: merges know no borders, and a text gets a space in front
        t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        names = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=names, show_progress=False, max_token_length=12)
    else:
        t = Tokenizer(models.BPE())
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        t.pre_tokenizer = bytes_ if kind == "gpt2" else pre_tokenizers.Sequence([split, bytes_])
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    t.train_from_iterator(text[:40_000].split("\n"), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t)


class Counted:
    """A tokenizer that remembers the longest text it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.longest, self.is_fast = tokenizer, 0, tokenizer.is_fast

    def __call__(self, text: Any, **options: Any) -> Any:
        self.longest = max(self.longest, *map(len, [text] if isinstance(text, str) else text))
        return self.tokenizer(text, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "no words", "words with spaces", "pieces of words"])
def test_pieces_of_a_long_text_give_the_tokens_of_the_whole(kind: str) -> None:
    text = real_text()
    tokenizer = Counted(long_tokenizer(kind, text))
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    for size in (9_000, 12_345, 30_001):
        tokenizer.longest = 0
        assert encode_long(tokenizer, text, split_special_tokens=False, size=size).tolist() == whole
        assert tokenizer.longest <= size


@pytest.mark.parametrize("text", ["a" * 5000, "ab" * 3000, " " * 5000, "the dog " * 900])
def test_texts_in_which_every_place_looks_the_same(text: str) -> None:
    t = byte_level()
    whole = t(text, add_special_tokens=False)["input_ids"]
    for size in (64, 501, 1000, 4999):
        assert encode_long(t, text, split_special_tokens=False, size=size).tolist() == whole


def test_a_long_document_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "LONG_TEXT", 3000)
    monkeypatch.setattr("lemo.data.long_text.CHARACTERS_PER_PIECE", 1000)
    body = "the quick brown fox jumps over the lazy dog. " * 300
    for t in (byte_level(), ByT5Tokenizer()):
        for text in (body, body + EOS + " is written " + body, BOS + body + TURN + body):
            monkeypatch.setattr(encode, "LONG_TEXT", 10**9)
            expected, said = read(tmp_path, t, "short", text, "short")
            monkeypatch.setattr(encode, "LONG_TEXT", 3000)
            counted = Counted(t)
            documents, said_again = read(tmp_path, counted, "short", text, "short")
            assert documents.fingerprint() == expected.fingerprint() and said_again == said
            assert counted.longest <= 1000 or not t.is_fast
