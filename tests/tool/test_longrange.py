"""Documents with questions about what is far away."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lemo.cli import main
from lemo.data import questions
from lemo.training import longrange
from lemo.training.positions import POSITIONS_FILE
from support import tiny


def find(ids: np.ndarray, piece: list[int]) -> list[int]:
    """Where `piece` begins in ids."""
    return [i for i in range(len(ids) - len(piece) + 1) if ids[i : i + len(piece)].tolist() == piece]


def test_a_document_is_a_function_of_its_seed() -> None:
    source = questions.raw_source(512)
    one, again = (questions.document(source, 2048, 3, 5) for _ in range(2))
    assert np.array_equal(one.ids, again.ids) and one.questions == again.questions
    assert not np.array_equal(one.ids, questions.document(source, 2048, 3, 6).ids)
    assert not np.array_equal(one.ids, questions.document(source, 2048, 4, 5).ids)


@pytest.mark.parametrize("length", [1200, 4096])
def test_length_labels_and_groups(length: int) -> None:
    one = questions.document(questions.raw_source(512), length, 0, 0)
    assert one.ids.shape == one.labels.shape == (length,)
    answers = np.concatenate([np.arange(q.start, q.stop) for q in one.questions])
    labelled = np.flatnonzero(one.labels != questions.IGNORED)
    assert np.array_equal(np.sort(answers), labelled) and np.array_equal(one.labels[labelled], one.ids[labelled])
    assert len({q.group for q in one.questions}) == len(one.questions) == 16
    assert max(labelled) == length - 1


def test_the_evidence_is_where_the_question_says() -> None:
    """The text before an answer, up to the name, is the evidence; and it is there once, `distance` tokens away."""
    source = questions.raw_source(512)
    one = questions.document(source, 4096, 1, 0, tasks=["passkey", "multikey"])
    for q in one.questions:
        answer = one.ids[q.start : q.stop].tolist()
        question = one.ids[q.start - 9 : q.start].tolist()  # The vault code of A B C D is
        assert question[:4] == source.encode("The vault code of")[:4] or question[-1] == source.encode("is")[0]
        places = find(one.ids[: q.start], one.ids[q.start - 5 : q.start].tolist() + answer)
        assert len(places) == 1
        begin = q.start - q.distance
        assert 0 < places[0] - begin < 6
        assert abs(q.distance / 4096 - q.share) < 0.2


def test_a_chain_of_variables_leads_to_the_answer() -> None:
    source = questions.raw_source(512)
    one = questions.document(source, 2048, 2, 0, tasks=["variables"], distances=[0.5])
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


def test_copy_asks_for_the_rest_of_a_segment() -> None:
    one = questions.document(questions.raw_source(512), 2048, 2, 0, tasks=["copy"], distances=[0.9])
    (question,) = one.questions
    begin = question.start - question.distance
    shown = 4
    head = question.start - shown
    n = question.stop - head
    places = find(one.ids[:head], one.ids[head : question.stop].tolist())
    assert len(places) == 1 and n == 24 and 0 < places[0] - begin < 10


def test_refusals() -> None:
    source = questions.raw_source(512)
    with pytest.raises(ValueError, match="a document of 100 leaves no room for filler"):
        questions.document(source, 100, 0, 0)
    with pytest.raises(ValueError, match=r"tasks must be among passkey, .*; got riddle"):
        questions.document(source, 1000, 0, 0, tasks=["riddle"])
    with pytest.raises(ValueError, match="distances must be shares between 0 and 1"):
        questions.document(source, 1000, 0, 0, distances=[1.0])
    with pytest.raises(ValueError, match="vocabulary of at least 128"):
        questions.raw_source(64)


def test_evaluation_scores_answers() -> None:
    """The loss is the model's own over the answer; a random model is not right about 20 tokens."""
    source = questions.raw_source(512)
    made = [questions.document(source, 1200, 0, i) for i in range(2)]
    model: Any = tiny.build()
    torch.manual_seed(0)
    model.resize_token_embeddings(512)
    found = longrange.evaluate(model, made)
    assert len(found) == 16 and all(len(v["loss"]) == len(v["correct"]) == 2 for v in found.values())
    inputs = longrange.batch(made[:1], torch.device("cpu"))
    only = {q.group: q for q in made[0].questions}["copy 0.1"]
    labels = torch.full_like(inputs["labels"], questions.IGNORED)
    labels[0, only.start : only.stop] = inputs["labels"][0, only.start : only.stop]
    with torch.no_grad():
        expected = model(input_ids=inputs["input_ids"], labels=labels).loss.item()
    assert found["copy 0.1"]["loss"][0] == pytest.approx(expected, abs=1e-4)
    assert found["copy 0.1"]["correct"] == [0.0, 0.0]


# --- tokenizers -------------------------------------------------------------------------------------------------------


def byte_level(folder: Path, begin: bool = False) -> Any:
    """A tokenizer of bytes, with a token in front of every text if `begin`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<s>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<eos>")
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("begin", [False, True])
def test_documents_of_a_tokenizer_read_as_text(tmp_path: Path, begin: bool) -> None:
    tokenizer = byte_level(tmp_path, begin)
    filler = np.array(tokenizer(questions.plain_text(500), add_special_tokens=False)["input_ids"])
    source = questions.tokenizer_source(tokenizer, filler)
    assert source.begin == ((0,) if begin else ())
    one = questions.document(source, 3000, 0, 0, distances=[0.5])
    assert one.ids[0] == 0 if begin else one.ids[0] != 0
    assert len(one.ids) == 3000
    text = tokenizer.decode(one.ids)
    for q in one.questions:
        if q.task != "copy":
            answer, before = tokenizer.decode(one.ids[q.start : q.stop]), tokenizer.decode(one.ids[: q.start])
            assert answer.strip().isdecimal() and before.rsplit(maxsplit=1)[-1] in ("is", "=")
            assert text.count(answer) == 2


def test_a_tokenizer_that_cannot_spell_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="reads different numbers or names as the same tokens"):
        questions.tokenizer_source(tokenizer, np.arange(9))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_right_means_what_greedy_decoding_gives() -> None:
    model: Any = tiny.build()
    torch.manual_seed(1)
    prompt = torch.randint(0, 64, (1, 50))
    mask = torch.ones_like(prompt)
    given = model.generate(prompt, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None)
    ids = given[0].numpy()
    question = questions.Question("copy", 0.5, 20, 50, 54)
    right = longrange.answers(model, questions.Document(ids, ids, [question]))
    assert [a.correct for a in right] == [True] and right[0].length == 54
    for place in (50, 53):
        wrong = ids.copy()
        wrong[place] = (wrong[place] + 1) % 64
        assert not longrange.answers(model, questions.Document(wrong, wrong, [question]))[0].correct


def test_wilsons_interval() -> None:
    """Values of Wilson (1927) as tables give them; never empty, never outside of [0, 1]."""
    for right, count, low, high in ((8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0)):
        interval = longrange.wilson(right, count)
        assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)
        assert interval.value == right / count


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with the tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    where = tmp_path_factory.mktemp("bytes")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, initializer_range=0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(where)
    byte_level(where, begin=True)
    return where


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["evaluate", *map(str, arguments), "--json", "-", "--quiet"]) == 0
    return json.loads(capsys.readouterr().out)


def test_tasks_of_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run names model and adapter; rows for both, by length, task and distance, with everything over distances."""
    text = tmp_path / "text.txt"
    text.write_text(questions.plain_text(3000))
    out = tmp_path / "run"
    options = ["--context", "64", "--steps", "2", "--block-size", "8", "--dense", "--quiet"]
    assert main(["finetune", "--model", str(folder), "--data", str(text), *options, "--out", str(out)]) == 0
    capsys.readouterr()
    tasks = ("--tasks", "passkey,copy", "--lengths", "512,1K", "--distances", "0.3,0.8", "--count", 2)
    found = evaluated(capsys, out, *tasks)
    assert (found["lengths"], found["tasks"], found["distances"]) == ([512, 1024], ["passkey", "copy"], [0.3, 0.8])
    rows = found["rows"]
    assert len(rows) == 2 * 2 * 2 * 3 and {r["model"] for r in rows} == {"base", "run"}
    for row in rows:
        assert row["questions"] == (2 if row["distance"] else 4)
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["loss"] > 0
    far = [r["tokens"] for r in rows if r["length"] == 1024 and r["distance"] == 0.8]
    assert all(700 < t < 1024 for t in far)
    assert evaluated(capsys, out, *tasks) == found
    other = evaluated(capsys, "--model", folder, *tasks, "--data", text, "--seed", 1)
    assert [r["model"] for r in other["rows"]] == ["base"] * 12
    assert [r["loss"] for r in other["rows"]] != [r["loss"] for r in rows if r["model"] == "base"]
    assert main(["evaluate", str(out), *map(str, tasks)]) == 0
    table = capsys.readouterr().out
    assert "at 0.3" in table and "greedy decoding" in table and table.count("copy ") == 4
    assert main(["evaluate", str(out), "--data", str(text), "--context", "64", "--quiet"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_a_model_without_tokenizer_is_asked_in_raw_ids(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    found = evaluated(capsys, "--model", tmp_path, "--tasks", "variables", "--lengths", "1K", "--count", 1)
    assert len(found["rows"]) == 5


REFUSED = {
    "no model": ((), "--model MODEL, or the folder of a run"),
    "no task": (("--tasks", "riddle"), "expected different ones of passkey, multikey"),
    "twice": (("--tasks", "copy,copy"), "expected different ones of"),
    "length": (("--tasks", "all", "--lengths", "4x"), "for instance 4K,8K"),
    "distance": (("--tasks", "all", "--distances", "1.5"), "between 0 and 1"),
    "count": (("--tasks", "all", "--count", "0"), "at least one document"),
    "too short": (("--tasks", "all", "--lengths", "100"), "Make it longer, or ask fewer tasks"),
    "too long": (("--tasks", "all", "--lengths", "1M"), "exceeds the model's 2048 positions"),
    "context": (("--tasks", "all", "--context", "64"), "--context is of perplexity"),
    "lengths alone": (("--lengths", "4K"), "name them with --tasks"),
    "no data": ((), "--data is needed to measure perplexity"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_commands(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = REFUSED[case]
    model = () if case == "no model" else ("--model", str(folder))
    assert main(["evaluate", *model, *arguments, "--quiet"]) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_stretched_positions(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its factor is used at every length, and longer documents are refused."""
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(questions.plain_text(3000))
    options = ["--context", "4096", "--steps", "1", "--dense", "--interpolate-positions", "--quiet"]
    assert main(["finetune", "--model", str(folder), "--data", str(text), *options, "--out", str(out)]) == 0
    capsys.readouterr()
    run = (out, "--tasks", "copy", "--count", 1, "--distances", "0.5", "--no-base", "--lengths")
    (loss, _) = (r["loss"] for r in evaluated(capsys, *run, "1K")["rows"])
    of_the_run = ("--model", folder, "--adapter", out / "adapter", *run[1:], "1K")
    assert evaluated(capsys, *of_the_run)["rows"][0]["loss"] == loss
    alone = shutil.copytree(out / "adapter", tmp_path / "alone")
    elsewhere = ("--model", folder, "--adapter", alone, *run[1:], "1K")
    assert evaluated(capsys, *elsewhere)["rows"][0]["loss"] == loss
    (alone / POSITIONS_FILE).unlink()  # as an earlier lemo left it: nothing says how it was trained
    assert evaluated(capsys, *elsewhere)["rows"][0]["loss"] != loss
    assert main(["evaluate", *map(str, run), "8K", "--quiet"]) == 2
    assert "stretched positions to 4096" in capsys.readouterr().err
