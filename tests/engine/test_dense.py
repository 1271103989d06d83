"""Everything kept is the dense model, whatever the batch looks like and whatever is saved."""

import lemo
import pytest
import torch
from support.models import FAMILIES, LAYERS, LINEARS, assert_close, base, batch, clone, gradients, lora, tuned


def config(mode="dense", recompute="none", block_size=8, **options):
    return lemo.LemoConfig(block_size=block_size, recompute=recompute, phases=[lemo.Phase(mode, keep=1.0)], **options)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("kind", ["plain", "right", "left", "packed", "lengths"])
def test_keep_all_is_dense(family, recompute, kind):
    model, inputs = tuned(family), batch(kind)
    if not FAMILIES[family].separates and kind in ("packed", "lengths"):
        inputs = batch("right")  # one row per document instead
    loss, expected = gradients(model, inputs)
    lemo.apply(model, config(recompute=recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("mode", ["skip", "backward"])
def test_modes_with_everything_kept(family, mode):
    model, inputs = tuned(family), batch("right")
    loss, expected = gradients(model, inputs)
    lemo.apply(model, config(mode))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("family", LAYERS)
def test_packed_documents_equal_separate_rows(family):
    model = tuned(family)
    lengths = (17, 1, 32)
    packed = batch("packed")
    rows = torch.zeros(3, 32, dtype=torch.long)
    mask, labels = torch.zeros_like(rows), torch.full_like(rows, -100)
    start = 0
    for i, n in enumerate(lengths):
        rows[i, :n], mask[i, :n] = packed["input_ids"][0, start : start + n], 1
        labels[i, :n] = packed["labels"][0, start : start + n]
        labels[i, 0] = packed["labels"][0, start] = -100  # no document predicts the next one's first token
        start += n
    loss, expected = gradients(model, {"input_ids": rows, "attention_mask": mask, "labels": labels})
    lemo.apply(model, config())
    ours, got = gradients(model, packed)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("family", LAYERS)
def test_logits(family):
    model, inputs = tuned(family), batch("right")
    del inputs["labels"]
    expected = model(**inputs).logits
    lemo.apply(model, config())
    mask = inputs["attention_mask"].bool()
    got = model(**inputs).logits
    torch.testing.assert_close(got[mask], expected[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_lora_on_all_linears(family, recompute):
    model, inputs = lora(base(family), [*LINEARS[family], "lm_head"]).train(), batch("right")
    loss, expected = gradients(model, inputs)
    assert any("lm_head" in name for name in expected)
    lemo.apply(model, config(recompute=recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("family", LAYERS)
def test_trained_head_and_embeddings(family):
    model = lora(base(family, tie_word_embeddings=False), LINEARS[family], modules_to_save=["lm_head", "embed_tokens"])
    inputs = batch("right")
    loss, expected = gradients(model.train(), inputs)
    assert sum("modules_to_save" in name for name in expected) == 2
    lemo.apply(model, config())
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("recompute", ["none", "attention"])
def test_all_parameters_train(family, recompute):
    """Weights, biases and norms of the base model itself: the general path of every module."""
    model, inputs = base(family).train(), batch("right")
    loss, expected = gradients(model, inputs)
    lemo.apply(model, config(recompute=recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    for name in [name for name in expected if name.endswith("k_proj.bias")]:
        # A softmax does not see one number added to all its scores: this gradient is 0 but for rounding.
        torch.testing.assert_close(got.pop(name), expected.pop(name), rtol=0, atol=1e-6)
    assert_close(got, expected)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}])
def test_lora_variants(options):
    model, inputs = lora(base("llama"), LINEARS["llama"], **options).train(), batch("plain")
    loss, expected = gradients(model, inputs)
    lemo.apply(model, config(recompute="attention"))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


def test_sum_over_num_items_in_batch():
    model, inputs = tuned("llama"), {**batch("plain"), "num_items_in_batch": torch.tensor(77)}
    loss, expected = gradients(model, inputs)
    lemo.apply(model, config())
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


def test_embeddings_as_input_are_left_alone():
    model, inputs = tuned("llama"), batch("plain")
    embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    before = embeddings.clone()
    inputs["inputs_embeds"] = embeddings.requires_grad_()
    _, expected = gradients(model, inputs)
    expected["inputs"] = embeddings.grad.clone()
    embeddings.grad = None
    lemo.apply(model, config())
    _, got = gradients(model, inputs)
    got["inputs"] = embeddings.grad
    assert_close(got, expected)
    assert torch.equal(embeddings, before)


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("where", ["model", "lora"])
def test_dropout_is_replayed(recompute, where):
    """Gradients equal finite differences with the same random numbers: the replay draws what the forward pass drew."""
    if where == "model":
        model = tuned("opt", dropout=0.3)
    else:
        model = lora(base("llama"), LINEARS["llama"], lora_dropout=0.3).train()
    lemo.apply(model, config(recompute=recompute))
    inputs = batch("right")

    def loss():
        torch.manual_seed(5)
        return model(**inputs).loss

    value = loss()
    value.backward()
    p = next(p for n, p in model.named_parameters() if "lora_A" in n and "v_proj" in n)
    direction = p.grad / p.grad.norm()
    eps = 5e-3
    with torch.no_grad():
        p.add_(eps * direction)
    up = loss()
    with torch.no_grad():
        p.add_(-2 * eps * direction)
    down = loss()
    slope = (up - down) / (2 * eps)
    torch.testing.assert_close(slope, p.grad.norm(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_width_that_kernels_do_not_divide(recompute):
    """Gated MLPs whose inner width is not a multiple of 8 are computed by torch."""
    model, inputs = lora(base("llama", intermediate_size=44), LINEARS["llama"]).train(), batch("right")
    loss, expected = gradients(clone(model), inputs)
    lemo.apply(model, lemo.LemoConfig(block_size=8, phases=[lemo.Phase("dense")], recompute=recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
