"""Applying and removing, what stays untouched, the Trainer, and errors that say what to do."""

from types import SimpleNamespace
from typing import Any, cast

import lemo
import lemo.engine.config
import lemo.engine.policies
import pytest
import torch
import transformers
from lemo.engine.layout import Blocks
from lemo.engine.policies import StepContext, make_policy, mix_seed
from support.models import ATTENTION, LAYERS, VOCAB, assert_close, base, batch, gradients, lora, tuned

ONE = [lemo.Phase("skip", keep=0.5, policy="random")]


def settings(**options):
    return lemo.LemoConfig(**{"block_size": 8, "phases": ONE, **options})


@pytest.mark.parametrize("family", LAYERS)
def test_remove_restores(family):
    model, inputs = tuned(family), batch("right")
    inner = model.get_base_model()
    decoder = inner.get_decoder()
    before = [dict(m.__dict__) for m in (inner, decoder)]
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    assert not torch.equal(gradients(model, inputs)[0], loss)
    lemo.remove(model)
    for module, attributes in zip((inner, decoder), before, strict=True):
        assert module.__dict__.keys() == attributes.keys()
    again, got = gradients(model, inputs)
    assert torch.equal(again, loss)
    assert all(torch.equal(got[name], g) for name, g in expected.items())


@pytest.mark.parametrize("family", LAYERS)
def test_evaluation_and_generation_are_untouched(family):
    model, inputs = tuned(family).eval(), batch("plain")
    expected = model(**inputs)
    ids = inputs["input_ids"][:1, :5]
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    lemo.apply(model, settings())
    got = model(**inputs)
    assert torch.equal(got.loss, expected.loss)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected.logits)
    assert "logits" not in model(**inputs)


def test_before_and_after_peft():
    wrapped = lora(base("llama"), ATTENTION["llama"]).train()
    lemo.apply(wrapped, settings())
    plain = base("llama")
    lemo.apply(plain, settings())
    late = lora(plain, ATTENTION["llama"]).train()
    inputs = batch("right")
    (loss, expected), (other, got) = gradients(wrapped, inputs), gradients(late, inputs)
    assert torch.equal(loss, other)
    assert_close(got, expected, 1e-7)
    lemo.remove(late)
    assert "_lemo" not in plain.__dict__


def test_disabled_adapters_and_merging():
    model, inputs = tuned("llama"), batch("plain")
    with model.disable_adapter():
        expected = model(**inputs).loss.detach()
    lemo.apply(model, lemo.LemoConfig(block_size=8, phases=[lemo.Phase("dense")]))
    with model.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss.detach(), expected, rtol=1e-5, atol=0)


def test_gradient_checkpointing_means_full_recomputation():
    model, inputs = tuned("llama"), batch("plain")
    controller = lemo.apply(model, settings())
    assert controller.savings.recompute() == "none"
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert controller.savings.recompute() == "full"
    gradients(model, inputs)


def test_schedule():
    schedule = lemo.Schedule(
        [lemo.Phase("skip", share=3), lemo.Phase("backward", share=1), lemo.Phase("dense", share=1)]
    )
    modes = [schedule.phase(step, 10).mode for step in range(12)]
    assert modes == ["skip"] * 6 + ["backward"] * 2 + ["dense"] * 4
    assert lemo.LemoConfig().phases[-1].mode == "dense"
    with pytest.raises(RuntimeError, match=r"callback.*total_steps"):
        schedule.phase(0, None)


def test_bare_loop_follows_the_schedule():
    model = tuned("llama")
    phases = [*ONE, lemo.Phase("dense")]
    controller = lemo.apply(model, settings(phases=phases))
    controller.total_steps = 4
    kept = []
    for _ in range(4):
        gradients(model, batch("plain"))
        kept.append(controller.kept_ratios)
        controller.step()
    assert all(max(k) < 1 for k in kept[:2])
    assert kept[2:] == [[1.0] * 3] * 2
    assert controller.report()["mode"] == "dense"


def test_trainer(tmp_path):
    model = tuned("llama")
    controller = lemo.apply(model, settings(phases=[*ONE, lemo.Phase("dense")]))
    torch.manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB, (16, 24)).tolist()]
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((controller.report()["mode"], controller.micro_batch))

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=[controller.callback(), Watch()],
    )
    trainer.train()
    assert seen == [("skip", 2)] * 2 + [("dense", 2)] * 2
    logs = [entry for entry in trainer.state.log_history if "lemo_kept" in entry]
    assert [entry["lemo_phase"] for entry in logs] == [0, 0, 1, 1]
    loss = trainer.evaluate()["eval_loss"]
    lemo.remove(model)
    assert trainer.evaluate()["eval_loss"] == loss


@pytest.mark.parametrize("options", [{}, {"carry": True}, {"dense_layers": 1}, {"dense_layers": 1, "carry": True}])
def test_update_norm(options):
    model = tuned("llama", layers=4)
    phase = lemo.Phase("skip", keep=0.5, policy="update_norm", policy_options=options)
    controller = lemo.apply(model, settings(phases=[phase]))
    policy = controller._policies[0]
    chosen = []
    original = policy.choose
    policy.choose = lambda i, x: chosen.append(original(i, x)) or chosen[-1]
    gradients(model, batch("plain"))
    lists = [attention.blocks.tolist() for attention, _ in chosen]
    first = options.get("dense_layers", 0)
    assert controller.kept_ratios[:first] == [1.0] * first
    assert max(controller.kept_ratios[first:]) < 1
    if not options.get("carry"):  # who is out stays out
        assert all(later == lists[first] for later in lists[first:])


@pytest.mark.parametrize("policy", ["random", "sampled", "exact", "update_norm"])
def test_policies_draw_from_the_seed(policy):
    def kept(seed):
        model = tuned("llama")
        phase = lemo.Phase("skip", keep=0.5, policy=policy)
        controller = lemo.apply(model, settings(phases=[phase], seed=seed, always_first=0))
        return gradients(model, batch("plain"))[0], controller.kept_ratios

    assert kept(1) == kept(1)
    assert (kept(1)[0] == kept(2)[0]) == (policy == "exact")
    assert kept(1)[1] == [pytest.approx(9 / 15)] * 3  # floor(0.5 * 5 + 0.5) of 5 blocks in each of 3 rows


def test_random_shared_is_one_draw_for_all_layers():
    policy = make_policy("random", {"shared": True})
    policy.context = cast(StepContext, SimpleNamespace(seed=9))
    assert policy.seed(0) == policy.seed(5)
    assert make_policy("random", {}).__class__ is policy.__class__
    assert len({mix_seed(0, step, layer) for step in range(50) for layer in range(50)}) == 2500


@pytest.mark.parametrize(
    ("phase", "calibration", "expected"),
    [
        (lemo.Phase("skip"), None, ("update_norm", {})),
        (lemo.Phase("skip"), "folder", ("sampled", {"shared": True})),
        (lemo.Phase("skip", policy_options={"floor": 0.5}), "folder", ("sampled", {"shared": True, "floor": 0.5})),
        (lemo.Phase("skip", select="threshold"), "folder", ("predictors", {})),
        (lemo.Phase("skip", mlp_keep=0.25), "folder", ("predictors", {})),
        (lemo.Phase("skip", policy="predictors"), "folder", ("predictors", {})),
        (lemo.Phase("backward"), "folder", ("random", {})),
        (lemo.Phase("backward", weighted=True), None, ("random", {})),
    ],
)
def test_default_policies(phase, calibration, expected):
    assert lemo.LemoConfig(phases=[phase], calibration=calibration).policy(phase) == expected


@pytest.mark.parametrize("shared", [True, False])
def test_sampled_shared_keeps_the_first_layers_draw(shared):
    blocks = Blocks.from_lengths([64 * 40], 64, "cpu")
    policy = make_policy("sampled", {"source": "update_norm", "shared": shared})
    policy.begin(StepContext(blocks, lemo.Phase("skip", keep=0.5), 9, 0, 0, lambda *_: None, lambda _: 1.0))
    x = torch.zeros(blocks.num_tokens, 4)
    first, _ = policy.choose(0, x)
    policy.observe(0, torch.rand(first.num_rows, generator=torch.Generator().manual_seed(1)), first)
    second, _ = policy.choose(1, x)
    assert first.num_blocks == second.num_blocks == 20
    assert torch.equal(first.blocks, second.blocks) == shared
    assert (first is second) == shared  # so that layers share its tensors


def test_config_survives_json():
    import json

    phases = [lemo.Phase("backward", policy="random", policy_options={"shared": True})]
    config = settings(phases=phases, layers=range(1, 3), keep_labelled=False, deterministic=True, return_logits=True)
    again = lemo.LemoConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.layers == (1, 2)
    assert again.phases[0].policy_options == {"shared": True}


def test_the_names_of_policies_are_written_down_once():
    """A policy that is added to one of the two lists and not to the other cannot be chosen."""
    assert set(lemo.engine.policies._CLASSES) == set(lemo.engine.config.POLICIES)
    for name in lemo.engine.config.POLICIES:
        predictors = SimpleNamespace() if name == "predictors" else None
        assert make_policy(name, {}, cast(Any, predictors)).name == name
