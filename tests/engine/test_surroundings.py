"""Default dtypes, autocast, and tensors that others hold or change: nothing of it changes what a step computes."""

import lemo
import pytest
import torch
from support.models import ATTENTION, LAYERS, LINEARS, assert_close, base, batch, gradients, lora, tuned
from torch import nn

SKIPS = [lemo.Phase("skip", policy=name) for name in ("random", "sampled", "exact", "update_norm")]
EXACT = [lemo.Phase("backward"), lemo.Phase("dense")]


def settings(phase=None, recompute="none"):
    return lemo.LemoConfig(block_size=8, recompute=recompute, seed=3, phases=[phase or lemo.Phase("dense")])


@pytest.mark.parametrize(
    "phase", [*SKIPS, lemo.Phase("backward"), lemo.Phase("dense")], ids=lambda p: f"{p.mode}-{p.policy}"
)
@pytest.mark.parametrize("family", LAYERS)
def test_the_default_dtype_changes_nothing(family, phase):
    model, inputs = lora(base(family), [*LINEARS[family], "lm_head"]).train(), batch("right")
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        controller = lemo.apply(model, settings(phase))
        torch.set_default_dtype(dtype)
        try:
            results.append((*gradients(model, inputs), controller.kept_ratios))
        finally:
            torch.set_default_dtype(torch.float32)
            lemo.remove(model)
    loss, expected, kept = results[0]
    for ours, got, ratios in results[1:]:
        assert torch.equal(ours, loss)
        assert ratios == kept
        assert all(torch.equal(got[name], g) for name, g in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("phase", [SKIPS[0], *EXACT], ids=lambda p: p.mode)
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_backward_inside_autocast(dtype, phase, options):
    """On the CPU everything is float32, the backward pass too."""
    model, inputs = lora(base("llama"), LINEARS["llama"], **options).train(), batch("right")
    results = []
    for where in ("nowhere", "forward", "both"):
        lemo.apply(model, settings(phase, "attention"))
        model.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=where != "nowhere"):
            loss = model(**inputs).loss
            if where == "both":
                loss.backward()
        if where != "both":
            loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        lemo.remove(model)
    assert all(torch.equal(got[name], g) for got in results[1:] for name, g in results[0].items())


def test_backward_under_an_autocast_that_forward_did_not_see():
    model, inputs = tuned("llama"), batch("plain")
    lemo.apply(model, settings())
    _, expected = gradients(model, inputs)
    model.zero_grad()
    loss = model(**inputs).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("change", [lambda loss: loss.div_(4), lambda loss: loss.mul_(0.25)])
@pytest.mark.parametrize("extra", [{}, {"num_items_in_batch": torch.tensor(77)}], ids=["mean", "sum"])
def test_the_loss_may_change_in_place(change, extra):
    model, inputs = tuned("llama"), {**batch("plain"), **extra}
    _, expected = gradients(model, inputs, scale=0.25)
    lemo.apply(model, settings())
    model.zero_grad()
    change(loss := model(**inputs).loss)
    loss.backward()
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("kind", ["plain", "right"])
@pytest.mark.parametrize(
    ("family", "options"), [("llama", {}), ("opt", {}), ("opt", {"_remove_final_layer_norm": True})]
)
def test_hidden_states_may_change_in_place(family, options, kind):
    model, inputs = tuned(family, **options), batch(kind)
    del inputs["labels"]
    decoder = model.get_base_model().get_decoder()
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    weights = torch.randn(*mask.shape, 32, generator=torch.Generator().manual_seed(4)) * mask[..., None]

    def run():
        model.zero_grad()
        hidden = decoder(**inputs).last_hidden_state
        hidden.mul_(2).add_(1)
        (hidden * weights).sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run()
    lemo.apply(model, settings())
    assert_close(run(), expected)


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("phase", [SKIPS[3], *EXACT], ids=lambda p: p.mode)
@pytest.mark.parametrize("family", LAYERS)
def test_what_hooks_keep_is_not_overwritten(family, phase, recompute):
    model = lora(base(family), ATTENTION[family]).train()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module, args, output):
        kept.extend((t, t.detach().clone()) for t in (*args, output) if isinstance(t, torch.Tensor))

    for module in model.get_base_model().modules():
        if isinstance(module, nn.Embedding) or type(module).__name__ == "Linear":
            module.register_forward_hook(keep)
    lemo.apply(model, settings(phase, recompute))
    gradients(model, batch("plain"))
    assert len(kept) > 20
    assert all(torch.equal(now, before) for now, before in kept)


def strided(model):
    """Every parameter in a layout that is not contiguous."""
    for module in list(model.modules()):
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            layout = p.detach().t().contiguous().t() if p.dim() == 2 else p.detach().repeat_interleave(2)[::2]
            assert not layout.is_contiguous()
            setattr(module, name, nn.Parameter(layout, requires_grad=p.requires_grad))
    return model


@pytest.mark.parametrize("what", ["lora", "head", "saved", "everything"])
@pytest.mark.parametrize("family", LAYERS)
def test_parameters_need_not_be_contiguous(family, what):
    model = base(family, tie_word_embeddings=False)
    if what == "saved":
        model = lora(model, LINEARS[family], modules_to_save=["lm_head", "embed_tokens"])
    elif what != "everything":
        model = lora(model, [*LINEARS[family], *(["lm_head"] if what == "head" else [])])
    model, inputs = strided(model.train()), batch("right")
    _, expected = gradients(model, inputs)
    lemo.apply(model, settings(recompute="attention"))
    _, got = gradients(model, inputs)
    for name in [name for name in expected if name.endswith("k_proj.bias")]:
        torch.testing.assert_close(got.pop(name), expected.pop(name), rtol=0, atol=1e-6)
    assert_close(got, expected)
