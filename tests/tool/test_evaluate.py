"""Dense evaluation: statistics, exactness against a plain forward pass, comparisons."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lemo.data import load_documents
from lemo.training.evaluate import Scores, compare, ratio_interval, score, student_quantile


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


def test_logits_exist_for_a_few_tokens_at_a_time(model, text_folder: Path, tokenizer, monkeypatch) -> None:
    documents = load_documents([str(text_folder / "d0*.txt")], tokenizer, progress=False)
    expected, rows = score(model, documents, 64, tokens_per_batch=256), []
    monkeypatch.setattr("lemo.training.evaluate._TOKENS_PER_HEAD_CALL", 24)
    hook = model.lm_head.register_forward_hook(lambda m, args, y: rows.append(y.numel() // y.shape[-1]))
    try:
        scores = score(model, documents, 64, tokens_per_batch=256)
    finally:
        hook.remove()
    assert max(rows) == 24 and sum(rows) > 256
    np.testing.assert_allclose(scores.nll, expected.nll, rtol=1e-6)


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


def make_adapter(model_folder: Path, folder: Path, scale: float, config: Any = None) -> Path:
    """A random adapter (LoRA on q_proj unless `config` says otherwise) whose effect grows with `scale`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(4)
    config = config or LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), copy.deepcopy(config))
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_A" not in name:
            p.data.add_(torch.randn_like(p), alpha=scale)
    model.save_pretrained(folder)
    return folder


def load_base(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder)


def everything(model: torch.nn.Module) -> dict[str, Any]:
    """The bits of every weight, and every attribute of every module."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    found: dict[str, Any] = {n: (id(t), t.requires_grad, t.detach().numpy().tobytes()) for n, t in tensors}
    for name, module in model.named_modules():
        found[f"module {name}"] = (type(module), module.training, sorted(module.__dict__), sorted(module._modules))
    return found | {"config": model.config.to_dict()}  # type: ignore[operator]


@pytest.fixture(scope="module")
def one_domain(text_folder: Path, tokenizer) -> dict[str, Any]:
    return {"d": load_documents([str(text_folder / "d0[0-3].txt")], tokenizer, progress=False)}


def test_compare_base_and_adapters(model_folder: Path, text_folder: Path, tokenizer, tmp_path: Path) -> None:
    from peft import PeftModel

    zero = make_adapter(model_folder, tmp_path / "zero", 0.0)
    large = make_adapter(model_folder, tmp_path / "runs" / "adapter", 3.0)
    documents = load_documents(
        [f"a={text_folder / 'd0*.txt'}", f"b={text_folder / 'd1*.txt'}"], tokenizer, progress=False
    )
    base = load_base(model_folder)
    result = compare(base, [str(zero), f"big={large}"], documents.by_name(), 64)
    assert result.models == ["base", "zero", "big"] and result.domains == ["a", "b"]
    rows = {(r["domain"], r["model"]): r for r in result.rows()}
    assert rows["a", "zero"]["ratio"] == 1.0 and "ratio" not in rows["a", "base"]
    alone = PeftModel.from_pretrained(load_base(model_folder), large)
    expected = score(alone, documents.by_name()["b"], 64).perplexity().value
    assert rows["b", "big"]["perplexity"] == pytest.approx(expected, rel=1e-6)
    assert rows["b", "big"]["ratio"] == pytest.approx(expected / rows["b", "base"]["perplexity"], rel=1e-6)
    text = result.table()
    assert "change against base" in text and "mean" in text and "documents" in text


def test_adapters_that_do_not_fit(model_folder: Path, new_model, text_folder: Path, tokenizer, tmp_path: Path) -> None:
    documents = load_documents([str(text_folder / "d00.txt")], tokenizer, progress=False).by_name()

    def base():
        return load_base(model_folder)

    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        compare(base(), [str(tmp_path)], documents, 64)
    adapter = make_adapter(model_folder, tmp_path / "run" / "adapter", 0.0)
    with pytest.raises(ValueError, match="did you mean"):
        compare(base(), [str(adapter.parent)], documents, 64)
    for name in ("one", "two"):  # as PEFT saves several adapters of a model
        make_adapter(model_folder, tmp_path / "several" / name, 0.0)
    with pytest.raises(ValueError, match=r"did you mean \S*several/one or \S*several/two\?"):
        compare(base(), [str(tmp_path / "several")], documents, 64)
    with pytest.raises(ValueError, match="a different name"):
        compare(base(), [str(adapter), str(adapter)], documents, 64)
    other = make_adapter(new_model(tmp_path / "wide", hidden=64), tmp_path / "other", 0.0)
    with pytest.raises(ValueError, match="does not fit this model"):
        compare(base(), [str(other)], documents, 64)


def test_runs_may_have_any_name(model_folder: Path, one_domain, tmp_path: Path) -> None:
    """Also those of module methods, and ones that only differ in what a module's name cannot hold."""
    made = make_adapter(model_folder, tmp_path / "made", 1.0)
    names = ["train", "eval", "half", "float", "update", "keys", "training", "lora", "default", "a.b", "a_b", "ä b"]
    folders = [str(shutil.copytree(made, tmp_path / name / "adapter")) for name in names]
    result = compare(load_base(model_folder), folders, one_domain, 64)
    assert result.models == ["base", *names]
    assert len({float(result.scores[name]["d"].nll.sum()) for name in names}) == 1
    assert result.mean_ratio("train", "base") != 1.0


def adapter_kinds() -> dict[str, Any]:
    import peft

    def lora(**options: Any) -> Any:
        values = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
        return peft.LoraConfig(**values)

    return {
        "plain": lora(),
        "dora": lora(use_dora=True),
        "tokens": lora(trainable_token_indices=[3, 5]),
        "head": lora(modules_to_save=["lm_head"]),
        "lora-head": lora(target_modules=["q_proj", "lm_head", "embed_tokens"]),
        "pissa": lora(init_lora_weights="pissa"),  # changes the weights under it when it is loaded
        "replicated": lora(layer_replication=[[0, 2], [1, 2]]),
        "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "norms": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
        "bank": peft.VBLoRAConfig(
            target_modules=["q_proj"], r=2, vector_length=8, num_vectors=9, task_type="CAUSAL_LM"
        ),
        "prompts": peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM"),
    }


def test_adapters_of_any_kind_in_any_order(model_folder: Path, one_domain, tmp_path: Path) -> None:
    """Each is measured as if it were alone, and the base model is bit for bit what it was."""
    from peft import PeftModel

    folders = {n: make_adapter(model_folder, tmp_path / n, 0.5, config) for n, config in adapter_kinds().items()}
    alone = {}
    for name, folder in folders.items():
        wrapped = PeftModel.from_pretrained(load_base(model_folder), str(folder))
        alone[name] = score(wrapped, one_domain["d"], 64).nll
    base = load_base(model_folder)
    before = everything(base)
    for order in (list(folders), list(folders)[::-1]):
        result = compare(base, [str(folders[name]) for name in order], one_domain, 64)
        for name in order:
            assert np.array_equal(result.scores[name]["d"].nll, alone[name]), (name, order)
            assert not np.array_equal(alone[name], result.scores["base"]["d"].nll), name
        assert everything(base) == before


def test_a_failing_adapter_leaves_the_model_alone(model_folder: Path, new_model, one_domain, tmp_path: Path) -> None:
    """Weights of another depth or shape, or of a damaged file, are refused rather than filled up with others."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    fewer = make_adapter(new_model(tmp_path / "m1", layers=1), tmp_path / "fewer", 1.0, config)
    more = make_adapter(new_model(tmp_path / "m3", layers=3), tmp_path / "more", 1.0, config)
    wide = make_adapter(new_model(tmp_path / "wide", hidden=64), tmp_path / "shape", 1.0, config)

    def damaged(name: str, damage: Callable[[Path], object]) -> Path:
        folder = shutil.copytree(fewer, tmp_path / name)
        damage(folder)
        return folder

    cut = damaged("cut", lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678 no tensors"))
    empty = damaged("empty", lambda f: (f / "adapter_model.safetensors").unlink())
    no_json = damaged("no_json", lambda f: (f / "adapter_config.json").write_text("{"))
    kind = damaged("kind", lambda f: (f / "adapter_config.json").write_text('{"peft_type": "TELEPATHY"}'))
    base = load_base(model_folder)
    before = everything(base)
    for folder, words in (
        (fewer, "lacks .*layers.1.* and 1 more"),
        (more, "no place for: .*layers.2"),
        (wide, "does not fit"),
        (cut, "does not fit"),
        (empty, "does not fit"),
        (no_json, "adapter_config.json cannot be used"),
        (kind, "adapter_config.json cannot be used"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            compare(base, [str(folder)], one_domain, 64)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert everything(base) == before


@pytest.mark.parametrize("kind", ["virtual tokens", "invocation tokens"])
def test_adapters_that_plain_text_cannot_measure(model_folder: Path, one_domain, tmp_path: Path, kind: str) -> None:
    import peft

    config: Any = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    if kind == "invocation tokens":
        config = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM")
    folder = make_adapter(model_folder, tmp_path / "a", 0.5, config)
    with pytest.raises(ValueError, match=f"cannot be measured .*{kind}"):
        compare(load_base(model_folder), [str(folder)], one_domain, 64)


def test_a_model_that_scales_its_logits_is_refused(model_folder: Path, one_domain) -> None:
    model = load_base(model_folder)
    plain = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = plain(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    model.forward = scaled
    with pytest.raises(ValueError, match="base: its logits are not"):
        compare(model, [], one_domain, 64)


def test_a_changed_base_model_is_noticed(model_folder: Path, one_domain, tmp_path: Path, monkeypatch) -> None:
    import lemo.training.adapters

    folder = make_adapter(model_folder, tmp_path / "pissa", 0.5, adapter_kinds()["pissa"])
    monkeypatch.setattr(lemo.training.adapters, "_copies", lambda *_: {})
    with pytest.raises(RuntimeError, match=r"changed the base model .*q_proj.*in a separate call"):
        compare(load_base(model_folder), [str(folder)], one_domain, 64)


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
