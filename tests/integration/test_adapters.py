"""What people train: kinds of LoRA, whole modules, several adapters, every weight. With everything kept, each mode
gives the loss and the gradients of transformers and PEFT; and each mode runs."""

from typing import Any

import lemo
import peft
import pytest
import torch
from lemo.engine.linear import projection
from support.models import FAMILIES, LINEARS, assert_close, base, batch, gradients
from torch import nn

MODES = ("skip", "backward", "sparse", "dense")
NORMS = {"llama": ["input_layernorm", "norm"], "opt": ["self_attn_layer_norm", "final_layer_norm"]}


def settings(mode: str, kept: float, recompute: str = "none") -> lemo.LemoConfig:
    limits: dict[str, Any] = {"skip": {"keep": kept, "policy": "random"}, "dense": {}}.get(mode, {"keep": kept})
    if mode == "sparse":
        limits = {"density": kept}
    phase = lemo.Phase(mode, **limits)
    return lemo.LemoConfig(block_size=8, recompute=recompute, phases=[phase])


def started(model: Any) -> Any:
    """Trained weights that PEFT starts at zero are not."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad and not p.any():
            nn.init.normal_(p, std=0.1)
    return model.train()


def with_lora(family: str, targets: Any = None, **options: Any) -> Any:
    """LoRA on every linear layer unless `targets` says otherwise."""
    torch.manual_seed(3)
    targets = LINEARS[family] if targets is None else targets
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", **options)
    return started(peft.get_peft_model(base(family), config))


def whole(family: str, tied: bool) -> Any:
    return base(family, tie_word_embeddings=tied).train()


def outside(family: str) -> Any:
    return with_lora(family, modules_to_save=["embed_tokens", "lm_head", *NORMS[family]])


def two(family: str, **second: Any) -> Any:
    """Two adapters of which both are active."""
    model = with_lora(family)
    other = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=LINEARS[family][:3], task_type="CAUSAL_LM", use_rslora=True, **second
    )
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    return started(model)


def weighted(family: str) -> Any:
    """A third adapter, combined of two by PEFT, trains."""
    model = two(family)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "mean", combination_type="svd", svd_rank=3)
    model.set_adapter("mean")
    return started(model)


MODELS = {
    "all-linear": lambda f: with_lora(f, "all-linear"),
    "rsLoRA": lambda f: with_lora(f, use_rslora=True),
    "DoRA": lambda f: with_lora(f, use_dora=True),
    "rsLoRA and DoRA": lambda f: with_lora(f, use_rslora=True, use_dora=True),
    "some layers": lambda f: with_lora(f, layers_to_transform=[0, 2]),
    "rank patterns": lambda f: with_lora(f, rank_pattern={"q_proj": 2, "v_proj": 7}, alpha_pattern={"k_proj": 3}),
    "modules to save": outside,
    "new tokens": lambda f: with_lora(f, trainable_token_indices=[5, 6]),
    "two adapters": two,
    "two adapters, one DoRA": lambda f: two(f, use_dora=True),
    "weighted adapters": weighted,
    "every weight": lambda f: whole(f, tied=False),
    "every weight, tied": lambda f: whole(f, tied=True),
}
# Which of them the cheap path covers in every layer, so that no module is called.
CHEAP = ("all-linear", "rsLoRA", "DoRA", "rsLoRA and DoRA", "some layers", "rank patterns", "two adapters")


def both(model: Any, inputs: Any) -> Any:
    """Loss and gradients, apart from what is only rounding: a softmax does not see a number added to all its scores."""
    loss, found = gradients(model, inputs)
    return loss, {name: g for name, g in found.items() if not name.endswith("k_proj.bias")}


@pytest.mark.parametrize(
    ("kind", "family"),
    [(kind, "llama") for kind in MODELS]
    + [(kind, "opt") for kind in ("DoRA", "modules to save", "two adapters", "every weight, tied")],
)
def test_every_mode(kind: str, family: str) -> None:
    model, inputs = MODELS[kind](family), batch("right")
    loss, expected = both(model, inputs)
    for i, mode in enumerate(MODES):
        lemo.apply(model, settings(mode, 1.0, ("none", "full", "attention", "full")[i]))
        ours, got = both(model, inputs)
        torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
        assert_close(got, expected, 2e-5)
        lemo.remove(model)
        controller = lemo.apply(model, settings(mode, 0.5))
        ours, got = both(model, inputs)
        assert got.keys() == expected.keys() and all(g.isfinite().all() for g in got.values())
        if mode == "skip":
            assert set(controller.kept_ratios) != {1.0}
        lemo.remove(model)


@pytest.mark.parametrize("kind", MODELS)
def test_the_cheap_path(kind: str) -> None:
    """Modules that are called keep what PEFT keeps, several tensors of a layer's size each."""
    inner = MODELS[kind]("llama")
    inner = getattr(inner, "base_model", inner)
    linears = [m for n, m in inner.named_modules() if n.rpartition(".")[2] in LINEARS["llama"]]
    assert len(linears) == 3 * 7
    covered = [projection(m) is not None for m in linears]
    assert all(covered) if kind in CHEAP or kind in ("modules to save", "new tokens") else True
    assert not any(covered) if kind.startswith("every weight") else any(covered)


def test_switching_between_steps() -> None:
    """The adapter that is active trains, and the others keep their weights."""
    model, inputs = two("llama"), batch("right")
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = gradients(model, inputs)
    lemo.apply(model, settings("dense", 1.0))
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        loss, got = gradients(model, inputs)
        torch.testing.assert_close(loss, expected[name][0], rtol=1e-5, atol=0)
        assert_close(got, expected[name][1])
        assert all(f".{name}." in parameter for parameter in got)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "orthogonal", "gaussian", "eva", True])
def test_initializations_are_plain_lora_afterwards(init: Any) -> None:
    torch.manual_seed(3)
    options = {"eva_config": peft.EvaConfig(rho=1.0)} if init == "eva" else {}
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=init, **options
    )
    model, inputs = peft.get_peft_model(base("llama"), config), batch("plain")
    if init == "eva":
        data = [{"input_ids": inputs["input_ids"], "attention_mask": torch.ones(3, 37, dtype=torch.long)}]
        peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    model = started(model)
    assert all(projection(m.mlp.down_proj).a is not None for m in model.get_base_model().model.layers)
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings("skip", 1.0))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("merged", [False, True])
def test_merged_and_disabled_adapters(merged: bool) -> None:
    """What trains besides (norms here) sees the weights that the model has at the time."""
    model, inputs = with_lora("llama", use_dora=True, modules_to_save=["norm"]), batch("plain")
    if merged:
        model.merge_adapter()
    else:
        for m in model.modules():
            if isinstance(m, peft.tuners.lora.Linear):
                m.enable_adapters(False)
    loss, expected = gradients(model, inputs)
    assert expected and not any("lora" in name for name in expected)
    lemo.apply(model, settings("dense", 1.0))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


# --- DoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llama", "opt")])
def test_dora_of_other_families(family: str) -> None:
    kind = "packed" if FAMILIES[family].separates else "right"
    model, inputs = with_lora(family, use_dora=True), batch(kind)
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings("skip", 1.0, "full"))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected, 2e-5)


def test_a_dora_whose_magnitude_alone_trains_and_is_zero_somewhere() -> None:
    model, inputs = with_lora("llama", use_dora=True), batch("plain")
    for name, p in model.named_parameters():
        p.requires_grad_("magnitude" in name)
        if "magnitude" in name:
            p.data[3] = 0.0
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings("dense", 1.0, "full"))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


def test_dora_saves_no_more_than_lora() -> None:
    """Apart from its norms: what it needs of its output is computed again. PEFT keeps two tensors of the output."""
    rows, sizes = 512, {}
    for dora in (False, True):
        model = with_lora("llama", ["up_proj"], use_dora=dora)
        module = model.get_base_model().model.layers[0].mlp.up_proj
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def pack(t: torch.Tensor, saved: dict[int, int] = saved, own: set[int] = own) -> torch.Tensor:
            if t.untyped_storage().data_ptr() not in own:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        h = torch.randn(rows, 32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            lemo.engine.linear.linear_group((module,), h)[0].sum().backward()
        sizes[dora] = sum(saved.values())
    assert sizes[True] == sizes[False] + 4 * module.base_layer.out_features


def test_dora_on_the_head_keeps_whole_logits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = with_lora("llama", ["q_proj", "lm_head"], use_dora=True), batch("right")
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings("dense", 1.0))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
    assert sum("the segmented loss does not cover: logits are whole" in r.message for r in caplog.records) == 1
