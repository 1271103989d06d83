"""Losses that are transformers': over an accumulation window, and in evaluation, where logits are never whole."""

import copy
from typing import Any

import lemo
import lemo.integration.evaluation
import pytest
import torch
import transformers
from lemo.engine.output import MissingLogitsError
from support.models import FAMILIES, VOCAB, base, batch, lora, tuned
from torch.utils._python_dispatch import TorchDispatchMode

DENSE = lemo.LemoConfig(block_size=8, phases=[lemo.Phase("dense")])
SKIP = lemo.LemoConfig(block_size=8, phases=[lemo.Phase("skip", keep=0.5, policy="update_norm")])


def rows(count: int) -> list[dict[str, list[int]]]:
    """Of unequal length and with unequal numbers of labels."""
    torch.manual_seed(4)
    made = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (12 + 5 * i % 17,)).tolist()
        made.append({"input_ids": ids, "labels": [-100 if j < i % 9 else t for j, t in enumerate(ids)]})
    return made


def collate(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(f["input_ids"]) for f in features)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([f[name] + [value] * (longest - len(f[name])) for f in features])

    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (longest - len(f["input_ids"])) for f in features])
    return {"input_ids": padded("input_ids", 0), "labels": padded("labels", -100), "attention_mask": mask}


def trainer(model: Any, folder: Any, kind: Any = transformers.Trainer, **options: Any) -> Any:
    names = ("callbacks", "compute_metrics", "compute_loss_func")
    given = {name: options.pop(name) for name in names if name in options}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), save_strategy="no", use_cpu=True, disable_tqdm=True, report_to=[], seed=0,
        **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, **options},
    )  # fmt: skip
    return kind(
        model=model, args=arguments, train_dataset=rows(12), eval_dataset=rows(7), data_collator=collate, **given
    )


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        for t in output if isinstance(output, (tuple, list)) else (output,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return output


# --- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_accumulation_scales_as_transformers_does(tmp_path: Any, steps: int) -> None:
    """Batches of a window have unequal numbers of labels: losses and weights after training are the same."""
    results = []
    for ours in (False, True):
        model = tuned("llama")
        callbacks = [lemo.apply(model, DENSE).callback()] if ours else []
        made = trainer(
            model, tmp_path, callbacks=callbacks, gradient_accumulation_steps=steps, max_steps=3, logging_steps=1,
            learning_rate=0.05, optim="sgd",
        )  # fmt: skip
        assert made.model_accepts_loss_kwargs  # so that it hands num_items_in_batch on
        made.train()
        logs = [{k: log[k] for k in ("loss", "grad_norm")} for log in made.state.log_history if "loss" in log]
        results.append((logs, [p.detach().clone() for p in model.parameters() if p.requires_grad]))
    (theirs, expected), (logs, got) = results
    assert len(logs) == 3
    for ours_, theirs_ in zip(logs, theirs, strict=True):
        assert ours_ == pytest.approx(theirs_, rel=1e-4)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- evaluation -------------------------------------------------------------------------------------------------------


@pytest.fixture
def slices(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(lemo.integration.evaluation, "SLICE_TOKENS", 16)
    return 16


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_under_the_trainer(tmp_path: Any, family: str, slices: int) -> None:
    """The loss of the dense model, although training leaves tokens out; logits exist for a few tokens at a time."""
    model = tuned(family, vocab_size=2000)
    expected, whole = {}, Largest()
    with whole:
        expected = trainer(model, tmp_path).evaluate()
    assert whole.elements == 4 * 27 * 2000  # batches of four rows, the longest of 27 tokens
    controller = lemo.apply(model, SKIP)
    made, ours = trainer(model, tmp_path, callbacks=[controller.callback()], max_steps=1, learning_rate=0.0), Largest()
    made.train()
    with ours:
        got = made.evaluate()
    assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    largest = max(p.numel() for p in model.parameters())
    assert ours.elements == max(slices * 2000, largest) < whole.elements


def test_metrics_get_their_logits(tmp_path: Any) -> None:
    model, seen = tuned("llama"), []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {}

    lemo.apply(model, DENSE)
    trainer(model, tmp_path, compute_metrics=metrics).evaluate()
    assert seen == [(7, 27, VOCAB)]


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("how", ["smoothing", "function", "class"])
def test_a_loss_of_someone_elses_reads_logits(tmp_path: Any, how: str) -> None:
    def options() -> dict[str, Any]:
        if how == "smoothing":
            return {"label_smoothing_factor": 0.1}
        return {"kind": OwnLoss} if how == "class" else {"compute_loss_func": lambda out, *_, **__: out.logits.mean()}

    model = tuned("llama")
    expected = trainer(model, tmp_path, **options()).evaluate()["eval_loss"]
    lemo.apply(model, DENSE)
    assert trainer(model, tmp_path, **options()).evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "right", "left", "packed"])
def test_in_a_loop_of_ones_own(kind: str, slices: int) -> None:
    model = lora(base("llama"), ["q_proj", "lm_head"]).eval()
    model.get_base_model().lm_head.register_forward_hook(lambda m, args, y: 0.5 * y)  # a head of someone's own
    inputs = batch(kind)
    items = torch.tensor(31)
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    variants = [inputs, {**inputs, "num_items_in_batch": items}, {**inputs, "shift_labels": shifted.roll(2)}]
    controller = lemo.apply(model, DENSE)
    for given in variants:
        with torch.no_grad():
            expected = model(**given)
            with controller.loss_only():
                got = model(**given)
        torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
        assert expected.logits.shape == (*inputs["input_ids"].shape, VOCAB)
        with pytest.raises(MissingLogitsError, match=r"leave controller\.loss_only"):
            got.logits.shape  # noqa: B018
    with torch.no_grad(), controller.loss_only():
        assert model(**variants[0], return_dict=False)[0] == model(**variants[0]).loss
        assert model(input_ids=inputs["input_ids"]).logits.shape[-1] == VOCAB  # nothing to compute a loss of
        model.train()
    loss = model(**inputs).loss
    assert loss.requires_grad  # training is what it was


def test_a_failed_pass_leaves_nothing_behind(slices: int) -> None:
    model = tuned("llama").eval()
    controller, inputs = lemo.apply(model, DENSE), batch("plain")
    with torch.no_grad(), controller.loss_only():
        expected = model(**inputs).loss
        with pytest.raises((IndexError, RuntimeError)):
            model(**{**inputs, "input_ids": inputs["input_ids"] + 1000})
        assert model(**inputs).loss == expected
        assert copy.deepcopy(model)(**inputs).logits is not None
    assert model(**inputs).logits.shape[-1] == VOCAB
