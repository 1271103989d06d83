"""TRL's trainers: the segmented loss in place of TRL's head, whichever came first, with the numbers TRL gets alone."""

from typing import Any

import lemo
import pytest
import torch
from lemo.integration import trl_head

pytest.importorskip("trl", reason="TRL is not installed (the extra lemo[test] has it)")

import trl
from support import trl_setup
from support.models import ATTENTION, base, lora
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

DENSE = [lemo.Phase("dense")]
SKIP = [lemo.Phase("skip", keep=0.5, policy="random")]


@pytest.fixture(scope="module")
def tokenizer():
    return trl_setup.tokenizer()


@pytest.fixture
def segmented(monkeypatch):
    """Counts calls of the segmented loss."""
    calls = []
    original = trl_head.causal_lm_loss  # type: ignore[attr-defined]
    monkeypatch.setattr(trl_head, "causal_lm_loss", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def train(make_trainer, tokenizer, order, phases=None):
    """The numbers logged in every step, and the controller."""
    model = trl_setup.adapted(len(tokenizer))
    config = lemo.LemoConfig(block_size=4, phases=phases or DENSE)
    controller = lemo.apply(model, config) if order == "before" else None
    callbacks = [] if controller is None else [controller.callback()]
    trainer = make_trainer(model, callbacks)
    if order == "after":
        controller = lemo.apply(trainer.model, config)
        trainer.add_callback(controller.callback())
    trainer.train()
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "rewards/margins", "logps/chosen")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: e[k] for k in keys if k in e} for e in logs], controller


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


SFT: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"packing": True, "packing_strategy": "bfd"},
    "padding-free": {"padding_free": True, "max_length": None},
    "assistant-only": {"assistant_only_loss": True},
    "dft": {"loss_type": "dft"},
    "accumulated": {"gradient_accumulation_steps": 2},
}


def sft(tmp_path, tokenizer, kind):
    data = trl_setup.chats() if kind == "assistant-only" else trl_setup.texts()
    options = trl_setup.arguments(tmp_path, **{"max_length": 64, **SFT[kind]})

    def make(model, callbacks):
        return SFTTrainer(
            model=model, args=SFTConfig(**options), train_dataset=data, processing_class=tokenizer, callbacks=callbacks
        )

    return make


@pytest.mark.parametrize("kind", SFT)
def test_sft_in_both_orders(tmp_path, tokenizer, segmented, kind):
    make = sft(tmp_path, tokenizer, kind)
    expected, _ = train(make, tokenizer, None)
    assert not segmented
    for order in ("before", "after"):
        got, _ = train(make, tokenizer, order)
        assert_same(got, expected)
        assert len(segmented) == 3 * SFT[kind].get("gradient_accumulation_steps", 1)
        segmented.clear()


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_sft_skips_tokens(tmp_path, tokenizer, segmented, kind):
    """The loss is that of lemo under transformers' own Trainer: the mean over the tokens that took part."""
    runs = []
    for order in ("before", "after"):
        logs, controller = train(sft(tmp_path, tokenizer, kind), tokenizer, order, SKIP)
        assert max(controller.kept_ratios) < 1
        assert 0 < controller.report()["loss_tokens"] < controller.report()["tokens"]
        assert len(segmented) == len(logs) == 3
        segmented.clear()
        runs.append(logs)
    assert_same(runs[0], runs[1])
    plain = sft(tmp_path, tokenizer, kind)
    monkey = pytest.MonkeyPatch()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch).loss

    with monkey.context() as patch:
        patch.setattr(SFTTrainer, "compute_loss", compute_loss)
        logs, _ = train(plain, tokenizer, "before", SKIP)
    keys = ("loss", "grad_norm")
    assert_same([{k: e[k] for k in keys} for e in runs[0]], [{k: e[k] for k in keys} for e in logs])


def test_sft_with_a_projection_before_the_head(tmp_path, tokenizer, segmented, monkeypatch):
    """OPT-350m's, which nothing normalizes."""

    def opt(vocabulary):
        return lora(base("opt_350m", vocab_size=vocabulary, max_position_embeddings=512), ATTENTION["opt_350m"])

    monkeypatch.setattr(trl_setup, "adapted", opt)
    make = sft(tmp_path, tokenizer, "padded")
    expected, _ = train(make, tokenizer, None)
    got, _ = train(make, tokenizer, "after")
    assert_same(got, expected)
    assert len(segmented) == 3
    logs, controller = train(make, tokenizer, "before", SKIP)
    assert max(controller.kept_ratios) < 1 and len(logs) == 3


def test_a_head_that_trains_stays_trls(tmp_path, tokenizer, segmented, caplog):
    def make(model, callbacks):
        model.get_base_model().lm_head.weight.requires_grad_(True)
        return sft(tmp_path, tokenizer, "padded")(model, callbacks)

    expected, _ = train(make, tokenizer, None)
    for order in ("before", "after"):
        got, controller = train(make, tokenizer, order)
        assert_same(got, expected)
        assert controller.kept_ratios == [1.0, 1.0]
    assert not segmented
    assert "TRL's own head computes the loss" in caplog.text


def test_without_the_callback(tmp_path, tokenizer, segmented):
    """Applied first and not used since: ours takes over once a forward pass shows TRL's head."""
    model = trl_setup.adapted(len(tokenizer))
    lemo.apply(model, lemo.LemoConfig(block_size=4, phases=DENSE))
    sft(tmp_path, tokenizer, "padded")(model, []).train()
    assert len(segmented) == 2  # of 3 steps


def test_evaluation_and_removal_leave_trls_head(tmp_path, tokenizer, segmented):
    model = trl_setup.adapted(len(tokenizer))
    controller = lemo.apply(model, lemo.LemoConfig(block_size=4, phases=DENSE))
    trainer = sft(tmp_path, tokenizer, "padded")(model, [controller.callback()])
    trainer.train()
    segmented.clear()
    loss = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    lemo.remove(model)
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == loss
    model.train()
    batch = {"input_ids": torch.arange(8, 20)[None], "labels": torch.arange(8, 20)[None]}
    assert model(**batch, fused_lm_head=True).log_probs.shape == (1, 11)
    assert torch.is_tensor(model(**batch).logits)
    assert not segmented


def test_a_trained_entropy_is_an_error(tmp_path, tokenizer):
    model = trl_setup.adapted(len(tokenizer))
    trainer = sft(tmp_path, tokenizer, "padded")(model, [])
    lemo.apply(model, lemo.LemoConfig(block_size=4, phases=DENSE))
    trainer.model.train()
    ids = torch.arange(8, 20)[None]
    output = model(input_ids=ids, labels=ids, fused_lm_head=True)
    with pytest.raises(RuntimeError, match="without a gradient"):
        (output.log_probs.sum() + output.entropy.sum()).backward()


@pytest.mark.parametrize("phase", [lemo.Phase("dense"), lemo.Phase("backward", keep=1.0)])
def test_dpo_with_an_exact_forward(tmp_path, tokenizer, segmented, phase):
    def make(model, callbacks):
        return DPOTrainer(
            model=model, args=DPOConfig(**trl_setup.arguments(tmp_path, max_length=64)), processing_class=tokenizer,
            train_dataset=trl_setup.preferences(), callbacks=callbacks,
        )  # fmt: skip

    expected, _ = train(make, tokenizer, None)
    for order in ("before", "after"):
        got, _ = train(make, tokenizer, order, [phase])
        assert_same(got, expected)
        assert len(segmented) == 3
        segmented.clear()


# --- trainers that compare log-probabilities --------------------------------------------------------------------------


def reward(completions, **_):
    return [float(len(c)) for c in completions]


def comparing(kind, model, tokenizer, folder, callbacks, **options):
    """A trainer whose loss sets the policy against a reference or against what it sampled."""
    options = trl_setup.arguments(folder, **{"max_steps": 1, **options})
    common = {"model": model, "processing_class": tokenizer, "callbacks": callbacks}
    if kind == "dpo":
        return DPOTrainer(args=DPOConfig(**options), train_dataset=trl_setup.preferences(), **common)
    if kind == "kto":
        return trl.KTOTrainer(args=trl.KTOConfig(**options), train_dataset=trl_setup.preferences(), **common)
    prompts = trl_setup.preferences().select_columns(["prompt"])
    options |= {"num_generations": 2, "max_completion_length": 6}
    config = trl.GRPOConfig if kind == "grpo" else trl.RLOOConfig
    made = trl.GRPOTrainer if kind == "grpo" else trl.RLOOTrainer
    return made(args=config(**options), train_dataset=prompts, reward_funcs=reward, **common)


KINDS = ["dpo", "kto", "grpo", "rloo"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("callback", [True, False])
def test_skipping_is_refused(tmp_path, tokenizer, kind, callback):
    model = trl_setup.adapted(len(tokenizer))
    controller = lemo.apply(model, lemo.LemoConfig(block_size=4, phases=SKIP))
    trainer = comparing(kind, model, tokenizer, tmp_path, [controller.callback()] if callback else [])
    with pytest.raises(ValueError, match=rf'{trainer.__class__.__name__}: mode "skip" is not available.*"backward"'):
        trainer.train()


def test_a_later_phase_is_refused_at_the_start(tmp_path, tokenizer):
    model = trl_setup.adapted(len(tokenizer))
    phases = [lemo.Phase("dense"), *SKIP]
    controller = lemo.apply(model, lemo.LemoConfig(block_size=4, phases=phases))
    trainer = comparing("dpo", model, tokenizer, tmp_path, [controller.callback()])
    with pytest.raises(ValueError, match='"skip" is not available'):
        trainer.train()
    assert controller.report()["mode"] is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", [lemo.Phase("backward", keep=0.5), lemo.Phase("dense")])
def test_exact_forward_passes_compare_like_with_like(tmp_path, tokenizer, kind, phase):
    model = trl_setup.untouched(len(tokenizer))
    controller = lemo.apply(model, lemo.LemoConfig(block_size=4, phases=[phase]))
    trainer = comparing(kind, model, tokenizer, tmp_path, [controller.callback()])
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert len(controller.kept_ratios) == 2
    if kind == "dpo":
        assert log["loss"] == pytest.approx(0.693147, abs=1e-4)
        assert log["rewards/margins"] == pytest.approx(0, abs=1e-4)
    elif kind == "kto":
        assert log["loss"] == pytest.approx(0.5, abs=1e-4)
