"""Documents with questions whose answers need evidence from far away, at any length, for any tokenizer.

Filler text fills a document to exactly its length; evidence is put into it, and the questions with their answers stand
at its end. Only answers have labels.
  passkey    one number, hidden once
  multikey   a number hidden under one of several names; the question names one
  variables  a chain of assignments (A = 51324, B = A, C = B) among others; the question asks for the last one's value
  copy       a random segment that appears once; the question is its beginning, the answer the rest
Every document asks every task at every distance: the first evidence lies that share of the document's body before the
questions, and what a chain needs besides lies in between. The same seed gives the same documents.
"""

from __future__ import annotations

import re
import string
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TASKS = ("passkey", "multikey", "variables", "copy")
DISTANCES = (0.1, 0.35, 0.65, 0.95)
IGNORED = -100

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Question:
    """One answer of a document: ids[start:stop]. distance: tokens from its (first) evidence to the answer."""

    task: str
    share: float
    distance: int
    start: int
    stop: int

    @property
    def group(self) -> str:
        return f"{self.task} {self.share:g}"


@dataclass(frozen=True, eq=False)
class Document:
    """ids, labels: int64 [length], labels as transformers expects them (not shifted), IGNORED outside answers."""

    ids: np.ndarray
    labels: np.ndarray
    questions: list[Question]


@dataclass(frozen=True)
class Source:
    """What documents are made of. encode: text to ids without special tokens; filler: ids of running text; begin: ids
    that every document begins with."""

    encode: Encode
    filler: np.ndarray
    begin: tuple[int, ...] = ()


# ---- vocabularies ----------------------------------------------------------------------------------------------------


def raw_source(vocabulary: int, seed: int = 0, filler_tokens: int = 1 << 16) -> Source:
    """For models without a tokenizer: random filler, and the topmost 64 ids for digits, capitals and words."""
    if vocabulary < 128:
        raise ValueError(f"raw token ids need a vocabulary of at least 128; got {vocabulary}")
    first = vocabulary - 64
    alphabet = {c: first + i for i, c in enumerate(string.digits + string.ascii_uppercase)}

    def encode(text: str) -> list[int]:
        words = re.findall(r"[0-9A-Z]|[a-z]+|[^\sa-z0-9A-Z]", text)
        return [alphabet.get(w, first + 36 + zlib.crc32(w.encode()) % 28) for w in words]

    return Source(encode, np.random.default_rng(seed).integers(0, first, filler_tokens))


def tokenizer_source(tokenizer: Any, filler: np.ndarray) -> Source:
    """Raises ValueError for a tokenizer that cannot spell numbers or names."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    words = ("51324", "51325", "15324", "ABCD", "ABDC")
    if len({tuple(encode(f"is {word}.")) for word in words}) < len(words):
        raise ValueError(
            "the tokenizer reads different numbers or names as the same tokens, so questions about them would have no "
            f"answer ({words[0]} and {words[1]} both become {encode(words[0])})"
        )
    whole, plain = list(tokenizer("a")["input_ids"]), encode("a")
    begin = whole[: len(whole) - len(plain)] if whole[len(whole) - len(plain) :] == plain else []
    return Source(encode, filler, tuple(begin))


_NOUNS = ("river", "garden", "teacher", "window", "market", "bridge", "letter", "harbor", "farmer", "kitchen", "engine")
_VERBS = ("follows", "remembers", "crosses", "paints", "visits", "describes", "repairs", "watches", "opens", "carries")
_MANNERS = ("slowly", "again", "at noon", "without a word", "in the rain", "every year", "near the old mill")


def plain_text(words: int, seed: int = 0) -> str:
    """Running text for filler where nobody gave any: short sentences without numbers or names."""
    rng = np.random.default_rng(seed)
    sentences: list[str] = []
    while 6 * len(sentences) < words:
        one, other, verb = rng.choice(_NOUNS), rng.choice(_NOUNS), rng.choice(_VERBS)
        sentences.append(f"The {one} {verb} the {other} {rng.choice(_MANNERS)}.")
    return " ".join(sentences)


# ---- one question ----------------------------------------------------------------------------------------------------


def _names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names of four capitals."""
    letters = np.array(list(string.ascii_uppercase))
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choice(letters, 4))] = None
    return list(found)


def _number(rng: np.random.Generator) -> str:
    return str(rng.integers(10_000, 100_000))


def _asked(source: Source, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of both, the answer's as they are after the question if the tokenizer lets it be cut there."""
    before, whole = source.encode(question), source.encode(question + answer)
    fits = len(whole) > len(before) and whole[: len(before)] == before
    return before, whole[len(before) :] if fits else source.encode(answer)


@dataclass(frozen=True)
class _Piece:
    """Ids to be put into the body at a share of its length before the questions."""

    share: float
    ids: list[int]


def _retrieval(source: Source, rng: np.random.Generator, name: str, share: float, others: list[str]) -> Any:
    value = _number(rng)
    pieces = [_Piece(share, source.encode(f"\nThe vault code of {name} is {value}.\n"))]
    for other in others:
        text = f"\nThe vault code of {other} is {_number(rng)}.\n"
        pieces.append(_Piece(rng.uniform(0.02, 0.98), source.encode(text)))
    return pieces, *_asked(source, f"\nThe vault code of {name} is", f" {value}")


def _variables(source: Source, rng: np.random.Generator, names: list[str], share: float) -> Any:
    """Two chains of the same form; the question is about the first one's end."""
    pieces = []
    half = len(names) // 2
    values = [_number(rng), _number(rng)]
    for chain, value, beginning in zip(
        (names[:half], names[half:]), values, (share, rng.uniform(0.3, 0.98)), strict=True
    ):
        places = sorted(rng.uniform(0.0, beginning, half - 1), reverse=True)
        for i, (name, place) in enumerate(zip(chain, [beginning, *places], strict=True)):
            text = f"\nlet {name} = {value if i == 0 else chain[i - 1]};\n"
            pieces.append(_Piece(float(place), source.encode(text)))
    return pieces, *_asked(source, f"\nprint {names[half - 1]} =", f" {values[0]}")


def _copy(source: Source, rng: np.random.Generator, share: float, name: str, tokens: int = 24, shown: int = 4) -> Any:
    """Tokens of the filler in random order: nothing but the earlier segment tells how they continue."""
    segment = [int(t) for t in rng.choice(source.filler, tokens)]
    head = source.encode(f"\nNote {name}:")
    return [_Piece(share, head + segment + source.encode("\n"))], head + segment[:shown], segment[shown:]


def _ask(source: Source, rng: np.random.Generator, task: str, share: float, names: list[str]) -> Any:
    """Pieces (the first is the one at `share`), question and answer, as ids. names: as many as `NAMES` says."""
    if task == "passkey":
        return _retrieval(source, rng, names[0], share, [])
    if task == "multikey":
        return _retrieval(source, rng, names[0], share, names[1:])
    if task == "variables":
        return _variables(source, rng, names, share)
    return _copy(source, rng, share, names[0])


NAMES = {"passkey": 1, "multikey": 4, "variables": 6, "copy": 1}


# ---- documents -------------------------------------------------------------------------------------------------------


def document(
    source: Source,
    length: int,
    seed: int,
    index: int,
    tasks: Sequence[str] = TASKS,
    distances: Sequence[float] = DISTANCES,
) -> Document:
    """Document `index` of a seed. Raises ValueError for unknown tasks, and if the questions leave no room for filler.

    distances: shares of the body between a question's evidence and the questions, each in (0, 1).
    """
    if unknown := [t for t in tasks if t not in TASKS]:
        raise ValueError(f"tasks must be among {', '.join(TASKS)}; got {', '.join(unknown)}")
    if not distances or not all(0.0 < d < 1.0 for d in distances):
        raise ValueError(f"distances must be shares between 0 and 1; got {list(distances)}")
    rng = np.random.default_rng([seed, index, length])
    wanted = [(task, share) for task in tasks for share in distances]
    names = _names(rng, sum(NAMES[task] for task, _ in wanted))
    asked = []
    for task, share in wanted:
        mine, names = names[: NAMES[task]], names[NAMES[task] :]
        asked.append((task, share, *_ask(source, rng, task, share, mine)))
    asked = [asked[i] for i in rng.permutation(len(asked))]
    inserted = sum(len(p.ids) for *_, pieces, _, _ in asked for p in pieces)
    tail = sum(len(question) + len(answer) for *_, question, answer in asked)
    room = length - inserted - tail - len(source.begin)
    if room < len(asked) or len(source.filler) < 2:
        raise ValueError(
            f"{len(wanted)} questions and their evidence take {inserted + tail} tokens: a document of {length} leaves "
            "no room for filler. Make it longer, or ask fewer tasks or distances"
        )
    ids, places = _body(source, rng, room, [p for *_, pieces, _, _ in asked for p in pieces])
    questions = []
    for task, share, pieces, question, answer in asked:
        ids += question
        questions.append(Question(task, share, len(ids) - places[id(pieces[0])], len(ids), len(ids) + len(answer)))
        ids += answer
    labels = np.full(length, IGNORED)
    for q in questions:
        labels[q.start : q.stop] = ids[q.start : q.stop]
    return Document(np.array(ids), labels, questions)


def _body(
    source: Source, rng: np.random.Generator, room: int, pieces: list[_Piece]
) -> tuple[list[int], dict[int, int]]:
    """Filler with the pieces in it, and where each of them (by identity) begins."""
    start = rng.integers(len(source.filler))
    filler = np.take(source.filler, np.arange(start, start + room), mode="wrap").tolist()
    ids = list(source.begin)
    places: dict[int, int] = {}
    done = 0
    for piece in sorted(pieces, key=lambda p: -p.share):
        upto = round((1.0 - piece.share) * room)
        ids += filler[done:upto]
        done = upto
        places[id(piece)] = len(ids)
        ids += piece.ids
    return ids + filler[done:], places
