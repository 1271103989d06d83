"""What the loss of a training step is over, and what it is divided by."""

import lemo
import pytest
import torch
import transformers
from models import LINEARS, VOCAB, assert_close, base, batch, gradients, lora, tuned

MODES = [
    lemo.Phase("dense"),
    lemo.Phase("skip", keep=0.5, policy="random"),
    lemo.Phase("backward", keep=0.5, policy="random", weighted=True),
]


def settings(phase=MODES[0], **options):
    return lemo.LemoConfig(block_size=8, phases=[phase], **options)


# --- a batch without a label ---


@pytest.mark.parametrize("phase", MODES, ids=lambda phase: phase.mode)
@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)], ids=["mean", "none", "none-tensor"])
@pytest.mark.parametrize("head", [False, True], ids=["frozen", "head"])
def test_no_label_means_zero_gradients(phase, items, head):
    model = lora(base("llama"), [*LINEARS["llama"], *(["lm_head"] if head else [])]).train()
    inputs = batch("right")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    if items is not None:
        inputs["num_items_in_batch"] = items
    _, plain = gradients(model, inputs)
    lemo.apply(model, settings(phase))
    for scale in (1.0, torch.tensor(1.0) / 0):  # a loss that divides by the labels itself
        loss, got = gradients(model, inputs, scale)
        assert loss == 0
        assert got.keys() == plain.keys()
        assert all(g.count_nonzero() == 0 for g in (*got.values(), *plain.values()))


def test_a_real_fault_still_shows():
    model, inputs = tuned("llama"), batch("plain")
    lemo.apply(model, settings())
    loss, got = gradients(model, {**inputs, "num_items_in_batch": 0})  # labels there are, but none counted
    assert loss.isinf() and not any(g.isfinite().all() for g in got.values())
    with torch.no_grad():
        model.get_base_model().model.embed_tokens.weight.fill_(float("nan"))
    for labels in (inputs["labels"], torch.full_like(inputs["labels"], -100)):
        _, got = gradients(model, {**inputs, "labels": labels})
        assert any(g.isnan().any() for g in got.values())


def test_a_batch_without_labels_does_not_end_a_run(tmp_path):
    torch.manual_seed(0)
    data = [{"input_ids": ids, "labels": ids.clone()} for ids in torch.randint(3, VOCAB, (4, 24))]
    data[1]["labels"][:] = -100

    def adapter(use):
        model = tuned("llama")
        callbacks = [lemo.apply(model, settings()).callback()] if use else []
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=1, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
        trainer.train()
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    assert_close(adapter(True), adapter(False), 1e-4)
