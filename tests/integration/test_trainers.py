"""Under transformers' Trainer and in a loop of one's own: what was not run is said, and numbers reach reporters."""

import logging
import weakref
from typing import Any

import lemo
import pytest
import torch
import transformers
from lemo.integration.trainers import running_trainer
from support.models import ATTENTION, LAYERS, VOCAB, base, batch, gradients, lora, tuned

SKIP = [lemo.Phase("skip", keep=0.5, policy="update_norm")]


def settings(**options):
    return lemo.LemoConfig(**{"block_size": 8, "phases": SKIP, **options})


def trainer(model, folder, callbacks, **options):
    torch.manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB, (8, 24)).tolist()]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, save_strategy="no", use_cpu=True,
        disable_tqdm=True, **{"max_steps": 2, "logging_steps": 1, "report_to": [], **options},
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)


# --- reporters --------------------------------------------------------------------------------------------------------


class Reporter(transformers.TrainerCallback):
    """Stands before a user's callbacks, as reporters do."""

    def __init__(self):
        self.logs, self.events = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")


@pytest.mark.parametrize("late", [False, True])
def test_reporters_get_the_numbers(tmp_path, late):
    model = tuned("llama")
    controller = lemo.apply(model, settings())
    before, after = Reporter(), Reporter()
    ours = controller.callback()
    made = trainer(model, tmp_path, [before] if late else [before, ours, after])
    if late:
        made.add_callback(ours)
        made.add_callback(after)
    made.train()
    for reporter in (before, after):
        steps = [log for log in reporter.logs if "loss" in log]
        assert [log["lemo_phase"] for log in steps] == [0, 0]
        assert all(0 < log["lemo_kept"] < 1 for log in steps)
        assert reporter.events == ["begin"]
    assert [entry["lemo_phase"] for entry in made.state.log_history if "loss" in entry] == [0, 0]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (the extra lemo[test] has it)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = tuned("llama")
    controller = lemo.apply(model, settings())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
        trainer(model, tmp_path, [controller.callback()], report_to=["tensorboard"]).train()
    (file,) = (tmp_path / "events").rglob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    scalars = {name: events.Scalars(f"train/lemo_{name}") for name in ("kept", "phase", "loss_tokens", "cost")}
    assert [event.value for event in scalars["phase"]] == [0, 0]
    assert [event.step for event in scalars["loss_tokens"]] == [1, 2]
    assert all(0 < event.value < 2 * 23 for event in scalars["loss_tokens"])
    assert all(0.1 < event.value < 1 for event in scalars["cost"])


@pytest.mark.parametrize("density", [0.25, 1.0])
def test_an_integration_that_transformers_knows(tmp_path, density):
    """Whatever `report_to` names is made by transformers and stands before the callbacks of users."""
    seen = []

    class Integration(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    model = tuned("llama", max_position_embeddings=2048)
    controller = lemo.apply(model, settings(phases=[lemo.Phase("sparse", density=density)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(transformers.integrations.integration_utils.INTEGRATION_TO_CALLBACK, "ours", Integration)
        made = trainer(model, tmp_path, [controller.callback()], report_to=["ours"], max_steps=1)
        made.train_dataset = [{"input_ids": [3] * 1024, "labels": [3] * 1024}] * 2
        made.train()
    (log,) = (log for log in seen if "loss" in log)
    assert log["lemo_kept"] == 1.0 and log["lemo_loss_tokens"] == 2 * 1023
    assert (log["lemo_density"] < 1) == (log["lemo_cost"] < 1) == (density < 1)
    assert 0 < log["lemo_covered"] <= 1


def test_looking_for_the_trainer_holds_nothing():
    """Asking a running function for its variables makes a copy of them, which lives as long as the function runs."""
    space: dict[str, Any] = {
        "__name__": "transformers.trainer",
        "weakref": weakref,
        "look": running_trainer,
        "new": torch.nn.Identity,
    }
    lines = ("found, batch = look(), new()", "look()", "ref = weakref.ref(batch)", "del batch", "return found, ref()")
    loop = "\n ".join(("def loop(self):", *lines))
    exec(loop, space)
    running = transformers.Trainer.__new__(transformers.Trainer)
    assert space["loop"](running) == (running, None)
    assert running_trainer() is None


# --- where lemo did not run -------------------------------------------------------------------------------------------


def messages(caplog):
    return [record.message for record in caplog.records if record.name.startswith("lemo")]


def test_eval_mode_in_a_bare_loop(tmp_path, caplog):
    base("llama").save_pretrained(tmp_path)
    model = lora(transformers.LlamaForCausalLM.from_pretrained(tmp_path), ATTENTION["llama"])
    controller = lemo.apply(model, settings())
    assert model.training and not model.get_base_model().training
    for _ in range(3):
        gradients(model, batch("plain"))
        controller.step()
    said = messages(caplog)
    assert len(said) == 2  # at the first forward pass and the first step, and not again
    assert all("eval mode" in text and "model.train()" in text for text in said)


def test_training_says_nothing(tmp_path, caplog):
    model = tuned("llama")
    controller = lemo.apply(model, settings())
    for _ in range(2):
        gradients(model, batch("plain"))
        controller.step()
        with torch.no_grad():
            model(**batch("plain"))
            model.eval()(**batch("plain"))
        model.train()
    trainer(model, tmp_path, [controller.callback()]).train()
    assert messages(caplog) == []


def test_a_loop_over_another_model(caplog):
    controller = lemo.apply(tuned("llama"), settings())
    gradients(tuned("llama"), batch("plain"))
    controller.step()
    assert "no forward pass with gradients reached this model" in messages(caplog)[0]


def test_the_callback_of_another_model_is_an_error(tmp_path):
    other = lemo.apply(tuned("llama"), settings())
    model = tuned("llama")
    lemo.apply(model, settings())
    with pytest.raises(ValueError, match=r"trains another LlamaForCausalLM .* lemo\.apply\(trainer\.model\)"):
        trainer(model, tmp_path, [other.callback()]).train()


def test_training_on_after_remove(tmp_path, caplog):
    model = tuned("llama")
    controller = lemo.apply(model, settings())
    made = trainer(model, tmp_path, [controller.callback()])
    made.train()
    lemo.remove(model)
    caplog.clear()
    made.train()
    assert ["lemo was removed" in text for text in messages(caplog)] == [True]
    assert "lemo_kept" not in made.state.log_history[-2]


def test_mixed_precision_training_twice(tmp_path):
    """Accelerate wraps forward again at every call of train()."""
    model = base("llama").train()
    for _ in range(2):
        controller = lemo.apply(model, settings())
        trainer(model, tmp_path, [controller.callback()], bf16=True).train()
        assert max(controller.kept_ratios) < 1
        lemo.remove(model)
    assert model.eval()(**batch("plain")).logits.shape == (3, 37, VOCAB)


# --- hooks on the embedding -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LAYERS)
def test_hooks_on_the_embedding_see_the_batch(family):
    model, inputs = tuned(family), batch("right")
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda _, i, o: shapes.append((*i[0].shape, *o.shape)))
    lemo.apply(model, settings())
    gradients(model, inputs)
    assert shapes == [(3, 37, 3, 37, 32)]


def test_neftune_noise_has_the_size_of_plain_training(tmp_path):
    """Uniform up to alpha / sqrt(length of a row * width)."""
    model = tuned("llama")
    controller = lemo.apply(model, settings())
    noise = []

    def watch(module, inputs, output):
        noise.append((output - torch.nn.functional.embedding(inputs[0], module.weight)).abs().max().item())

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):  # NEFTune's own hook is there by now
            model.get_input_embeddings().register_forward_hook(watch)

    trainer(model, tmp_path, [controller.callback(), Watch()], neftune_noise_alpha=5.0).train()
    limit = 5.0 / (24 * 32) ** 0.5
    assert len(noise) == 2
    assert all(0.95 * limit < value <= 1.0001 * limit for value in noise)


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("first", ["apply", "compile", "run", "compile inside PEFT"])
def test_torch_compile(first):
    inputs = batch("right")
    expected = gradients(tuned("llama"), inputs)
    if first == "compile inside PEFT":
        inner = compiled(base("llama"))
        model = outer = lora(inner, ATTENTION["llama"]).train()
    else:
        model = tuned("llama")
        outer = model if first == "apply" else compiled(model)
    if first == "run":
        outer(**inputs).loss.backward()
    controller = lemo.apply(outer, settings(phases=[lemo.Phase("dense")]))
    if first == "apply":
        outer = compiled(model)
    loss, got = gradients(outer, inputs)
    torch.testing.assert_close(loss, expected[0])
    norms = [sorted(float(g.norm()) for g in grads.values()) for grads in (got, expected[1])]
    torch.testing.assert_close(torch.tensor(norms[0]), torch.tensor(norms[1]), rtol=1e-4, atol=1e-6)
    assert len(controller.kept_ratios) == 3
    with torch.no_grad():
        assert outer(**inputs).logits is not None
    lemo.remove(outer)
    assert outer(**inputs).logits is not None


def test_trainer_compiles(tmp_path):
    model = tuned("llama")
    controller = lemo.apply(model, settings())
    trainer(model, tmp_path, [controller.callback()], torch_compile=True, torch_compile_backend="eager").train()
    assert max(controller.kept_ratios) < 1


# --- passes that are compared -----------------------------------------------------------------------------------------


def test_a_reference_pass_keeps_what_the_training_pass_kept(caplog):
    model = tuned("llama")
    controller = lemo.apply(model, settings())
    first, second = ({k: v for k, v in batch(kind).items() if k != "labels"} for kind in ("right", "plain"))
    outputs = [model(**inputs).logits for inputs in (first, second)]
    ratios = controller.kept_ratios
    with controller.reference_pass():
        for inputs, expected in zip((first, second), outputs, strict=True):
            mask = inputs.get("attention_mask", torch.ones(3, 37))[..., None].bool()
            assert torch.equal(model(**inputs).logits * mask, expected * mask)
            assert torch.equal(model.eval()(**inputs).logits * mask, expected * mask)
            model.train()
        with model.disable_adapter():  # the lists stay, although this pass would choose others
            other = model(**second).logits
    assert not other.requires_grad
    assert not torch.equal(other, outputs[1])
    assert controller.kept_ratios is ratios
    assert controller.micro_batch == 2
    assert not any("reference_pass" in text for text in messages(caplog))


def test_a_reference_pass_over_embeddings():
    """They are compared by a few channels, and not kept."""
    model = tuned("llama")
    controller = lemo.apply(model, settings())
    given = model.get_input_embeddings()(batch("plain")["input_ids"]).detach()
    expected = model(inputs_embeds=given).logits
    watched = weakref.ref(given)
    with controller.reference_pass():
        assert torch.equal(model(inputs_embeds=given.clone()).logits, expected)
        with pytest.raises(RuntimeError, match="run the training pass first"):
            model(inputs_embeds=given.roll(1, 1))
    del given, expected
    assert watched() is None


def test_a_preference_loss_begins_at_ln_2():
    """Adapters that change nothing yet: policy and reference agree, token by token."""
    model = tuned("llama")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.zero_()
    controller = lemo.apply(model, settings())
    inputs = {k: v for k, v in batch("plain").items() if k != "labels"}
    policy = model(**inputs).logits.log_softmax(-1)
    with controller.reference_pass(), model.disable_adapter():
        reference = model(**inputs).logits.log_softmax(-1)
    margins = (policy - reference).sum((1, 2))
    torch.testing.assert_close(-torch.nn.functional.logsigmoid(margins), torch.full((3,), 2.0).log())


def test_a_reference_pass_without_its_training_pass_is_an_error():
    model = tuned("llama")
    controller = lemo.apply(model, settings())
    inputs = {"input_ids": batch("plain")["input_ids"]}
    with pytest.raises(RuntimeError, match="run the training pass first"), controller.reference_pass():
        model(**inputs)
    model(**inputs)
    with pytest.raises(RuntimeError, match="run the training pass first"), controller.reference_pass():
        model(input_ids=inputs["input_ids"] + 1)
    controller.step()
    with pytest.raises(RuntimeError, match="run the training pass first"), controller.reference_pass():
        model(**inputs)


@pytest.mark.parametrize("mode", ["dense", "backward"])
def test_a_reference_pass_of_an_exact_phase_is_transformers_own(mode):
    model, inputs = tuned("llama"), {"input_ids": batch("plain")["input_ids"]}
    with torch.no_grad():
        expected = model(**inputs).logits
    controller = lemo.apply(model, settings(phases=[lemo.Phase(mode)]))
    with controller.reference_pass():
        assert torch.equal(model(**inputs).logits, expected)


def test_a_dense_pass_beside_skipped_ones_is_said(caplog):
    model, inputs = tuned("llama"), {"input_ids": batch("plain")["input_ids"]}
    lemo.apply(model, settings())
    model(**inputs)
    for _ in range(2):
        with torch.no_grad(), model.disable_adapter():
            model(**inputs)
    assert sum("controller.reference_pass()" in text for text in messages(caplog)) == 1


@pytest.fixture(autouse=True)
def all_messages(caplog):
    caplog.set_level(logging.WARNING)
