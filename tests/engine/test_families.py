"""What families say about their models, windows of attention, and what is refused: other models, and those that store
what a family's do otherwise."""

from functools import cached_property

import lemo
import pytest
import torch
from lemo.engine import families
from lemo.engine.checks import check_modules
from lemo.engine.families import FAMILIES as KNOWN
from lemo.engine.families import UnsupportedModelError
from lemo.engine.families.gemma import Gemma2
from lemo.engine.families.llama import Llama
from lemo.engine.memory import layer_shape
from lemo.predictors.mass import MassTeacher
from lemo.predictors.teacher import Teacher
from support.models import ATTENTION, FAMILIES, LAYERS, LINEARS, assert_close, base, batch, gradients, lora, tuned
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GptOssConfig,
    MistralConfig,
)


def settings(**options):
    return lemo.LemoConfig(**{"block_size": 8, "phases": [lemo.Phase("dense")], **options})


def test_every_family_is_tested():
    assert {family.model_class for family in KNOWN} == {tiny.model.__name__ for tiny in FAMILIES.values()}
    kinds = dict.fromkeys(tiny.config.model_type for tiny in FAMILIES.values())  # OPT has two kinds of layers
    assert [family.model_type for family in KNOWN] == list(kinds)


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
    expected = "(, | or )".join(dict.fromkeys(tiny.model.__name__ for tiny in FAMILIES.values()))
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


def test_scales_of_logits():
    from transformers import GraniteMoeConfig

    assert families.logit_scale(base("llama").config) == 1.0
    assert families.logit_scale(base("granite", logits_scaling=4.0).config) == 0.25
    assert families.logit_scale(GraniteMoeConfig(logits_scaling=8.0)) == 0.125  # of any model, for its evaluation


def test_soft_caps():
    assert families.logit_softcap(base("llama").config) == 0.0
    assert families.logit_softcap(Gemma2Config()) == 30.0  # of any model, for its evaluation


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 12}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
        # Heads as wide as those of the published models.
        ("gemma3_text", {"head_dim": 256}),
    ],
)
@pytest.mark.parametrize(("recompute", "kind"), [("none", "left"), ("attention", "packed")])
def test_documents_beyond_the_window(family, options, recompute, kind):
    model, inputs = tuned(family, **options), batch(kind)
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings(recompute=recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
    lemo.remove(model)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.config.sliding_window = layer.self_attn.sliding_window = 1000
    assert (gradients(model, inputs)[0] - loss).abs() > 1e-4  # the window does hide something


def windows_of_calls(model, inputs, monkeypatch):
    """The window of every call of the attention operator in one step."""
    seen, attention = [], lemo.ops.attention
    with monkeypatch.context() as m:
        m.setattr(lemo.ops, "attention", lambda *a, **k: seen.append(k.get("window") or None) or attention(*a, **k))
        gradients(model, inputs)
    return seen


def test_a_window_that_no_document_exceeds_is_no_option_of_attention(monkeypatch):
    """As before there were windows, so that kernels without them serve such batches."""
    model = tuned("mistral", sliding_window=36)
    lemo.apply(model, settings())
    packed = batch("packed")  # 50 tokens, of which the longest document has 32
    assert windows_of_calls(model, packed, monkeypatch) == [None] * 3
    assert windows_of_calls(model, batch("plain"), monkeypatch) == [36] * 3  # documents of 37 tokens
    model.get_base_model().config.sliding_window = 37
    assert windows_of_calls(model, batch("plain"), monkeypatch) == [None] * 3


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_what_kernels_do_not_compute_is_refused_before_a_run():
    for config in (MistralConfig(), Gemma2Config(), Gemma3TextConfig(), GptOssConfig()):
        families.of(config).check_kernels(config, CUDA)
    config = MistralConfig(head_dim=192)
    families.of(config).check_kernels(config, CPU)
    with pytest.raises(
        UnsupportedModelError, match=r"192 values on CUDA \(MistralFor.*64, 80, 96, 128 or 256; .*\(--device cpu\)$"
    ):
        families.of(config).check_kernels(config, CUDA)


def test_exact_scores_without_kernels_are_refused_before_a_run():
    mistral = families.of(MistralConfig())
    mistral.check_score_kernels(MistralConfig(), 8192, CPU)
    mistral.check_score_kernels(MistralConfig(), 4096, CUDA)
    for config, words in (
        (MistralConfig(), r"a sliding window of 4096 in documents of 8192 tokens on CUDA \(MistralFor"),
        (Gemma2Config(), "heads of 256 values and soft-capped scores and a sliding window of 4096"),
        (Gemma3TextConfig(sliding_window=9000), r"heads of 256 values on CUDA \(Gemma3For"),
    ):
        with pytest.raises(UnsupportedModelError, match=f'{words}.*calibrate on the CPU .*"random"$'):
            families.of(config).check_score_kernels(config, 8192, CUDA)


@pytest.mark.parametrize("options", [{"policy": "exact"}, {"policy": "sampled", "policy_options": {"source": "exact"}}])
def test_training_by_exact_scores_asks_for_their_kernels(options, monkeypatch):
    """Also if a later phase is the first that needs them; and so does calibration, but not that of tiles."""
    asked: list[int] = []
    monkeypatch.setattr(Gemma2, "check_score_kernels", lambda self, config, tokens, device: asked.append(tokens))
    model = tuned("gemma2")
    phases = [lemo.Phase("dense", share=0.5), lemo.Phase("skip", share=0.5, **options)]
    lemo.apply(model, settings(phases=phases)).total_steps = 2
    gradients(model, batch("packed"))
    assert asked == [32]
    for teacher, expected in ((Teacher(model, 16, False), [32, 50]), (MassTeacher(model, 2), [32, 50])):
        teacher.check_scores(50)
        assert asked == expected


def test_layers_with_a_window_have_no_lists_of_tiles_to_save():
    config = FAMILIES["ministral"].config
    sizes = {**FAMILIES["ministral"].options, "num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4}
    sparse = settings(phases=[lemo.Phase("sparse", keys=256)])
    layers = {
        kind: lemo.estimate(config(**{**sizes, "layer_types": [kind] * 3}), sparse, 1024)["phases"][0]["saved"]
        for kind in ("full_attention", "sliding_attention")
    }
    mixed = lemo.estimate(config(**sizes), sparse, 1024)["phases"][0]["saved"]
    assert layers["sliding_attention"] < layers["full_attention"]
    assert 3 * mixed == 2 * layers["sliding_attention"] + layers["full_attention"]


def test_soft_caps_that_evaluation_would_leave_out_are_refused():
    model = base("gemma2")
    model.config._attn_implementation_internal = "sdpa"  # the default of transformers 5.0
    with pytest.raises(UnsupportedModelError, match=r"attn_logit_softcapping=3\).*attn_implementation=\"eager\""):
        lemo.apply(model, settings())


# --- models that hold a family's, or store it otherwise ---------------------------------------------------------------


def test_the_language_model_of_gemma_3_loads_alone(tmp_path):
    """As the refusal of the whole says, and as the commands do."""
    from lemo.cli.common import load_config

    text = base("gemma3_text").config
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = Gemma3ForConditionalGeneration(config)
    match = r"lemo does not support Gemma3ForConditionalGeneration: .*Gemma3ForCausalLM\.from_pretrained.*key_mapping="
    with pytest.raises(UnsupportedModelError, match=match):
        lemo.apply(whole)
    with pytest.raises(UnsupportedModelError, match=r"Gemma3Config .*key_mapping="):
        lemo.estimate(config, lemo.LemoConfig(), 64)
    whole.save_pretrained(tmp_path)
    read = load_config(str(tmp_path), 64, False)
    assert families.of(read).model_class == "Gemma3ForCausalLM"
    alone = Gemma3ForCausalLM.from_pretrained(tmp_path, config=read, **families.loading(read))
    expected = whole.model.language_model.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in alone.model.state_dict().items())
    lemo.apply(alone, settings())


def test_positions_of_layers_without_a_window_are_stretched(tmp_path):
    from lemo.cli.common import load_config

    base("gemma3_text", max_position_embeddings=64).config.save_pretrained(tmp_path)
    before = load_config(str(tmp_path), 64, False).rope_parameters
    after = load_config(str(tmp_path), 256, True).rope_parameters
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"] == {**before["full_attention"], "rope_type": "linear", "factor": 4.0}


def test_experts_in_mxfp4_are_refused():
    model = base("gpt_oss")
    model.model.layers[1].mlp.experts.__class__ = type("Mxfp4GptOssExperts", (nn.Module,), {})
    with pytest.raises(
        UnsupportedModelError, match=r"experts in mxfp4 \(model\.layers\.1\.mlp\.experts\).*dequantize=True"
    ):
        lemo.apply(model, settings())
    config = base("gpt_oss").config
    assert "quantization_config" not in families.loading(config)
    config.quantization_config = {"quant_method": "mxfp4"}
    assert families.loading(config)["quantization_config"].dequantize


@pytest.mark.parametrize("targets", [ATTENTION["llama"], LINEARS["llama"]], ids=["attention", "all"])
def test_the_swiglu_product_is_made_again_only_for_an_adapter_that_reads_it(targets, monkeypatch):
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
    products = model.config.num_hidden_layers * (1 if targets is ATTENTION["llama"] else 2)
    assert counts == {"none": products, "full": products}
