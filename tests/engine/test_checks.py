"""What lemo would not run as the model runs it is refused by name, at apply and at the step; the harmless stays."""

import copy
import functools
import gc
import types
import weakref
from typing import Any

import accelerate
import lemo
import peft
import pytest
import torch
from lemo.engine.families import UnsupportedModelError
from support.models import LAYERS, LINEARS, assert_close, base, batch, gradients, lora, tuned
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama import modeling_llama
from transformers.models.opt import modeling_opt


def settings(**options):
    return lemo.LemoConfig(**{"block_size": 8, "phases": [lemo.Phase("dense")], **options})


def subclass(module):
    """Makes a module one of a class derived from its own."""
    kind = type(module)
    module.__class__ = type(
        "Changed", (kind,), {"forward": lambda self, *args, **kwargs: kind.forward(self, *args, **kwargs)}
    )


def instance_forward(module):
    original = module.forward
    module.forward = types.MethodType(lambda self, *args, **kwargs: original(*args, **kwargs), module)


CHANGES = {
    "subclass": subclass,
    "instance forward": instance_forward,
    "function forward": lambda m: setattr(m, "forward", lambda *args, **kwargs: args[0]),
    "forward hook": lambda m: m.register_forward_hook(lambda *_: None),
    "hook with kwargs": lambda m: m.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}
ROTARY = [
    "model", "model.norm", "model.rotary_emb", "model.layers.1", "model.layers.1.self_attn", "model.layers.1.mlp",
    "model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm",
]  # fmt: skip
PLACES = {
    "llama": ROTARY,
    "opt": [
        "model", "model.decoder", "model.decoder.final_layer_norm", "model.decoder.layers.1",
        "model.decoder.layers.1.self_attn", "model.decoder.layers.1.self_attn_layer_norm",
        "model.decoder.layers.1.final_layer_norm",
    ],
}  # fmt: skip


# Places are found one by one, changes in the same way wherever they are.
TWO_CHANGES = ("subclass", "forward hook")
THREE_PLACES = ("model", "model.layers.1.self_attn", "model.layers.1.input_layernorm")


@pytest.mark.parametrize(
    ("family", "place", "change"),
    [(family, place, change) for family in LAYERS for place in PLACES[family] for change in TWO_CHANGES]
    + [("llama", place, change) for place in THREE_PLACES for change in CHANGES if change not in TWO_CHANGES],
)
def test_changed_modules_are_refused_at_apply_and_later(family, place, change):
    inputs = batch("plain")
    model = tuned(family)
    inner = model.get_base_model()
    CHANGES[change](inner.get_submodule(place))
    match = rf"lemo does not support {place}: .*(lemo\.remove)"
    with pytest.raises(UnsupportedModelError, match=match):
        lemo.apply(model, settings())
    assert not any("_lemo" in m.__dict__ for m in inner.modules())

    model = tuned(family)
    lemo.apply(model, settings())
    gradients(model, inputs)
    CHANGES[change](model.get_base_model().get_submodule(place))
    with pytest.raises(UnsupportedModelError, match=match):
        model(**inputs)


def test_a_module_exchanged_for_another():
    model = tuned("llama")
    lemo.apply(model, settings())
    model.get_base_model().model.layers[2].mlp = nn.Linear(32, 32)
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp: expected LlamaMLP .* got torch\.nn\..*Linear"):
        model(**batch("plain"))


def test_calibration_refuses_it_too():
    from lemo.predictors.teacher import Teacher

    model = base("llama")
    Teacher(model, 8, False)
    instance_forward(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp"):
        Teacher(model, 8, False)


def test_torchs_own_hooks_that_change_a_module_are_refused():
    model = base("llama")
    model.model.norm.g = nn.Parameter(torch.ones(32, 4))
    torch.nn.utils.spectral_norm(model.model.norm, "g")
    with pytest.raises(UnsupportedModelError, match=r"model\.norm: it has a hook, torch\.nn\.utils"):
        lemo.apply(model, settings())


def test_a_removed_hook_is_forgotten():
    model, inputs = tuned("llama"), batch("plain")
    controller = lemo.apply(model, settings())
    handle = model.get_base_model().model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedModelError, match="<lambda>"):
        model(**inputs)
    handle.remove()
    gradients(model, inputs)
    assert controller.kept_ratios == [1.0] * 3


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (modeling_llama.LlamaAttention, "forward"),
        (modeling_llama.LlamaMLP, "forward"),
        (modeling_llama.LlamaRMSNorm, "forward"),
        (modeling_llama.LlamaDecoderLayer, "forward"),
        (modeling_llama.LlamaModel, "forward"),
        (modeling_llama, "apply_rotary_pos_emb"),
        (modeling_llama, "eager_attention_forward"),
        (modeling_llama, "create_causal_mask"),
        (modeling_opt.OPTDecoderLayer, "forward"),
        (nn.LayerNorm, "forward"),
    ],
)
def test_patched_classes_and_functions_are_refused(owner, name, monkeypatch):
    original = getattr(owner, name)

    @functools.wraps(original)  # which makes it look like the original
    def patched(*args, **kwargs):
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, patched)
    model = tuned("opt" if owner in (nn.LayerNorm, modeling_opt.OPTDecoderLayer) else "llama")
    with pytest.raises(UnsupportedModelError, match=r"replaced by (tests\.engine\.)?test_checks"):
        lemo.apply(model, settings())


def test_foreign_attention_functions_are_refused():
    from transformers import AttentionInterface

    name = "test_checks_attention"
    AttentionInterface.register(name, lambda *args, **kwargs: modeling_llama.eager_attention_forward(*args, **kwargs))
    model = tuned("llama")
    lemo.apply(model, settings())
    model.get_base_model().config._attn_implementation = name
    with pytest.raises(UnsupportedModelError, match=f"attention '{name}'"):
        model(**batch("plain"))


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_full_backward_hook"])
def test_global_hooks_are_refused(register):
    model = tuned("llama")
    lemo.apply(model, settings())
    handle = getattr(nn.modules.module, register)(lambda *_: None)
    try:
        with pytest.raises(UnsupportedModelError, match="hooks for all modules"):
            model(**batch("plain"))
    finally:
        handle.remove()
    gradients(model, batch("plain"))


def test_attention_that_became_another():
    model = tuned("llama")
    lemo.apply(model, settings())
    attention = model.get_base_model().model.layers[1].self_attn
    attention.attention_dropout = 0.1
    with pytest.raises(UnsupportedModelError, match=r"attention dropout \(0\.1 in model\.layers\.1"):
        model(**batch("plain"))
    attention.attention_dropout, attention.is_causal = 0.0, False
    with pytest.raises(UnsupportedModelError, match="not causal"):
        model(**batch("plain"))


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.Sequential(nn.SiLU(), nn.Tanh())])
def test_another_activation_function_is_run(act):
    model, inputs = lora(base("llama"), LINEARS["llama"]).train(), batch("plain")
    model.get_base_model().model.layers[1].mlp.act_fn = act
    _, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    assert_close(gradients(model, inputs)[1], expected)


# --- what may stay ----------------------------------------------------------------------------------------------------


def equal_gradients(model, inputs, change=lambda: None):
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    change()
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
    lemo.remove(model)


@pytest.mark.parametrize("family", LAYERS)
def test_recorded_outputs_and_gradient_checkpointing(family):
    model, inputs = tuned(family), batch("plain")
    model.eval()(**inputs, output_hidden_states=True, output_attentions=True)
    model.train()
    decoder = model.get_base_model().get_decoder()
    assert any(layer._forward_hooks for layer in decoder.layers)
    equal_gradients(model, inputs)
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    equal_gradients(model, inputs)


@pytest.mark.parametrize("late", [False, True])
def test_accelerates_hooks_that_keep_everything_in_place(late):
    model, inputs = base("llama").train(), batch("plain")

    def dispatch():
        hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
        for module in model.modules():
            if module is not model:
                accelerate.hooks.add_hook_to_module(module, copy.copy(hook))

    if late:
        equal_gradients(model, inputs, dispatch)
    else:
        dispatch()
        equal_gradients(model, inputs)


def test_accelerates_hooks_with_offloading_are_refused():
    model = base("llama").train()
    layer = model.model.layers[0].mlp
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.CpuOffload("cpu"))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp"):
        lemo.apply(model, settings())


def test_hooks_that_run():
    """On projections and on the embedding: the modules are called."""
    model, inputs = tuned("llama"), batch("plain")
    inner = model.get_base_model().model
    inner.embed_tokens.register_forward_hook(lambda m, args, y: y * 1.5)
    inner.layers[0].mlp.up_proj.register_forward_hook(lambda m, args, y: y * 1.5)
    inner.layers[1].self_attn.q_proj.lora_B["default"].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    inner.layers[1].self_attn.q_proj.lora_dropout["default"].register_forward_hook(lambda m, args, y: y * 3)
    inner.layers[1].self_attn.v_proj.register_full_backward_pre_hook(lambda m, dy: (dy[0] * 2,))
    inner.layers[2].mlp.act_fn.register_forward_hook(lambda m, args, y: y * 0.5)
    equal_gradients(model, inputs)


def test_torchs_counters_may_watch():
    model, inputs = tuned("llama"), batch("plain")
    _, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    with FlopCounterMode(display=False):
        _, got = gradients(model, inputs)
    assert_close(got, expected)


def test_a_deep_copy():
    model, inputs = tuned("llama"), batch("plain")
    lemo.apply(model, settings())
    _, expected = gradients(model, inputs)
    assert_close(gradients(copy.deepcopy(model), inputs)[1], expected)


LIGER = """
class LigerRMSNorm(Norm):
    def forward(self, x):
        return Norm.forward(self, x)

class LigerSwiGLUMLP(MLP):
    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))
"""


@pytest.mark.parametrize(
    ("family", "how"), [("llama", "class"), ("llama", "instance"), ("mistral", "class"), ("qwen2", "class")]
)
def test_ligers_equivalents_stay(family, how):
    """Classes and forward methods that say they are Liger's: on the modules' class or on instances."""
    space: dict[str, Any] = {"__name__": "liger_kernel.transformers.equivalents", "silu": nn.functional.silu}
    model, inputs = lora(base(family), LINEARS[family]).train(), batch("plain")
    layer = model.get_base_model().model.layers[0]
    kinds = {type(layer.input_layernorm): "LigerRMSNorm", type(layer.mlp): "LigerSwiGLUMLP"}
    space |= dict(zip(("Norm", "MLP"), kinds, strict=True))
    exec(LIGER, space)
    for m in list(model.modules()):
        name = kinds.get(type(m))
        if name and how == "instance":
            m.forward = space[name].forward.__get__(m)
        elif name:
            m.__class__ = space[name]
            m._modules.pop("act_fn", None)  # Liger's has SiLU built in
    equal_gradients(model, inputs)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        (peft.LNTuningConfig(task_type="CAUSAL_LM"), r"model\.(norm|layers\.0\.input_layernorm)"),
        (
            peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2),
            r"model\.layers\.1\.self_attn",
        ),
    ],
)
def test_adapters_that_replace_what_lemo_computes(config, place):
    model = peft.get_peft_model(base("llama"), config).train()
    with pytest.raises(UnsupportedModelError, match=place):
        lemo.apply(model, settings())


def test_checks_keep_no_model_alive():
    model = base("llama").train()
    instance_forward(model.model.layers[0])
    with pytest.raises(UnsupportedModelError):
        lemo.apply(model, settings())
    lemo.apply(other := tuned("llama"), settings())
    gradients(other, batch("plain"))
    watched = [weakref.ref(model), weakref.ref(other)]
    del model, other
    gc.collect()
    assert [w() for w in watched] == [None, None]
