"""The demo's pieces: what it reads, how it makes costs equal, and the model it ships."""

import importlib
import json
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODEL = DEMO / "model"


@pytest.fixture(scope="module", autouse=True)
def demo_on_path():
    sys.path.insert(0, str(DEMO))
    yield
    sys.path.remove(str(DEMO))
    for name in ("text", "run", "corpus"):
        sys.modules.pop(name, None)


def load(name):
    return importlib.import_module(name)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_fine_tuning_text_is_nothing_pretraining_read():
    files = load("text").source_files()
    read = {p.resolve() for root in load("corpus").default_roots() for p in load("corpus").source_files(root)}
    assert len(read) > 500 and len(files) > 100
    assert not {f.path.resolve() for f in files} & read


def test_standard_library_is_told_from_site_packages(tmp_path):
    text = load("text")
    standard = Path(sysconfig.get_path("stdlib"))
    assert text.is_standard_library(standard / "json" / "decoder.py")
    assert not text.is_standard_library(standard / "site-packages" / "torch" / "nn.py")
    assert not text.is_standard_library(tmp_path / "a.py")
    with pytest.raises(ValueError, match="no source files"):
        text.source_files(("json",))  # the library's own packages never count


def test_split_is_by_file_and_stable():
    text = load("text")
    files = text.source_files()
    assert files == text.source_files()
    held = [f.name for f in files if f.held_out]
    assert 0.08 < len(held) / len(files) < 0.22
    assert all(text.is_held_out(name) for name in held)
    assert len({f.path for f in files}) == len(files)


def test_pretraining_splits_versions_of_a_module_alike():
    corpus = load("corpus")
    names = [f"python3.{v}/json/{m}.py" for v in (8, 11) for m in ("scanner", "decoder", "encoder")]
    assert [corpus.is_held_out(n) for n in names[:3]] == [corpus.is_held_out(n) for n in names[3:]]
    assert corpus.is_held_out("python3.11/test/test_lzma.py") == corpus.is_held_out("python3.11/lzma.py")


def test_jsonl_stops_at_the_asked_length(tmp_path):
    text = load("text")
    files = text.source_files()
    count = text.write_jsonl(files, tmp_path / "a.jsonl", characters=30_000, characters_each=12_000)
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert count == len(records) == 3
    assert all(len(r["text"]) == 12_000 for r in records)


# ---- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, dense, skip", [(60, 1.5, 0.6), (40, 1.3, 1.1), (10, 4.0, 1.0), (100, 0.02, 0.011)])
def test_equal_cost(seconds, dense, skip):
    plan = load("run").equal_cost(seconds, dense, skip)
    assert plan.eliminated_cost <= plan.dense_cost + 1e-9
    assert plan.dense_cost - plan.eliminated_cost < skip + 1e-9  # less than one more step of the cheap kind
    share = plan.skip_steps * skip / plan.eliminated_cost
    assert abs(share - 0.7) < 0.1
    shared = f"skip:0.5:sampled:shared@{plan.skip_steps},dense@{plan.exact_steps}"
    assert plan.schedule("sampled_shared") == shared


def test_equal_cost_rejects_times_that_cannot_be():
    with pytest.raises(ValueError, match="step times must be positive"):
        load("run").equal_cost(10, 0.0, 1.0)


def test_schedule_gives_the_planned_steps():
    from lemo.schedule import Schedule
    from lemo.settings import parse_schedule

    plan = load("run").equal_cost(60, 1.5, 0.6)
    schedule = Schedule(parse_schedule(plan.schedule("update_norm")))
    modes = [schedule.phase(step, plan.steps).mode for step in range(plan.steps)]
    assert modes == ["skip"] * plan.skip_steps + ["dense"] * plan.exact_steps


# ---- model -----------------------------------------------------------------------------------------------------------


def test_model_is_small_and_knows_python():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert sum(p.stat().st_size for p in MODEL.iterdir()) <= 12_000_000
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert model.config.max_position_embeddings == 4096
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    ids = torch.tensor([tokenizer("for i in range(10):\n    print(").input_ids])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 4.0  # log(4096) = 8.3 without any knowledge


def test_tokenizer_gives_text_back():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "def f(x: int) -> str:\n\treturn f'{x:>8}'  # 2024 äöü\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_training_report_says_that_context_helps():
    losses = json.loads((MODEL / "training.json").read_text())["held_out_loss_by_position"]
    assert losses["3072-4096"] < losses["512-1024"] < losses["128-256"]
