"""Logits of a training forward pass: absent with an error that says so, or there on demand with the same loss."""

import copy
import dataclasses
import json
import pickle

import lemo
import pytest
import torch
import transformers
from accelerate.utils import convert_outputs_to_fp32
from lemo.engine.output import MissingLogitsError
from support.models import FAMILIES, LAYERS, LINEARS, VOCAB, assert_close, base, batch, gradients, lora, tuned
from torch.utils import _pytree as pytree

DENSE = lemo.Phase("dense")
SKIP = lemo.Phase("skip", keep=0.5, policy="random")


def settings(phase=DENSE, **options):
    return lemo.LemoConfig(block_size=8, phases=[phase], **options)


@pytest.fixture
def output():
    model = tuned("llama")
    lemo.apply(model, settings())
    return model(**batch("plain"))


USES = {
    "attribute": lambda logits: logits.shape,
    "method": lambda logits: logits.argmax(-1),
    "index": lambda logits: logits[..., :-1, :],
    "length": lambda logits: len(logits),
    "loop": lambda logits: list(logits),
    "truth": lambda logits: bool(logits),
    "arithmetic": lambda logits: 2 * logits,
    "comparison": lambda logits: logits > 0,
    "torch": lambda logits: torch.softmax(logits, -1),
    "functional": lambda logits: torch.nn.functional.cross_entropy(logits, torch.zeros(3, dtype=torch.long)),
    "tensor operand": lambda logits: torch.ones(3) + logits,
}


@pytest.mark.parametrize("use", USES)
def test_using_the_logits_that_are_not_there_says_so(output, use):
    with pytest.raises(MissingLogitsError, match=r"return_logits=True.*without labels"):
        USES[use](output.logits)


def test_asking_for_them_by_name_says_so(output):
    with pytest.raises(KeyError, match="return_logits=True"):
        output["logits"]
    assert "return_logits=True" in repr(output.logits)
    assert not hasattr(output.logits, "shape")


def test_libraries_see_a_loss_alone(output):
    loss = output.loss
    assert (list(output), output.to_tuple(), output.get("logits")) == (["loss"], (loss,), None)
    assert output[0] is output["loss"] is loss and "logits" not in output
    leaves, spec = pytree.tree_flatten(output)  # DistributedDataParallel
    assert len(leaves) == 1 and leaves[0] is loss
    detached = dataclasses.replace(output, loss=loss.detach())  # FullyShardedDataParallel
    copies = [
        pytree.tree_unflatten(leaves, spec),
        convert_outputs_to_fp32(lambda: output)(),  # mixed precision under accelerate
        type(output)([(key, torch.stack([output[key]])) for key in output]),  # DataParallel
        detached,
        copy.deepcopy(detached),
        pickle.loads(pickle.dumps(detached)),
    ]
    for each in copies:
        assert list(each) == ["loss"] and each.logits is output.logits


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (name, kind)
        for name, tiny in ((name, FAMILIES[name]) for name in LAYERS)
        for kind in ("plain", "right", "left", *(["packed"] if tiny.separates else []))
    ],
)
def test_logits_on_demand(family, kind):
    model, inputs = tuned(family), batch(kind)
    expected = model(**inputs)
    _, plain = gradients(model, inputs)
    lemo.apply(model, settings(return_logits=True))
    output = model(**inputs)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    torch.testing.assert_close(output.logits[mask], expected.logits[mask], rtol=1e-5, atol=1e-5)
    assert output.logits.shape == expected.logits.shape and output.logits.dtype == expected.logits.dtype
    loss, got = gradients(model, inputs)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    assert_close(got, plain)
    model.zero_grad()  # and a loss of one's own from them
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:][mask]
    torch.nn.functional.cross_entropy(model(**inputs).logits[mask], targets).backward()
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, plain)


@pytest.mark.parametrize("items", [None, 300])
@pytest.mark.parametrize("phase", [SKIP, lemo.Phase("skip", keep=0.0), lemo.Phase("backward", policy="random")])
@pytest.mark.parametrize("kind", ["left", "packed"])
def test_the_loss_is_the_same_with_logits(items, phase, kind):
    model, inputs = tuned("llama"), batch(kind)
    if items is not None:
        inputs["num_items_in_batch"] = items
    results = []
    for return_logits in (False, True):
        controller = lemo.apply(model, settings(phase, return_logits=return_logits))
        results.append((*gradients(model, inputs), controller.report()["loss_tokens"]))
        lemo.remove(model)
    (loss, got, count), (other, whole, tokens) = results
    torch.testing.assert_close(loss, other)
    assert count == tokens
    assert_close(got, whole)


def test_without_a_label_there_is_no_gradient_with_logits_either():
    model, inputs = tuned("llama"), batch("right")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    lemo.apply(model, settings(return_logits=True))
    loss, got = gradients(model, {**inputs, "num_items_in_batch": 0}, torch.tensor(1.0) / 0)
    assert loss == 0 and got and all(g.count_nonzero() == 0 for g in got.values())


@pytest.mark.parametrize("kind", ["dora", "hook"])
def test_a_head_of_another_kind_has_the_same_loss_and_logits(kind):
    """The segmented loss does not cover it: its logits are whole, and there."""
    if kind == "dora":
        model = lora(base("llama"), [*LINEARS["llama"], "lm_head"], use_dora=True).train()
    else:
        model = tuned("llama")
        shapes = []
        model.get_output_embeddings().register_forward_hook(
            lambda _module, _inputs, output: shapes.append(output.shape)
        )
    inputs = batch("left")
    inputs["num_items_in_batch"] = torch.tensor(100)
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    assert model(**inputs).logits.shape == (3, 37, VOCAB)
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
    if kind == "hook":
        assert set(shapes) == {(3, 37, VOCAB)}


def test_a_hooked_head_leaves_out_tokens_that_took_part_in_no_layer():
    model, inputs = tuned("llama"), batch("right")
    results = []
    for hooked in (False, True):
        if hooked:
            model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, output: None)
        controller = lemo.apply(model, settings(SKIP))
        results.append((*gradients(model, inputs), controller.report()["loss_tokens"]))
        lemo.remove(model)
    (loss, got, count), (other, whole, tokens) = results
    torch.testing.assert_close(loss, other)
    assert count == tokens
    assert_close(got, whole)


def test_a_trainer_whose_loss_needs_logits(tmp_path):
    """A `compute_loss` that passes labels and reads logits: as in transformers with the option, an error without."""

    class Penalised(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.loss + 1e-3 * outputs.logits.logsumexp(-1).square().mean()
            return (loss, outputs) if return_outputs else loss

    torch.manual_seed(0)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB, (4, 24))]

    def run(config):
        model = tuned("llama")
        callbacks = [] if config is None else [lemo.apply(model, config).callback()]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, logging_steps=1, learning_rate=1e-3,
        )  # fmt: skip
        trainer = Penalised(model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.evaluate()[
            "eval_loss"
        ]

    (losses, held_out), (expected, plain) = run(settings(return_logits=True)), run(None)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert held_out == pytest.approx(plain, rel=1e-4)
    with pytest.raises(MissingLogitsError, match="return_logits=True"):
        run(settings())


@pytest.mark.parametrize(("phase", "said"), [(SKIP, 1), (DENSE, 0), (lemo.Phase("backward", policy="random"), 0)])
def test_a_loss_of_others_over_skipped_tokens_is_said(tmp_path, caplog, phase, said):
    """Label smoothing takes the labels out of the batch: lemo sees none, and the loss is over every token."""
    model = tuned("llama")
    controller = lemo.apply(model, settings(phase))
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCAB, (4, 24))]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, label_smoothing_factor=0.1,
    )  # fmt: skip
    callbacks = [controller.callback()]
    transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train()
    notes = [record.message for record in caplog.records if "label smoothing" in record.message]
    assert len(notes) == said
    assert controller.report()["loss_tokens"] is None


def test_the_option_survives_json_and_is_checked():
    config = settings(return_logits=True)
    again = lemo.LemoConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.return_logits is True
    with pytest.raises(ValueError, match=r"return_logits.*True or False"):
        settings(return_logits="yes")


def test_whole_logits_are_in_the_estimate():
    shape = transformers.LlamaConfig(vocab_size=32000)
    plain, whole = (
        lemo.estimate(shape, settings(return_logits=wanted), 4096, element=2)["peak"] for wanted in (False, True)
    )
    assert whole - plain == 2 * (2 + 4) * 4096 * 32000
