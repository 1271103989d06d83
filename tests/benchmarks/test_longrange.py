"""Documents with questions about what is far away."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def longrange(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("longrange")


def find(ids: np.ndarray, piece: list[int]) -> list[int]:
    """Where `piece` begins in ids."""
    return [i for i in range(len(ids) - len(piece) + 1) if ids[i : i + len(piece)].tolist() == piece]


def test_a_document_is_a_function_of_its_seed(longrange: Any) -> None:
    source = longrange.raw_source(512)
    one, again = (longrange.document(source, 2048, 3, 5) for _ in range(2))
    assert np.array_equal(one.ids, again.ids) and one.questions == again.questions
    assert not np.array_equal(one.ids, longrange.document(source, 2048, 3, 6).ids)
    assert not np.array_equal(one.ids, longrange.document(source, 2048, 4, 5).ids)


@pytest.mark.parametrize("length", [1200, 4096])
def test_length_labels_and_groups(longrange: Any, length: int) -> None:
    one = longrange.document(longrange.raw_source(512), length, 0, 0)
    assert one.ids.shape == one.labels.shape == (length,)
    answers = np.concatenate([np.arange(q.start, q.stop) for q in one.questions])
    labelled = np.flatnonzero(one.labels != longrange.IGNORED)
    assert np.array_equal(np.sort(answers), labelled) and np.array_equal(one.labels[labelled], one.ids[labelled])
    assert len({q.group for q in one.questions}) == len(one.questions) == 16
    assert max(labelled) == length - 1


def test_the_evidence_is_where_the_question_says(longrange: Any) -> None:
    """The text before an answer, up to the name, is the evidence; and it is there once, `distance` tokens away."""
    source = longrange.raw_source(512)
    one = longrange.document(source, 4096, 1, 0, tasks=["passkey", "multikey"])
    for q in one.questions:
        answer = one.ids[q.start : q.stop].tolist()
        question = one.ids[q.start - 9 : q.start].tolist()  # The vault code of A B C D is
        assert question[:4] == source.encode("The vault code of")[:4] or question[-1] == source.encode("is")[0]
        places = find(one.ids[: q.start], one.ids[q.start - 5 : q.start].tolist() + answer)
        assert len(places) == 1
        begin = q.start - q.distance
        assert 0 < places[0] - begin < 6
        assert abs(q.distance / 4096 - q.share) < 0.2


def test_a_chain_of_variables_leads_to_the_answer(longrange: Any) -> None:
    source = longrange.raw_source(512)
    one = longrange.document(source, 2048, 2, 0, tasks=["variables"], distances=[0.5])
    (question,) = one.questions
    ids = one.ids.tolist()
    name = ids[question.start - 5 : question.start - 1]
    let, equals, end = source.encode("let")[0], source.encode("=")[0], source.encode(";")[0]
    steps = 0
    while True:  # follows the chain back from the variable that is asked for
        (place,) = find(one.ids, [let, *name, equals])
        after = place + 6
        value = ids[after : ids.index(end, after)]
        if len(value) == 5:  # a number; names have four letters
            break
        name, steps = value, steps + 1
    assert steps == 2 and value == ids[question.start : question.stop]
    assert abs(place - (question.start - question.distance)) <= 1


def test_copy_asks_for_the_rest_of_a_segment(longrange: Any) -> None:
    one = longrange.document(longrange.raw_source(512), 2048, 2, 0, tasks=["copy"], distances=[0.9])
    (question,) = one.questions
    begin = question.start - question.distance
    shown = 4
    head = question.start - shown
    n = question.stop - head
    places = find(one.ids[:head], one.ids[head : question.stop].tolist())
    assert len(places) == 1 and n == 24 and 0 < places[0] - begin < 10


def test_refusals(longrange: Any) -> None:
    source = longrange.raw_source(512)
    with pytest.raises(ValueError, match="a document of 100 leaves no room for filler"):
        longrange.document(source, 100, 0, 0)
    with pytest.raises(ValueError, match=r"tasks must be among passkey, .*; got riddle"):
        longrange.document(source, 1000, 0, 0, tasks=["riddle"])
    with pytest.raises(ValueError, match="distances must be shares between 0 and 1"):
        longrange.document(source, 1000, 0, 0, distances=[1.0])
    with pytest.raises(ValueError, match="vocabulary of at least 128"):
        longrange.raw_source(64)


def test_evaluation_scores_answers(longrange: Any) -> None:
    """The loss is the model's own over the answer; a random model is not right about 20 tokens."""
    source = longrange.raw_source(512)
    made = [longrange.document(source, 1200, 0, i) for i in range(2)]
    model: Any = tiny.build()
    torch.manual_seed(0)
    model.resize_token_embeddings(512)
    found = longrange.evaluate(model, made)
    assert len(found) == 16 and all(len(v["loss"]) == len(v["correct"]) == 2 for v in found.values())
    inputs = longrange.batch(made[:1], torch.device("cpu"))
    only = {q.group: q for q in made[0].questions}["copy 0.1"]
    labels = torch.full_like(inputs["labels"], longrange.IGNORED)
    labels[0, only.start : only.stop] = inputs["labels"][0, only.start : only.stop]
    with torch.no_grad():
        expected = model(input_ids=inputs["input_ids"], labels=labels).loss.item()
    assert found["copy 0.1"]["loss"][0] == pytest.approx(expected, abs=1e-4)
    assert found["copy 0.1"]["correct"] == [0.0, 0.0]
