"""Quantized bases: weights are made dense as they are used, again in the backward pass, and never kept."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import lemo
import lemo.engine.linear
import lemo.engine.memory
import lemo.engine.stack
import pytest
import torch
import torch.nn.functional as F
from lemo.engine.forward import forward
from lemo.engine.linear import Form, projection
from lemo.engine.memory import layer_shape, stored_bytes
from support.models import LAYERS, LINEARS, assert_close, base, batch, gradients, lora
from torch import nn


class Int8(nn.Linear):
    """One byte per weight and a scale per output, transposed, so that no shape is that of the dense weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        scale = linear.weight.detach().abs().amax(1) / 127
        stored = (linear.weight.detach() / scale[:, None]).round().to(torch.int8).t().contiguous()
        self.weight = nn.Parameter(stored, requires_grad=False)
        bias = linear.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), False))
        self.register_buffer("scale", scale)

    def dense(self, stored):
        return stored.t().float() * self.scale[:, None]

    def forward(self, x):
        return F.linear(x, self.dense(self.weight), self.bias)


def quantize(model, names):
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is nn.Linear and name in names:
                module._modules[name] = Int8(child)
    return model


@pytest.fixture
def known(monkeypatch):
    """lemo knows the class; every call that makes a weight dense."""
    calls = []

    def form(linear):
        return Form(lambda stored: calls.append(linear) or linear.dense(stored), linear.out_features)

    monkeypatch.setitem(lemo.engine.linear.QUANTIZED, f"{Int8.__module__}.Int8", form)
    return calls


def settings(recompute="none", mode="dense", **options):
    return lemo.LemoConfig(block_size=8, recompute=recompute, phases=[lemo.Phase(mode, **options)])


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", LAYERS)
def test_gradients_are_those_of_plain_training(family, recompute, known):
    model = lora(quantize(base(family), [*LINEARS[family], "lm_head"]), LINEARS[family]).train()
    inputs = batch("right")
    loss, expected = gradients(model, inputs)
    assert not known
    controller = lemo.apply(model, settings(recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)
    assert len(known) > 2 * 3 * len(LINEARS[family])  # forward and backward, every layer
    assert not controller._notes  # the segmented loss covers the head too


def test_an_unknown_kind_is_called_as_a_module():
    model = lora(quantize(base("llama"), LINEARS["llama"]), LINEARS["llama"]).train()
    assert projection(model.get_base_model().model.layers[0].mlp.up_proj) is None
    inputs = batch("right")
    _, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    assert_close(gradients(model, inputs)[1], expected)


@pytest.mark.parametrize("mode", ["skip", "backward"])
def test_what_a_step_saves_is_what_a_dense_base_saves(mode, known, monkeypatch):
    """Bytes that are alive after the forward pass of the layers, apart from the model."""
    saved = []

    def spy(step, x):
        packs = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: packs.append(t.detach()) or len(packs) - 1, packs.__getitem__
        ):
            forward(step, x)
        saved.append({(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in packs})

    monkeypatch.setattr(lemo.engine.stack, "forward", spy)
    sizes = []
    for change in (lambda m: m, lambda m: quantize(m, LINEARS["llama"])):
        model = lora(change(base("llama")), LINEARS["llama"]).train()
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        lemo.apply(model, settings(mode=mode, keep=0.5, policy="random"))
        model(**batch("plain"))
        sizes.append(sum(n for pointer, n in saved[-1] if pointer not in own))
        del model
        gc.collect()
    assert sizes[0] == sizes[1]


def test_memory_counts_weights_as_they_are_stored():
    plain, small = base("llama"), quantize(base("llama"), LINEARS["llama"])
    shape = layer_shape(plain.config, element=4)
    layers = 3 * sum(a * b for a, b in shape.projections.values())
    outputs = 3 * sum(b for _, b in shape.projections.values())
    buffers = sum(b.nbytes for b in plain.buffers())
    assert stored_bytes(plain) == sum(p.nbytes for p in plain.parameters()) + buffers
    assert stored_bytes(small) == stored_bytes(plain) - 4 * layers + layers + 4 * outputs
    assert stored_bytes(lora(copy.deepcopy(small), ["q_proj"])) == stored_bytes(small)
    config = lemo.LemoConfig(phases=[lemo.Phase("skip", keep=0.5)], recompute="full")
    dense, stored = (lemo.estimate(m, config, 4096, element=4)["phases"][0] for m in (plain, small))
    by_shape = lemo.estimate(plain.config, config, 4096, element=4)["phases"][0]
    assert dense["weights"] - stored["weights"] == 3 * layers - 4 * outputs
    assert by_shape["weights"] + buffers == dense["weights"]
    assert dense["saved"] == stored["saved"]
    assert stored["working"] >= dense["working"]


# --- libraries that quantize ------------------------------------------------------------------------------------------


def bitsandbytes(bits: int) -> Callable[[Any], Any]:
    """Every linear layer of the layers in 4 or 8 bits of bitsandbytes, which runs on the CPU too."""

    def change(model: Any) -> Any:
        bnb = pytest.importorskip(
            "bitsandbytes", reason="bitsandbytes is not installed (make quantized runs this with it)"
        )
        for module in list(model.modules()):
            for name, child in list(module._modules.items()):
                if type(child) is not nn.Linear or name not in LINEARS["llama"]:
                    continue
                sizes, weight = (child.in_features, child.out_features), child.weight.detach()
                if bits == 4:
                    made = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
                    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
                else:
                    made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
                    made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
                module._modules[name] = made.to("cpu")
        setattr(model, f"is_loaded_in_{bits}bit", True)  # as from_pretrained does; PEFT looks for it
        return model

    return change


def torchao(config: str, **options: Any) -> Callable[[Any], Any]:
    """Every linear layer, the head included, by torchao."""

    def change(model: Any) -> Any:
        reason = "torchao is not installed (make quantized runs this with it)"
        quantization = pytest.importorskip("torchao.quantization", reason=reason)
        if not hasattr(quantization, config):
            pytest.skip(f"this torchao has no {config}")
        quantization.quantize_(model, getattr(quantization, config)(**options))
        return model

    return change


LIBRARIES = {
    "bitsandbytes 4": bitsandbytes(4),
    "bitsandbytes 8": bitsandbytes(8),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int4": torchao("IntxWeightOnlyConfig", weight_dtype=getattr(torch, "int4", None)),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
}


def quantized(library: str, **options: Any) -> Any:
    model = LIBRARIES[library](base("llama", hidden_size=64, intermediate_size=128))
    return lora(model, LINEARS["llama"], **options).train()


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated", "ignore:Merge lora", "ignore:Unmerge lora")
@pytest.mark.parametrize(("library", "dora"), [(name, False) for name in LIBRARIES] + [("bitsandbytes 4", True)])
def test_libraries_that_quantize(library: str, dora: bool) -> None:
    """Loss and gradients of PEFT, before and after the first call, at which some of them change their state."""
    model, inputs = quantized(library, use_dora=dora), batch("right")
    module = model.get_base_model().model.layers[0].mlp.up_proj
    found = projection(module)
    assert found is not None and found.dense_weight().shape == (128, 64) == (found.width, 64)
    loss, expected = gradients(model, inputs)
    for recompute in ("none", "full"):
        controller = lemo.apply(model, settings(recompute, "skip", keep=1.0))
        ours, got = gradients(model, inputs)
        torch.testing.assert_close(ours, loss, rtol=1e-4, atol=0)
        assert_close(got, expected, 1e-4)
        assert not controller._notes  # the segmented loss covers the head too
        lemo.remove(model)
    fresh = quantized(library, use_dora=dora)
    lemo.apply(fresh, settings())
    torch.testing.assert_close(gradients(fresh, inputs)[0], loss, rtol=1e-4, atol=0)
    dense = base("llama", hidden_size=64, intermediate_size=128)
    assert stored_bytes(model) < 0.6 * stored_bytes(dense)
    assert lemo.engine.memory.quantized(model) and not lemo.engine.memory.quantized(dense)


@pytest.mark.filterwarnings("ignore:Merge lora", "ignore:Unmerge lora")
@pytest.mark.parametrize("library", ["bitsandbytes 4", "bitsandbytes 8"])
def test_merged_into_a_quantized_base(library: str) -> None:
    """Weights are read when they are used: after a merge the merged ones, and after its end the adapter's too."""
    model, inputs = quantized(library, modules_to_save=["norm"]), batch("right")
    for merge in (model.merge_adapter, model.unmerge_adapter):
        merge()
        loss, expected = gradients(model, inputs)
        lemo.apply(model, settings())
        ours, got = gradients(model, inputs)
        torch.testing.assert_close(ours, loss, rtol=1e-4, atol=0)
        assert_close(got, expected, 1e-4)
        assert any("lora_A" in name for name in got) == (merge == model.unmerge_adapter)
        lemo.remove(model)
