"""Applying, removing and applying again, whoever else wraps `forward` in between; copies and pickles of the model."""

import copy
import functools
import io
import pickle
import types

import lemo
import pytest
import torch
from accelerate import Accelerator
from support.models import assert_close, base, batch, gradients, tuned
from torch import nn

SKIP = [lemo.Phase("skip", keep=0.5, policy="random")]


def settings(**options):
    return lemo.LemoConfig(**{"block_size": 8, "phases": SKIP, **options})


def accelerate(model):
    """What Accelerate does for mixed precision: wraps the bound method, and hides it in an object."""
    Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


def closure(model):
    """What TRL does: keeps the bound method in a closure, under the class's name and signature."""
    before = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        return before(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


def partial(model):
    model.forward = functools.partial(model.forward)


def runs_lemo(model, controller):
    controller.seek(0)
    controller.kept_ratios = []
    model.train()(**batch("plain")).loss.backward()
    return len(controller.kept_ratios) > 0 and max(controller.kept_ratios) < 1


def assert_same(got, expected):
    """Up to the rounding of bfloat16, which Accelerate's wrapper brings in."""
    assert (got - expected).norm() < 0.03 * expected.norm()


WRAPPERS = [accelerate, closure, partial]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_remove_and_apply_again_under_a_wrapper(wrap):
    model, inputs = base("llama").train(), batch("plain")
    expected = model(**inputs).logits
    controller = lemo.apply(model, settings())
    wrap(model)
    assert runs_lemo(model, controller)
    for _ in range(3):
        lemo.remove(model)
        assert not [name for name in (*model.__dict__, *model.model.__dict__) if "lemo" in name]
        assert_same(model(**inputs).logits, expected)
        controller = lemo.apply(model, settings())
        assert runs_lemo(model, controller)
        assert "logits" not in model(**inputs)  # through the segmented loss, not the wrapper's way around it
    wrap(model)
    assert runs_lemo(model, controller)
    lemo.remove(model)
    model.eval()
    assert_same(model(**inputs).logits, expected)


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_before_apply(wrap):
    model, inputs = base("llama").train(), batch("plain")
    wrap(model)
    own = model.__dict__["forward"]
    expected = model(**inputs).logits
    controller = lemo.apply(model, settings())
    assert runs_lemo(model, controller)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    lemo.remove(model)
    assert model.__dict__["forward"] == own
    assert torch.equal(model(**inputs).logits, expected)


def test_every_order_of_wrapping_and_removing():
    model, inputs = base("llama").train(), batch("plain")
    expected = model(**inputs).logits
    lemo.apply(model, settings())
    closure(model)
    lemo.remove(model)
    partial(model)
    lemo.apply(model, settings())
    closure(model)
    lemo.remove(model)
    controller = lemo.apply(model, settings())
    assert runs_lemo(model, controller)
    lemo.remove(model)
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_accelerate_unwraps_its_own_wrapper_only():
    model = base("llama").train()
    controller = lemo.apply(model, settings())
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    accelerator.unwrap_model(accelerator.prepare_model(model), keep_fp32_wrapper=False)
    assert runs_lemo(model, controller)
    assert "logits" not in model(**batch("plain"))
    lemo.remove(model)
    assert "forward" not in model.__dict__


def test_a_forward_replaced_by_someone_else_stays_theirs():
    model = base("llama").train()
    lemo.apply(model, settings())

    def theirs(self, input_ids=None, **kwargs):
        return "theirs"

    model.forward = types.MethodType(theirs, model)
    lemo.remove(model)
    assert model(input_ids=None) == "theirs"
    assert "forward" not in model.model.__dict__


def test_a_deep_copy_trains_itself():
    model, inputs = tuned("llama"), batch("plain")
    controller = lemo.apply(model, settings())
    gradients(model, inputs)
    controller.step()
    twin = copy.deepcopy(model)
    theirs = twin.get_base_model().__dict__["_lemo"].controller
    assert theirs is not controller
    assert theirs.model is twin.get_base_model()
    assert theirs.step_index == controller.step_index == 1
    loss, expected = gradients(model, inputs)
    model.zero_grad()
    other, got = gradients(twin, inputs)
    assert torch.equal(other, loss)
    assert_close(got, expected, 1e-7)
    assert all(p.grad is None for p in model.parameters())
    lemo.remove(twin)
    assert runs_lemo(model, controller)


@pytest.mark.parametrize("wrap", [None, closure, accelerate])
def test_a_pickled_model_loads_plain(wrap):
    model, inputs = base("llama").train(), batch("plain")
    expected = model(**inputs)
    lemo.apply(model, settings())
    gradients(model, inputs)
    if wrap is not None:
        wrap(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    again = loaded(**inputs)
    assert torch.equal(again.logits, expected.logits)
    controller = lemo.apply(loaded, settings())
    assert runs_lemo(loaded, controller)
    lemo.remove(loaded)
    assert torch.equal(loaded(**inputs).logits, expected.logits)


def test_a_pickled_peft_model_loads_plain():
    model, inputs = tuned("llama"), batch("plain")
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    again, got = gradients(pickle.loads(pickle.dumps(model)), inputs)
    assert torch.equal(again, loss)
    assert_close(got, expected, 1e-7)


def test_a_controller_is_not_pickled():
    controller = lemo.apply(tuned("llama"), settings())
    with pytest.raises(TypeError, match="cannot be pickled: save the model"):
        pickle.dumps(controller)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # transformers 5.24 renamed the argument
def test_a_cache_is_refused_in_training(name):
    from transformers import DynamicCache

    model = tuned("llama")
    lemo.apply(model)
    with pytest.raises(ValueError, match=r"past_key_values \(cache\) is not available in training"):
        model(**batch("plain"), **{name: DynamicCache()})
