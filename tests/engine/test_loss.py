"""What the loss of a training step is over, and what it is divided by."""

import dataclasses

import lemo
import lemo.engine.stack
import pytest
import torch
import transformers
from lemo.engine.layout import Blocks, Kept
from lemo.engine.participation import Participation
from support.models import LAYERS, LINEARS, VOCAB, assert_close, base, batch, gradients, lora, tuned

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


# --- padding and the number of labels ---


def padded(side, labels_at_padding=False):
    """The same four documents, padded on one side."""
    generator = torch.Generator().manual_seed(3)
    lengths, width = (8, 9, 10, 30), 30
    ids, mask = torch.full((4, width), 2), torch.zeros(4, width, dtype=torch.long)
    for i, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, at], mask[i, at] = torch.randint(3, VOCAB, (n,), generator=generator), 1
    labels = ids if labels_at_padding else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def items(*batches):
    """As the Trainer counts them."""
    return sum((b["labels"][:, 1:] != -100).sum() for b in batches)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("mean", [True, False])
def test_padding_on_either_side_is_one_loss(family, mean):
    model, right, left = tuned(family), padded("right"), padded("left")
    if not mean:
        right["num_items_in_batch"], left["num_items_in_batch"] = items(right), items(left)
        assert items(left) == items(right) + 3  # the first tokens of padded rows, which padding would predict
    loss, expected = gradients(model, right)  # right, where nothing is predicted from padding
    lemo.apply(model, settings())
    for inputs in (right, left):
        ours, got = gradients(model, inputs)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
        assert_close(got, expected)


def test_a_window_of_batches_is_a_mean():
    """Each batch weighs what its labels are of the window's; the losses add up to a mean whatever is left out."""
    model = tuned("llama")
    lemo.apply(model, settings())
    batches = [padded("left"), batch("plain"), padded("right", labels_at_padding=True)]
    count = items(*batches)
    means = [gradients(model, b)[0] for b in batches]
    got = sum(gradients(model, {**b, "num_items_in_batch": count})[0] for b in batches)
    torch.testing.assert_close(got, sum(m * items(b) for m, b in zip(means, batches, strict=True)) / count)


def test_labels_at_padding_are_predicted_by_tokens_only():
    """A label at the padding behind a document is one of its last token, as in transformers; others are nobody's."""
    model, inputs = tuned("llama"), padded("right", labels_at_padding=True)
    predicted = inputs["labels"].masked_fill(inputs["attention_mask"].roll(1, 1) == 0, -100)
    loss, expected = gradients(model, {**inputs, "labels": predicted})
    lemo.apply(model, settings())
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("given", ["labels", "shift_labels"])
def test_packed_documents_count_as_in_transformers(given):
    model, inputs = tuned("llama"), batch("packed")
    inputs["num_items_in_batch"] = items(inputs)
    if given == "shift_labels":
        inputs["shift_labels"] = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
        inputs["shift_labels"][0, 16] = -100  # the first document does not predict the second
        inputs["num_items_in_batch"] = (inputs["shift_labels"] != -100).sum()
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


# --- tokens that took part in no layer ---


def dense_over(model, inputs, kept):
    """Plain loss and gradients where every layer kept the same rows: the other tokens are simply not there."""
    labels = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)
    rows = kept.rows.long()
    part = {"input_ids": inputs["input_ids"].reshape(1, -1)[:, rows], "shift_labels": labels[None, rows]}
    document = rows // inputs["input_ids"].shape[1]
    mask = (document[:, None] == document[None]).tril()[None, None]
    part["attention_mask"] = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    part["position_ids"] = (rows % inputs["input_ids"].shape[1])[None]
    return gradients(model, {**part, "labels": part["shift_labels"]})


def shared(model, policy="random", **options):
    """lemo applied with one draw for all layers, and the lists it chose."""
    phase = lemo.Phase(
        "skip", keep=0.5, policy=policy, policy_options={} if policy == "update_norm" else {"shared": True}
    )
    controller = lemo.apply(model, settings(phase, **options))
    lists = []
    original = controller._policies[0].choose
    controller._policies[0].choose = lambda i, x: lists.append(original(i, x)) or lists[-1]
    return controller, lists


@pytest.mark.parametrize("policy", ["random", "update_norm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_is_over_tokens_that_took_part(policy, checkpointing):
    model, inputs = tuned("llama"), batch("plain")
    controller, lists = shared(model, policy)
    if checkpointing:  # the embedding's output then requires a gradient, but nothing before the layers trains
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    loss, got = gradients(model, inputs)
    model.gradient_checkpointing_disable()
    lemo.remove(model)
    expected_loss, expected = dense_over(model, inputs, lists[0][0])
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
    assert 0 < controller.report()["loss_tokens"] < (inputs["labels"][:, 1:] != -100).sum()


def test_a_batch_weighs_what_its_labels_weigh():
    """Whether tokens were left out or not: losses of a window add up to a mean."""
    model, inputs = tuned("llama"), batch("right")
    controller = lemo.apply(model, settings(MODES[1]))
    mean, expected = gradients(model, inputs)
    controller.seek(0)
    loss, got = gradients(model, {**inputs, "num_items_in_batch": 3 * items(inputs)})
    torch.testing.assert_close(3 * loss, mean)
    assert_close({n: 3 * g for n, g in got.items()}, expected)


def test_labels_only_where_no_token_took_part():
    model, inputs = tuned("llama"), batch("plain")
    controller, lists = shared(model)
    gradients(model, inputs)
    out = torch.ones(inputs["labels"].numel() + 1, dtype=torch.bool)
    out[lists[0][0].rows.long() + 1] = False
    inputs["labels"] = inputs["labels"].masked_fill(~out[:-1].view_as(inputs["labels"]), -100)
    assert (inputs["labels"] != -100).any()
    controller.config.keep_labelled = False  # or the few labels left would decide what is kept
    controller.seek(0)
    loss, got = gradients(model, {**inputs, "num_items_in_batch": items(inputs)})
    assert (loss.item(), controller.report()["loss_tokens"]) == (0.0, 0)
    assert got and all(g.count_nonzero() == 0 for g in got.values())


def trained_head(model):
    model.get_output_embeddings().weight.requires_grad_()


def trained_norm(model):
    model.get_base_model().model.norm.weight.requires_grad_()


def trained_embedding(model):
    model.get_input_embeddings().weight.requires_grad_()


def trained_hook(model):
    model.delta = torch.nn.Parameter(torch.zeros(32))
    model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output + model.delta)


@pytest.mark.parametrize("train", [trained_head, trained_norm, trained_embedding, trained_hook])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_trains_outside_of_the_layers_learns_from_all_tokens(train, checkpointing):
    model, inputs = tuned("llama", tie_word_embeddings=False), batch("plain")
    train(model)
    controller, _ = shared(model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    _, got = gradients(model, inputs)
    targets = (inputs["labels"][:, 1:] != -100).sum()
    assert controller.report()["loss_tokens"] == targets
    lemo.remove(model)
    controller, _ = shared(model)
    controller.config.layers = ()  # every layer keeps everything: the same tokens count
    assert gradients(model, inputs)[1].keys() == got.keys()
    assert controller.report()["loss_tokens"] == targets


def test_given_embeddings_that_train_learn_from_all_tokens():
    model, inputs = tuned("llama"), batch("plain")
    _, lists = shared(model)
    given = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    inputs["inputs_embeds"] = torch.nn.Parameter(given)
    gradients(model, inputs)
    left_out = torch.ones(3 * 37, dtype=torch.bool)
    left_out[lists[0][0].rows.long()] = False
    left_out &= torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].reshape(-1) != -100
    assert (inputs["inputs_embeds"].grad.view(-1, 32)[left_out].norm(dim=1) > 0).all()


@pytest.mark.parametrize("phase", [MODES[0], MODES[2]], ids=lambda phase: phase.mode)
def test_an_exact_forward_pass_counts_every_token(phase):
    model, inputs = tuned("llama"), batch("plain")
    controller = lemo.apply(model, settings(phase))
    gradients(model, inputs)
    assert controller.report()["loss_tokens"] == (inputs["labels"][:, 1:] != -100).sum()


def test_one_layer_that_keeps_everything_counts_every_token():
    model, inputs = tuned("llama"), batch("plain")
    controller = lemo.apply(model, settings(MODES[1], layers=[0, 2]))
    gradients(model, inputs)
    assert controller.report()["loss_tokens"] == (inputs["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize("phase", MODES, ids=lambda phase: phase.mode)
def test_norm_and_head_run_for_tokens_that_took_part(phase, monkeypatch):
    model, inputs, seen = tuned("llama"), batch("plain"), []
    original = lemo.ops.linear_cross_entropy

    def spy(hidden, *args, **options):
        seen.append(hidden.shape[0])
        return original(hidden, *args, **options)

    monkeypatch.setattr(lemo.ops, "linear_cross_entropy", spy)
    controller, lists = shared(model) if phase.mode == "skip" else (lemo.apply(model, settings(phase)), None)
    gradients(model, inputs)
    tokens = inputs["input_ids"].numel()
    assert seen == [tokens if lists is None else lists[0][0].num_rows]
    assert lists is None or seen[0] < 0.7 * tokens
    assert controller.report()["tokens"] == tokens


def test_the_union_of_kept_lists():
    blocks = Blocks.from_lengths([40], 8)

    def kept(*tokens):
        rows = torch.tensor(tokens, dtype=torch.int32)
        return dataclasses.replace(Kept.everything(blocks), rows=rows, num_rows=len(tokens))

    first, second = kept(1, 2, 9), kept(2, 30)
    part = Participation()
    for each in (first, None, first):
        part.add(each)
    assert part.rows() is first.rows  # one list, and nothing to read from the device
    part.add(second)
    assert part.rows().tolist() == [1, 2, 9, 30]
    part.add(kept(-1, -1))  # what a selection on a GPU leaves behind until its fault is read
    assert part.rows().tolist() == [1, 2, 9, 30]
    part.add(Kept.everything(blocks))
    assert part.rows() is None
    assert Participation().rows().tolist() == []


# --- what autograd sees of a step ---


@pytest.mark.parametrize("phase", MODES, ids=lambda phase: phase.mode)
@pytest.mark.parametrize("path", ["loss", "hidden", "logits"])
def test_second_derivatives_of_a_step_are_refused(phase, path):
    model, inputs = tuned("llama"), batch("plain")
    controller = lemo.apply(model, settings(phase))
    params = [p for p in model.parameters() if p.requires_grad]
    labels = inputs.pop("labels")

    def loss():
        if path == "loss":
            return model(**inputs, labels=labels).loss
        if path == "hidden":
            return model.get_base_model().model(**inputs).last_hidden_state.sum()
        return model(**inputs).logits.logsumexp(-1).sum()

    expected = torch.autograd.grad(loss(), params)
    controller.seek(0)
    first = loss()
    got = torch.autograd.grad(first, params, create_graph=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)

    def penalty():
        return sum(g.square().sum() for g in got)

    for function in (
        lambda: (loss() + penalty()).backward(),
        lambda: torch.autograd.grad(params[0].sum() + penalty(), params[:1], allow_unused=True),
    ):
        with pytest.raises(RuntimeError, match=r"has no second derivative.*lemo\.remove"):
            function()


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("where", ["module", "peft"])
def test_who_keeps_the_embeddings_output_finds_it_unchanged(family, where):
    model, inputs, seen = tuned(family), batch("plain"), []
    embedding = model.get_input_embeddings()
    if where == "module":
        embedding.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    else:  # a LoRA embedding whose adapter is off returns what its base layer returned
        model = lora(base(family), [*LINEARS[family], "embed_tokens"]).train()
        embedding = model.get_input_embeddings()
        embedding.base_layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        embedding.enable_adapters(False)
    lemo.apply(model, settings())
    model(**inputs).loss.backward()
    weight = embedding.base_layer.weight if where == "peft" else embedding.weight
    assert torch.equal(seen[0].reshape((*inputs["input_ids"].shape, 32)), weight[inputs["input_ids"]])


def test_without_a_hook_the_embeddings_output_is_not_copied(monkeypatch):
    steps = []
    original = lemo.engine.stack.Stack.apply
    monkeypatch.setattr(
        lemo.engine.stack.Stack, "apply", lambda x, step, *rest: steps.append(step) or original(x, step, *rest)
    )
    model = tuned("llama")
    lemo.apply(model, settings())
    model(**batch("plain"))
    assert not steps[0].borrowed
