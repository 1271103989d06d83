"""Documents with questions whose answers need evidence from far away, at any length, for any tokenizer.

Filler text fills a document to exactly --length tokens; evidence is put into it, and the questions with their answers
stand at its end. Only answers have labels.
  passkey    one number, hidden once
  multikey   a number hidden under one of several names; the question names one
  variables  a chain of assignments (A = 51324, B = A, C = B) among others; the question asks for the last one's value
  copy       a random segment that appears once; the question is its beginning, the answer the rest
Every document asks every task at every distance: the first evidence lies that share of the document's body before the
questions, and what a chain needs besides lies in between. The same seed gives the same documents.

  python benchmarks/longrange.py --model MODEL --text README.md --length 8192 --show     # one document as text
  python benchmarks/longrange.py --model MODEL --text README.md --length 8192 --count 20 # the model's own accuracy
"""

from __future__ import annotations

import argparse
import re
import string
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
    """What documents are made of. encode: text to ids without special tokens; filler: ids of running text."""

    encode: Encode
    filler: np.ndarray


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
    return Source(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], filler)


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
    return pieces, source.encode(f"\nThe vault code of {name} is"), source.encode(f" {value}")


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
    return pieces, source.encode(f"\nprint {names[half - 1]} ="), source.encode(f" {values[0]}")


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
    room = length - inserted - tail
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
    ids: list[int] = []
    places: dict[int, int] = {}
    done = 0
    for piece in sorted(pieces, key=lambda p: -p.share):
        upto = round((1.0 - piece.share) * room)
        ids += filler[done:upto]
        done = upto
        places[id(piece)] = len(ids)
        ids += piece.ids
    return ids + filler[done:], places


def batch(documents: Sequence[Document], device: torch.device) -> dict[str, Tensor]:
    """input_ids and labels [B, length] of documents of one length."""
    return {
        "input_ids": torch.from_numpy(np.stack([d.ids for d in documents])).to(device),
        "labels": torch.from_numpy(np.stack([d.labels for d in documents])).to(device),
    }


@torch.no_grad()
def evaluate(model: Any, documents: Sequence[Document]) -> dict[str, dict[str, list[float]]]:
    """By task and distance, an entry per document: mean loss of the answer, and 1 if greedy decoding would give it.

    Answers are scored in one pass over the document: a greedy answer is right if every token of it is the likeliest
    after the right ones before.
    """
    model.eval()
    device = next(model.parameters()).device
    found: dict[str, dict[str, list[float]]] = {}
    for one in documents:
        ids = torch.from_numpy(one.ids)[None].to(device)
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        for q in sorted(one.questions, key=lambda q: q.group):
            logits = model.get_output_embeddings()(hidden[q.start - 1 : q.stop - 1]).float()
            target = ids[0, q.start : q.stop]
            group = found.setdefault(q.group, {"loss": [], "correct": []})
            group["loss"].append(round(torch.nn.functional.cross_entropy(logits, target).item(), 5))
            group["correct"].append(float((logits.argmax(-1) == target).all()))
    return found


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a transformers model with its tokenizer")
    parser.add_argument("--text", required=True, nargs="+", type=Path, help="text files for the filler")
    parser.add_argument("--length", type=int, required=True, help="tokens of a document")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--distances", nargs="+", type=float, default=list(DISTANCES), help="shares of the document")
    parser.add_argument("--count", type=int, default=8, help="documents (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print the first document, evaluate nothing")
    args = parser.parse_args(arguments)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n\n".join(path.read_text(errors="replace") for path in args.text)
    source = tokenizer_source(tokenizer, np.array(tokenizer(text, add_special_tokens=False)["input_ids"]))
    try:
        made = [document(source, args.length, args.seed, i, args.tasks, args.distances) for i in range(args.count)]
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if args.show:
        print(tokenizer.decode(made[0].ids))
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device)
    for group, values in evaluate(model, made).items():
        print(f"{group:16}  loss {np.mean(values['loss']):7.4f}  right {np.mean(values['correct']):6.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
