"""Dense evaluation: statistics, exactness against a plain forward pass, comparisons."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lemo.data import load_documents
from lemo.evaluate import Scores, compare, ratio_interval, score, student_quantile


# Student's t, two-sided 95 % and 99 %, from printed tables.
@pytest.mark.parametrize(
    ("df", "level", "t"),
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (10, 0.95, 2.228), (30, 0.95, 2.042), (120, 0.95, 1.980),
     (1, 0.99, 63.657), (5, 0.99, 4.032), (9, 0.8, 1.383)],
)  # fmt: skip
def test_student_quantiles(df: int, level: float, t: float) -> None:
    assert student_quantile(level, df) == pytest.approx(t, abs=6e-4 * max(1, t / 10))


def test_intervals_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        counts = rng.integers(50, 150, size=12).astype(float)
        sums = counts * 3.0 + rng.normal(scale=20, size=12)
        interval = ratio_interval(sums, counts)
        covered += interval.low <= 3.0 <= interval.high
    assert 0.93 <= covered / 2000 <= 0.97


def test_one_unit_has_no_interval() -> None:
    interval = ratio_interval(np.array([6.0]), np.array([2.0]))
    assert interval.value == 3.0 and math.isinf(interval.high)


def test_pairing_removes_the_spread_of_the_text() -> None:
    rng = np.random.default_rng(1)
    tokens = np.full(30, 100.0)
    base = tokens * rng.normal(3.0, 0.5, size=30)
    documents = np.arange(30)
    a, b = Scores(base, tokens, documents), Scores(base * 1.001, tokens, documents)
    ratio = b.ratio_to(a)
    assert 1 < ratio.low < ratio.value < ratio.high < 1.01
    assert a.perplexity().high / a.perplexity().low > 1.2
    with pytest.raises(ValueError, match="different text"):
        a.ratio_to(Scores(base[:5], tokens[:5], documents[:5]))


@pytest.fixture(scope="module")
def model(model_folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)


def test_scores_equal_one_plain_forward_pass_per_piece(model, text_folder: Path, tokenizer) -> None:
    documents = load_documents([str(text_folder)], tokenizer, progress=False)
    model.train()
    ticks: list[int] = []
    scores = score(model, documents, 64, tokens_per_batch=256, tick=ticks.append)
    assert model.training
    model.eval()
    place = 0
    for d in range(len(documents)):
        tokens = documents.document(d)
        for start in range(0, len(tokens), 64):
            ids = torch.from_numpy(tokens[start : start + 64].astype(np.int64))[None]
            if ids.shape[1] < 2:
                continue
            with torch.no_grad():
                loss = model(input_ids=ids, labels=ids).loss.item()
            assert scores.tokens[place] == ids.shape[1] - 1 and scores.documents[place] == d
            assert scores.nll[place] / scores.tokens[place] == pytest.approx(loss, rel=1e-5)
            place += 1
    assert place == len(scores.nll)
    assert sum(ticks) == scores.tokens.sum() + len(scores.nll)
    assert scores.units()[0] == "document"


def test_a_non_finite_model_is_an_error(model, text_folder: Path, tokenizer) -> None:
    documents = load_documents([str(text_folder / "d00.txt")], tokenizer, progress=False)
    weight = model.lm_head.weight.data
    kept = weight.clone()
    weight[0, 0] = float("nan")
    try:
        with pytest.raises(FloatingPointError, match="not finite"):
            score(model, documents, 64)
    finally:
        weight.copy_(kept)


def make_adapter(model_folder: Path, folder: Path, scale: float) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(4)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=scale)
    model.save_pretrained(folder)
    return folder


def test_compare_base_and_adapters(model_folder: Path, text_folder: Path, tokenizer, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    zero = make_adapter(model_folder, tmp_path / "zero", 0.0)
    large = make_adapter(model_folder, tmp_path / "runs" / "adapter", 3.0)
    documents = load_documents(
        [f"a={text_folder / 'd0*.txt'}", f"b={text_folder / 'd1*.txt'}"], tokenizer, progress=False
    )
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    result = compare(base, [str(zero), f"big={large}"], documents.by_name(), 64)
    assert result.models == ["base", "zero", "big"] and result.domains == ["a", "b"]
    rows = {(r["domain"], r["model"]): r for r in result.rows()}
    assert rows["a", "zero"]["ratio"] == 1.0 and "ratio" not in rows["a", "base"]
    alone = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), large)
    expected = score(alone, documents.by_name()["b"], 64).perplexity().value
    assert rows["b", "big"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert rows["b", "big"]["ratio"] == pytest.approx(expected / rows["b", "base"]["perplexity"], rel=1e-6)
    text = result.table()
    assert "change against base" in text and "mean" in text and "documents" in text


def test_adapters_that_do_not_fit(model_folder: Path, new_model, text_folder: Path, tokenizer, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    documents = load_documents([str(text_folder / "d00.txt")], tokenizer, progress=False).by_name()

    def base():
        return AutoModelForCausalLM.from_pretrained(model_folder)

    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        compare(base(), [str(tmp_path)], documents, 64)
    adapter = make_adapter(model_folder, tmp_path / "run" / "adapter", 0.0)
    with pytest.raises(ValueError, match="did you mean"):
        compare(base(), [str(adapter.parent)], documents, 64)
    with pytest.raises(ValueError, match="names of their own"):
        compare(base(), [str(adapter), str(adapter)], documents, 64)
    other = make_adapter(new_model(tmp_path / "wide", hidden=64), tmp_path / "other", 0.0)
    with pytest.raises(ValueError, match="does not fit this model"):
        compare(base(), [str(other)], documents, 64)


def test_only_labels_are_scored(model, text_folder: Path, tokenizer) -> None:
    documents = load_documents([str(text_folder / "d0*.txt")], tokenizer, progress=False)
    marked = np.random.default_rng(0).random(documents.num_tokens) < 0.2
    marked[: documents.offsets[1]] = False  # a document without a label
    masked = dataclasses.replace(documents, trained=marked)
    scores = score(model, masked, 48)
    nll = tokens = 0.0
    for i in range(len(documents)):
        mask = masked.labelled(i)
        for start in range(0, len(documents.document(i)), 48):
            ids = torch.from_numpy(documents.document(i)[start : start + 48].astype(np.int64))[None]
            labels = ids.masked_fill(~torch.from_numpy(mask[start : start + 48]), -100)
            if (labels[0, 1:] != -100).any():
                count = int((labels[0, 1:] != -100).sum())
                nll += model(input_ids=ids, labels=labels).loss.item() * count
                tokens += count
    assert scores.tokens.sum() == tokens and 0 not in scores.documents
    assert scores.nll.sum() == pytest.approx(nll, rel=1e-5)
