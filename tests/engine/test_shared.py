"""Each parameter gets its gradient once, wherever and however often it stands; hooks run once; none is forgotten."""

import lemo
import peft
import pytest
import torch
from lemo.engine.families import UnsupportedModelError
from support.models import ATTENTION, LINEARS, assert_close, base, batch, gradients, lora, tuned
from torch import nn

DENSE = [lemo.Phase("dense")]


def settings(recompute="none", phases=DENSE):
    return lemo.LemoConfig(block_size=8, recompute=recompute, phases=phases)


def randomised(model):
    """Adapters start at zero; shared ones then have a gradient of zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.train()


# Kinds whose layers share trained parameters, within a layer and between layers.
ALL = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SHARING = {
    "VBLoRAConfig": {"r": 4, "topk": 2, "num_vectors": 16, "vector_length": 8, "target_modules": ALL},
    "UniLoraConfig": {"r": 4, "target_modules": ALL},
    "TinyLoraConfig": {"r": 2, "target_modules": ALL},
    "LilyConfig": {"r": 4, "target_modules": ALL},
}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", SHARING)
def test_adapters_that_share_parameters(kind, recompute):
    if not hasattr(peft, kind):
        pytest.skip(f"this peft has no {kind}")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **SHARING[kind])
    model = randomised(peft.get_peft_model(base("llama"), config))
    inputs = batch("plain")
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings(recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected, 2e-5)


def shared_mlp(model):
    model.model.layers[2].mlp = model.model.layers[0].mlp


def shared_layer(model):
    model.model.layers[2] = model.model.layers[0]
    model.config.use_cache = False  # the layer would find its first keys again


def shared_norms(model):
    model.model.layers[1].input_layernorm.weight = model.model.norm.weight
    model.model.layers[1].post_attention_layernorm = model.model.layers[1].input_layernorm


def shared_weights(model):
    """Between attention and MLP of one layer, and a layer and the head."""
    layer = model.model.layers[1]
    layer.self_attn.q_proj.weight = layer.self_attn.o_proj.weight
    layer.mlp.up_proj.weight = layer.mlp.gate_proj.weight
    model.lm_head.weight = model.model.embed_tokens.weight
    own = nn.Parameter(layer.self_attn.o_proj.weight.detach().clone())
    layer.self_attn.o_proj.weight = layer.mlp.gate_proj.weight = own
    layer.mlp.up_proj.weight = own


@pytest.mark.parametrize("recompute", ["none", "attention"])
@pytest.mark.parametrize("tie", [shared_mlp, shared_layer, shared_norms, shared_weights])
def test_parameters_shared_inside_the_model(tie, recompute):
    model, inputs = base("llama", intermediate_size=32).train(), batch("right")
    tie(model)
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings(recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_hooks_on_parameters_run_once_with_the_whole_gradient(recompute):
    model, inputs = base("llama").train(), batch("plain")
    shared_layer(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    calls: dict[tuple[str, str], list[torch.Tensor | None]] = {}
    nodes = []
    for name, p in model.named_parameters():
        p.register_hook(lambda g, n=name: calls.setdefault((n, "tensor"), []).append(g.clone()))
        p.register_post_accumulate_grad_hook(lambda q, n=name: calls.setdefault((n, "post"), []).append(q.grad.clone()))
        nodes.append(p.expand_as(p).grad_fn.next_functions[0][0])
        nodes[-1].register_hook(lambda *_, n=name: calls.setdefault((n, "node"), []).append(None))
    _, expected = gradients(model, inputs)
    before = dict(calls)
    calls.clear()
    lemo.apply(model, settings(recompute))
    _, got = gradients(model, inputs)
    assert_close(got, expected)
    assert calls.keys() == before.keys()
    assert all(len(c) == 1 for c in calls.values())
    for name, gradient in got.items():
        assert torch.equal(calls[name, "tensor"][0], gradient)
        assert torch.equal(calls[name, "post"][0], gradient)


def test_hooks_may_change_the_gradient_and_be_removed():
    model, inputs = tuned("llama"), batch("plain")
    p = next(p for n, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in n)
    lemo.apply(model, settings("full"))
    gradients(model, inputs)
    expected = p.grad.clone()
    handle = p.register_hook(lambda g: g * 3)
    gradients(model, inputs)
    assert torch.equal(p.grad, expected * 3)
    handle.remove()
    gradients(model, inputs)
    assert torch.equal(p.grad, expected)


def test_hooks_survive_an_error_in_backward():
    model, inputs = tuned("llama"), batch("plain")
    p = next(p for p in model.parameters() if p.requires_grad)
    seen: list[torch.Tensor] = []
    p.register_hook(seen.append)
    lemo.apply(model, settings())
    loss = model(**inputs).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    gradients(model, inputs)
    assert len(seen) == 2


def test_hooked_parameters_of_a_layer_that_keeps_nothing():
    model, inputs = tuned("llama"), batch("plain")
    p = next(p for p in model.parameters() if p.requires_grad)
    seen: list[torch.Tensor] = []
    p.register_hook(seen.append)
    lemo.apply(model, settings(phases=[lemo.Phase("skip", keep=0.0, policy="random")]))
    model(**inputs).loss.backward()
    assert [int(g.count_nonzero()) for g in seen] == [0]


def test_inactive_adapters_have_no_gradient():
    model, inputs = tuned("llama"), batch("plain")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=ATTENTION["llama"], task_type="CAUSAL_LM"))
    seen: list[torch.Tensor] = []
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if ".other." in name:
            p.register_hook(seen.append)
    _, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    _, got = gradients(model, inputs)
    assert_close(got, expected)
    assert not seen
    assert not any(".other." in name for name in got)


@pytest.mark.parametrize("modules", [["mlp"], ["self_attn"], ["input_layernorm", "norm"]])
def test_modules_to_save(modules):
    model = lora(
        base("llama"), ["q_proj"] if modules != ["self_attn"] else ["up_proj"], modules_to_save=modules
    ).train()
    inputs = batch("plain")
    _, expected = gradients(model, inputs)
    lemo.apply(model, settings("full"))
    _, got = gradients(model, inputs)
    assert_close(got, expected)


def test_a_trained_parameter_that_nothing_uses_is_refused():
    model = tuned("llama")
    attention = model.get_base_model().model.layers[1].self_attn
    attention.q_norm = nn.RMSNorm(8)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.self_attn\.q_norm\.weight.*no gradient"):
        lemo.apply(model, settings())
    attention.q_norm.requires_grad_(False)
    lemo.apply(model, settings())
    attention.q_norm.requires_grad_(True)
    with pytest.raises(UnsupportedModelError, match="q_norm"):
        model(**batch("plain"))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_trained_tensor_from_elsewhere_is_an_error(recompute):
    """A hook on a projection may use what it likes; what no module holds would get no gradient."""
    model = tuned("llama")
    scale = nn.Parameter(torch.ones(32))
    model.get_base_model().model.layers[0].mlp.down_proj.register_forward_hook(lambda m, a, y: y * scale)
    lemo.apply(model, settings(recompute))
    with pytest.raises(RuntimeError, match=r"shape \[32\].*no gradient"):
        gradients(model, batch("plain"))


def test_a_parameter_that_a_hooked_projection_holds():
    model, inputs = lora(base("llama"), LINEARS["llama"]).train(), batch("plain")
    down = model.get_base_model().model.layers[0].mlp.down_proj
    down.extra = nn.Parameter(torch.rand(32) + 0.5)
    down.register_forward_hook(lambda m, a, y: y * m.extra)
    _, expected = gradients(model, inputs)
    assert any("extra" in name for name in expected)
    lemo.apply(model, settings("full"))
    _, got = gradients(model, inputs)
    assert_close(got, expected)
