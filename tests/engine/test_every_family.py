"""Every family against transformers' own modules: a few combinations that together touch everything a family defines.

What depends on the engine alone is tested with the two families of `LAYERS`, in all combinations (test_dense.py,
test_modes.py, test_sparse.py, test_memory.py and others).
"""

import lemo
import lemo.engine.policies
import pytest
import torch
from lemo.engine import families
from lemo.engine.families import UnsupportedModelError
from lemo.engine.memory import layer_shape, saved_bytes
from support import own_layers
from support.models import (
    ATTENTION,
    FAMILIES,
    LINEARS,
    VOCAB,
    assert_close,
    base,
    batch,
    gradients,
    lora,
    packed,
    reference_gradients,
    tuned,
)
from support.models import clone as copy_of
from support.saved import count
from support.tile_pairs import pairs_of
from torch import nn
from transformers import AutoModelForCausalLM

BLOCK = 8


def settings(mode="dense", recompute="none", **phase):
    phases = [lemo.Phase(mode, **phase)]
    return lemo.LemoConfig(block_size=BLOCK, recompute=recompute, phases=phases, seed=3)


def everything(family):
    """Names of what an adapter may be put on: projections, embedding and head."""
    return [*LINEARS[family], "embed_tokens", "lm_head"]


# --- everything kept: transformers itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("recompute", "kind"), [("none", "right"), ("attention", "left"), ("full", "packed")])
def test_lora_on_everything(family, recompute, kind):
    kind = "right" if kind == "packed" and not FAMILIES[family].separates else kind
    model, inputs = lora(base(family), everything(family)).train(), batch(kind)
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings(recompute=recompute))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("mode", "recompute"), [("skip", "none"), ("backward", "none"), ("dense", "full")])
def test_all_parameters_train(family, mode, recompute):
    """Weights, biases and norms of the base model: the general path of every module."""
    model, inputs = base(family).train(), batch("right")
    loss, expected = gradients(model, inputs)
    lemo.apply(model, settings(mode, recompute, keep=1.0))
    ours, got = gradients(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    for name in [name for name in expected if name.endswith("k_proj.bias") and "opt" not in name]:
        if got[name].norm() < 1e-5:
            # A softmax does not see one number added to all its scores: this gradient is 0 but for rounding.
            torch.testing.assert_close(got.pop(name), expected.pop(name), rtol=0, atol=1e-6)
    assert_close(got, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_a_loss_from_them(family):
    model, inputs = tuned(family), batch("right")
    mask = inputs["attention_mask"].bool()
    expected = model(**inputs)
    _, plain = gradients(model, inputs)
    config = settings()
    config.return_logits = True
    lemo.apply(model, config)
    got = model(**inputs)
    torch.testing.assert_close(got.logits[mask], expected.logits[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=0)
    assert_close(gradients(model, inputs)[1], plain)
    del inputs["labels"]  # then only the layers run through lemo
    torch.testing.assert_close(model(**inputs).logits[mask], expected.logits[mask], rtol=1e-5, atol=1e-5)


# --- the modes, from transformers' layers -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("recompute", "kind"), [("none", "left"), ("full", "packed")])
def test_skip(family, recompute, kind, chosen):
    model, inputs = lora(base(family), LINEARS[family]).train(), batch(kind)
    plain = copy_of(model)
    controller = lemo.apply(model, settings("skip", recompute, keep=0.5, policy="random"))
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed(family, inputs)
    rows = [k.rows.long() for k in chosen]
    assert len(rows) == 3 and all(0 < len(r) < len(ids) for r in rows)
    expected = own_layers.skip(own_layers.Model(plain, positions, document), ids, targets, rows)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected))
    assert 0 < controller.report()["loss_tokens"] < (targets != -100).sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("weighted", "kind", "recompute"), [(False, "packed", "full"), (True, "right", "none")])
def test_backward(family, weighted, kind, recompute, chosen):
    model, inputs = lora(base(family), LINEARS[family]).train(), batch(kind)
    plain = copy_of(model)
    policy = "sampled" if weighted else "random"
    lemo.apply(model, settings("backward", recompute, keep=0.5, policy=policy, weighted=weighted))
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed(family, inputs)
    weights = [k.weights[k.row_slots.long()] for k in chosen] if weighted else None
    sizes = chosen[0].source.offsets.diff()
    block = torch.repeat_interleave(torch.arange(len(sizes)), sizes.long())
    m = own_layers.Model(plain, positions, document)
    expected = own_layers.backward(m, ids, targets, [k.rows.long() for k in chosen], weights, block)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_sparse(family, monkeypatch):
    """Two documents of several tiles."""
    from lemo.engine.tiles import TileChooser

    choices, original = [], TileChooser._choose
    monkeypatch.setattr(
        TileChooser,
        "_choose",
        lambda self, layer: choices.append((layer, original(self, layer))) or choices[-1][1],
    )
    model = lora(base(family, max_position_embeddings=640), LINEARS[family]).train()
    plain = copy_of(model)
    torch.manual_seed(2)
    lengths = (520, 130)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions[None], "use_cache": False}
    controller = lemo.apply(model, settings("sparse", "attention", density=0.5))
    loss, got = gradients(model, inputs)
    targets = torch.nn.functional.pad(ids[0, 1:], (0, 1), value=-100)
    document = torch.repeat_interleave(torch.arange(2), torch.tensor(lengths))
    m = own_layers.Model(plain, positions, document)
    every = torch.arange(len(document))
    masks = {layer.layer: pairs_of(layer.rows, lists) for layer, lists in choices}
    windows = families.find(plain)[0].windows(plain.config, max(lengths))
    assert [i for i in range(3) if windows[i] is None] == sorted(masks)  # the others compute all that a window shows
    expected = own_layers.skip(m, ids[0], targets, [every] * 3, [masks.get(i) for i in range(3)])
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected))
    assert [i for i, d in enumerate(controller.report()["density"]) if d < 1] == sorted(masks)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["attention", "all"])
def test_the_memory_formula_is_exact(family, where, monkeypatch):
    targets = ATTENTION[family] if where == "attention" else LINEARS[family]
    for recompute in ("none", "attention", "full"):
        model = lora(base(family), targets).train()
        config = settings("skip", recompute, keep=0.5, policy="random")
        got, rows, _ = count(model, config, monkeypatch)
        shape = layer_shape(model.config, element=4, lora_rank=4, lora_targets=targets)
        layers = [saved_bytes(shape.at(i), m, recompute=recompute, documents=2) for i, m in enumerate(rows)]
        assert got == sum(layers), recompute


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_those_of_the_modules(family):
    model = base(family)
    own, lm = families.find(model)
    assert families.of(model.config) is own
    shape = own.shape(model.config)
    weights = lemo.estimate(model.config, settings("skip", keep=0.5), 512, element=4)["phases"][0]["weights"]
    adapters = 16 * 8 * 3 * sum(sum(shape.projections[own.projections[name]]) for name in own.lora_targets)
    # Norms count as vectors without a bias.
    parameters = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n or n.endswith(".weight"))
    assert weights - adapters == 4 * parameters
    assert list(own.lora_targets) == ATTENTION[family] and set(LINEARS[family]) <= set(own.projections)
    for layer in own.layers(own.decoder(lm)):
        linears = {n.rpartition(".")[2]: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        assert set(linears) <= set(own.projections)
        for name, linear in linears.items():
            role = own.projections[name]
            assert shape.projections[role] == (linear.in_features, linear.out_features), name
            assert (linear.bias is not None) == (role in shape.biases), name


# --- what stays the model's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_generation_and_files(family, tmp_path):
    """Untouched by lemo; and a saved adapter on a saved base is the model that was trained."""
    from peft import PeftModel

    model, inputs = tuned(family).eval(), batch("plain")
    expected = model(**inputs)
    prompt = inputs["input_ids"][:1, :5]
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
    lemo.apply(model, settings("skip", keep=0.5, policy="random"))
    got = model(**inputs)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.logits, expected.logits)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), tokens)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    gradients(model.train(), inputs)
    optimizer.step()
    lemo.remove(model)
    trained = model.eval()(**inputs).logits
    assert not torch.equal(trained, expected.logits)
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", **families.loading(model.config)), tmp_path / "adapter"
    )
    torch.testing.assert_close(again.eval()(**inputs).logits, trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_modules_are_refused(family):
    """Every module whose forward lemo stands in for, by its path."""
    model = base(family).train()
    own, _ = families.find(model)
    places = [path for path in own.outer_modules if path]
    last = f"{own.layers_path}.2"
    places += [f"{last}.{path}" if path else last for path in own.layer_modules]
    modules = dict(model.named_modules())
    places = [place for place in places if place in modules]  # layers of a model may differ
    assert len(places) >= 7
    for place in places:
        handle = modules[place].register_forward_hook(lambda *_: None)
        with pytest.raises(UnsupportedModelError, match=rf"lemo does not support {place}: .*(lemo\.remove)"):
            lemo.apply(model, settings())
        handle.remove()
    lemo.apply(model, settings())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cheap_path_covers_every_module(family):
    """A step checks what local graphs reach only if some module is called as it is."""
    model = lora(base(family), LINEARS[family]).train()
    own, lm = families.find(model)
    assert not lemo.engine.checks.loose_modules(own, own.layers(own.decoder(lm)))
