"""What families say about their models, and what they refuse: windows that would cut attention, other models."""

from functools import cached_property

import lemo
import pytest
import torch
from lemo.engine import families
from lemo.engine.checks import check_modules
from lemo.engine.families import FAMILIES as KNOWN
from lemo.engine.families import UnsupportedModelError
from lemo.engine.families.llama import Llama
from lemo.engine.memory import layer_shape
from support.models import ATTENTION, FAMILIES, LAYERS, LINEARS, assert_close, base, batch, gradients, lora, tuned
from torch import nn
from transformers import Gemma2Config, GemmaConfig, MistralConfig, Qwen2Config


def settings(**options):
    return lemo.LemoConfig(**{"block_size": 8, "phases": [lemo.Phase("dense")], **options})


def test_every_family_is_tested():
    assert {family.model_class for family in KNOWN} == {tiny.model.__name__ for tiny in FAMILIES.values()}
    assert [family.model_type for family in KNOWN] == [tiny.config.model_type for tiny in FAMILIES.values()]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("biases", [False, True])
def test_shape(name, biases):
    """Sizes, projections and biases are those of the model's own modules."""
    options = {"enable_bias": biases} if name == "opt" else {}
    options |= {"attention_bias": biases, "mlp_bias": biases} if name == "llama" else {}
    model = base(name, **options)
    family, lm = families.find(model)
    assert families.of(model.config) is family
    shape = family.shape(model.config)
    layer = family.layers(family.decoder(lm))[0]
    linears = {n.rpartition(".")[2]: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
    assert set(linears) == set(family.projections) == set(LINEARS[name])
    assert list(family.lora_targets) == ATTENTION[name]
    for module, role in family.projections.items():
        assert shape.projections[role] == (linears[module].in_features, linears[module].out_features)
        assert (linears[module].bias is not None) == (role in shape.biases)
    assert shape.layers == 3 and shape.head_dim == layer.self_attn.head_dim
    assert layer_shape(model.config).lora == dict.fromkeys(("q", "k", "v", "o"), 8)
    assert set(layer_shape(model.config, lora_targets="all-linear").lora) == set(family.projections.values())
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    config = settings(phases=[lemo.Phase("skip", keep=0.5)])
    expected = sum(p.numel() for p in model.parameters()) - norms
    adapters = 16 * 8 * 3 * sum(sum(shape.projections[role]) for role in ("q", "k", "v", "o"))
    weights = lemo.estimate(model.config, config, 512, element=4)["phases"][0]["weights"]
    assert weights - adapters == 4 * (expected + (2 * 3 + 1) * shape.hidden)


def test_other_models_are_refused_by_name():
    expected = "(, | or )".join(tiny.model.__name__ for tiny in FAMILIES.values())
    with pytest.raises(
        UnsupportedModelError, match=rf"support GemmaConfig \(model_type 'gemma'\): expected.*{expected}"
    ):
        lemo.estimate(GemmaConfig(), lemo.LemoConfig(), 512)
    with pytest.raises(UnsupportedModelError, match=rf"support Linear: expected {expected}"):
        lemo.apply(nn.Linear(2, 2))


class Nested(Llama):
    """A family that computes a module further down than in the layer itself."""

    @cached_property
    def layer_modules(self):
        return {**super().layer_modules, "self_attn.q_proj": (("torch.nn.modules.linear", "Linear"),)}


def test_modules_are_checked_at_any_depth():
    lm = base("llama")
    check_modules(Nested(), lm)
    lm.model.layers[1].self_attn.q_proj.register_forward_hook(lambda *_: None)
    check_modules(Llama(), lm)  # which only calls it
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.self_attn\.q_proj: it has a hook"):
        check_modules(Nested(), lm)
    del lm.model.layers[0].self_attn.q_proj
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.self_attn\.q_proj: expected Linear"):
        check_modules(Nested(), lm)


def test_soft_caps():
    assert families.logit_softcap(base("llama").config) == 0.0
    assert families.logit_softcap(Gemma2Config()) == 30.0  # of any model, for its evaluation


# --- windows ----------------------------------------------------------------------------------------------------------


def test_a_window_that_no_document_exceeds_changes_nothing():
    model, inputs = tuned("mistral", sliding_window=37), batch("plain")
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
    packed = batch("packed")  # 50 tokens, of which the longest document has 32
    loss, _ = gradients(tuned("mistral", sliding_window=37), packed)
    torch.testing.assert_close(gradients(model, packed)[0], loss, rtol=1e-5, atol=0)


def test_documents_beyond_the_window_are_refused():
    model, inputs = tuned("mistral", sliding_window=36), batch("plain")
    lemo.apply(model, settings())
    match = (
        r"sliding-window attention \(sliding_window=36 of MistralForCausalLM, in a document of 37 tokens\).*at most 36"
    )
    with pytest.raises(UnsupportedModelError, match=match):
        model(**inputs)
    model.get_base_model().config.sliding_window = None  # as the message says
    model(**inputs).loss.backward()


def test_windows_are_refused_before_a_run():
    """By the estimate, by calibration, and for Qwen2, whose layers may differ, by apply."""
    from lemo.predictors.teacher import Teacher

    with pytest.raises(UnsupportedModelError, match=r"sliding_window=4096 .* a document of 8192 tokens"):
        lemo.estimate(MistralConfig(), lemo.LemoConfig(), 8192)
    assert lemo.estimate(MistralConfig(), lemo.LemoConfig(), 4096, batch=4)["peak"] > 0
    teacher = Teacher(base("mistral", sliding_window=16), 8, False)
    for read in (teacher.read, lambda ids, consume: teacher.read_eliminating(ids, consume, 0.5)):
        with pytest.raises(UnsupportedModelError, match="at most 16 tokens"):
            read(torch.randint(3, 80, (17,)), lambda *_: None)
    with pytest.raises(
        UnsupportedModelError, match=r"use_sliding_window=True of Qwen2ForCausalLM.*use_sliding_window=False"
    ):
        lemo.apply(base("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=1))
    assert lemo.estimate(Qwen2Config(sliding_window=128), lemo.LemoConfig(), 4096)["peak"] > 0  # which it does not use


@pytest.mark.parametrize("targets", [ATTENTION["llama"], LINEARS["llama"]], ids=["attention", "all"])
def test_recomputation_makes_the_swiglu_product_only_for_an_adapter_that_reads_it(targets, monkeypatch):
    calls, swiglu = [], lemo.ops.swiglu
    monkeypatch.setattr(lemo.ops, "swiglu", lambda *args: calls.append(args) or swiglu(*args))
    counts, found = {}, {}
    for recompute in ("none", "full"):
        model = lora(base("llama"), targets).train()
        lemo.apply(model, settings(recompute=recompute))
        _, found[recompute] = gradients(model, batch("right"))
        counts[recompute] = len(calls)
        calls.clear()
    assert_close(found["full"], found["none"])
    layers = model.config.num_hidden_layers
    assert counts == {"none": layers, "full": layers if targets is ATTENTION["llama"] else 2 * layers}
