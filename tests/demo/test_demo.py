"""The demo's pieces: what it reads, how it makes costs equal, and the model it ships."""

import json
import sysconfig
from pathlib import Path

import corpus
import pytest
import run
import text
import torch

DEMO = Path(__file__).resolve().parents[2] / "demo"
MODEL = DEMO / "model"


@pytest.fixture(scope="module")
def files():
    """Listed once: torch and transformers are thousands of files."""
    return text.source_files()


# ---- text ------------------------------------------------------------------------------------------------------------


def test_fine_tuning_text_is_nothing_pretraining_read(files):
    read = {p.resolve() for root in corpus.default_roots() for p in corpus.source_files(root)}
    assert len(read) > 500 and len(files) > 100
    assert not {f.path.resolve() for f in files} & read


def test_standard_library_is_told_from_site_packages(tmp_path):
    standard = Path(sysconfig.get_path("stdlib"))
    assert text.is_standard_library(standard / "json" / "decoder.py")
    assert not text.is_standard_library(standard / "site-packages" / "torch" / "nn.py")
    assert not text.is_standard_library(tmp_path / "a.py")
    with pytest.raises(ValueError, match="no source files"):
        text.source_files(("json",))  # the library's own packages never count


def test_split_is_by_file_and_stable(files):
    assert text.source_files(("peft",)) == text.source_files(("peft",))
    held = [f.name for f in files if f.held_out]
    assert 0.08 < len(held) / len(files) < 0.22
    assert all(text.is_held_out(name) for name in held)
    assert len({f.path for f in files}) == len(files)


def test_pretraining_splits_versions_of_a_module_alike():
    names = [f"python3.{v}/json/{m}.py" for v in (8, 11) for m in ("scanner", "decoder", "encoder")]
    assert [corpus.is_held_out(n) for n in names[:3]] == [corpus.is_held_out(n) for n in names[3:]]
    assert corpus.is_held_out("python3.11/test/test_lzma.py") == corpus.is_held_out("python3.11/lzma.py")


def test_jsonl_stops_at_the_asked_length(files, tmp_path):
    count = text.write_jsonl(files, tmp_path / "a.jsonl", characters=30_000, characters_each=12_000)
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert count == len(records) == 3
    assert all(len(r["text"]) == 12_000 for r in records)


# ---- cost ------------------------------------------------------------------------------------------------------------


def seconds_of(dense, skip):
    return run.StepCost("seconds", dense, skip)


@pytest.mark.parametrize("seconds, dense, skip", [(60, 1.5, 0.6), (40, 1.3, 1.1), (10, 4.0, 1.0), (100, 0.02, 0.011)])
def test_equal_cost(seconds, dense, skip):
    step = seconds_of(dense, skip)
    plan = run.equal_cost(seconds, step)
    spent = plan.eliminated_cost(step)
    assert spent <= plan.dense_cost(step) + 1e-9
    assert plan.dense_cost(step) - spent < skip + 1e-9  # less than one more step of the cheap kind
    assert abs(plan.skip_steps * skip / spent - 0.7) < 0.1
    shared = f"skip:0.5:sampled:shared@{plan.skip_steps},dense@{plan.exact_steps}"
    assert plan.schedule("sampled_shared") == shared


def test_equal_cost_rejects_times_that_cannot_be():
    with pytest.raises(ValueError, match="step costs must be positive"):
        run.equal_cost(10, seconds_of(0.0, 1.0))


def test_schedule_gives_the_planned_steps():
    from lemo.integration.schedule import Schedule
    from lemo.training.settings import parse_schedule

    plan = run.equal_cost(60, seconds_of(1.5, 0.6))
    schedule = Schedule(parse_schedule(plan.schedule("update_norm")))
    modes = [schedule.phase(step, plan.steps).mode for step in range(plan.steps)]
    assert modes == ["skip"] * plan.skip_steps + ["dense"] * plan.exact_steps


def demo_operations():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODEL)
    dense, skip = (sum(run.step_operations(config, keep, 100_000).values()) for keep in (1.0, 0.5))
    return run.StepCost("operations", dense, skip)


@pytest.mark.parametrize(
    "device, dense, skip, unit",
    [
        ("cpu", 1.247, 0.623, "seconds"),
        ("cpu", 1.0, 1.1, "seconds"),  # no launches there: what is slow is slow
        ("cuda", 0.050, 0.053, "operations"),  # measured on an H100
        ("cuda", 0.050, 0.030, "seconds"),
    ],
)
def test_seconds_are_equal_unless_launches_bound_a_gpu(device, dense, skip, unit):
    measured = seconds_of(dense, skip)
    plan = run.plan_runs(40, measured, demo_operations(), device)
    assert plan.step.unit == unit
    if unit == "seconds":
        assert plan == run.equal_cost(40, measured)


@pytest.mark.parametrize("seconds", [8, 40])
def test_equal_operations_stay_within_the_seconds(seconds):
    measured, counted = seconds_of(0.050, 0.053), demo_operations()
    plan = run.plan_runs(seconds, measured, counted, "cuda")
    assert 0 <= plan.dense_cost(counted) - plan.eliminated_cost(counted) < counted.skip
    assert 0.95 * seconds < plan.eliminated_cost(measured) < 1.02 * seconds
    assert plan.dense_cost(measured) < plan.eliminated_cost(measured)


# ---- operations ------------------------------------------------------------------------------------------------------


def tiny_config():
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        vocab_size=32,
        max_position_embeddings=128,
    )


def test_operations_by_hand():
    parts = run.step_operations(tiny_config(), 0.5, predictor_weights=10, tokens=100)
    frozen = 16 * 8 + 2 * 16 * 4 + 8 * 16 + 3 * 16 * 24  # q, k and v, o, MLP
    adapters = 8 * ((16 + 8) + 2 * (16 + 4) + (8 + 16))
    assert parts["projections"] == 3 * 50 * (2 * 2 * frozen + 3 * 2 * adapters)
    assert parts["attention"] == 3 * (2 + 5) * 2 * (50 * 50 / 2) * 8
    assert parts["head"] == 2 * 2 * 100 * 16 * 32
    assert parts["predictors"] == 2 * 100 * 10


def test_operations_of_a_skipped_step_that_keeps_everything_are_the_dense_ones():
    config = tiny_config()
    assert run.step_operations(config, 1.0, 10) == run.step_operations(config, 1.0)
    half, all_ = run.step_operations(config, 0.5, 10), run.step_operations(config, 1.0, 10)
    assert half["projections"] == all_["projections"] / 2 and half["attention"] == all_["attention"] / 4
    assert half["head"] == all_["head"]


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_projections_are_counted_as_they_are_run(keep):
    """torch's own counter sees the projections of a step, though not lemo's operators (attention, head, predictors)."""
    import lemo
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode, addmm_flop
    from transformers import LlamaForCausalLM

    config, tokens = tiny_config(), 128
    lora = LoraConfig(r=run.RANK, target_modules=list(run.TARGETS), task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora).train()
    phase = lemo.Phase("skip", keep=keep, policy="random") if keep < 1 else lemo.Phase("dense")
    lemo.apply(model, lemo.LemoConfig(block_size=16, phases=[phase], recompute="none"))
    ids = torch.randint(0, config.vocab_size, (1, tokens))
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: addmm_flop(y, a, b)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    seen = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in seen.items() if str(op) in ("aten.mm", "aten.addmm", "aten.addmm_"))
    assert products == run.step_operations(config, keep, tokens=tokens)["projections"]


# ---- report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device, dense, skip", [("cpu", 1.247, 0.623), ("cuda", 0.050, 0.053)])
def test_report_says_what_is_equal(device, dense, skip):
    measured = seconds_of(dense, skip)
    plan = run.plan_runs(40, measured, demo_operations(), device)
    row = {"perplexity": 9.0, "low": 8.0, "high": 10.0, "tokens": 1000, "units": 3}
    change = {"ratio": 0.99, "ratio_low": 0.98, "ratio_high": 1.01}
    rows = [row | {"model": "dense"}, *(row | change | {"model": m} for m in ("base", *run.POLICIES))]
    text = run.report(plan, {"plain": 1.0, "dense": dense, "skip": skip}, rows, {"all": 200.0})
    heading = text.splitlines()[2]
    if device == "cpu":
        assert "cost here" in heading and " 39.9 s" in text
        assert "measured seconds of a step x steps, equal by construction" in text and "operations" not in text
    else:
        assert "TFLOP here" in heading and "operations of a step x steps, equal by construction" in text
        assert "takes 1.06 x its time" in text
        ours = plan.eliminated_cost(measured)
        assert f"not equal: dense {plan.dense_cost(measured):.1f} s, with elimination {ours:.1f} s" in text


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
