"""With recompute="none": what is made again instead of being saved, and gradients in the memory of saved tensors."""

import gc
import weakref

import lemo
import pytest
import torch
from lemo.engine import elementwise, segments
from lemo.engine.families import gemma, llama, phi3
from lemo.engine.linear import Again, LinearGroup, made_here, remade
from lemo.engine.records import Records
from support.models import ATTENTION, FAMILIES, LINEARS, assert_close, base, batch, gradients, lora
from support.peak import peak_bytes

SKIP = lemo.LemoConfig(block_size=8, phases=[lemo.Phase("skip", policy="random")], recompute="none")


def adapted(family, **options):
    torch.manual_seed(0)
    targets = LINEARS[family] if FAMILIES[family].mlp else ATTENTION[family]
    return lora(base(family), targets, **options).train()


def step(family, **options):
    model = adapted(family, **options)
    lemo.apply(model, SKIP)
    return gradients(model, batch("right"))


def save_all(monkeypatch):
    """Nothing is made again, and no memory is used twice."""
    for module in (segments, elementwise):
        monkeypatch.setattr(module, "remade", lambda x, again: x)
    for module in (llama, phi3, gemma):
        monkeypatch.setattr(module, "made_here", lambda y: False)


@pytest.mark.parametrize(
    ("family", "options"), [*((name, {}) for name in FAMILIES), ("llama", {"use_dora": True})], ids=str
)
def test_gradients_are_those_of_saved_inputs_bit_for_bit(family, options, monkeypatch):
    made = []

    def spy(x, again):
        return remade(x, Again(lambda *tensors: made.append(0) or again.make(*tensors), again.tensors))

    monkeypatch.setattr(segments, "remade", spy)
    loss, grads = step(family, **options)
    assert made
    save_all(monkeypatch)
    theirs, others = step(family, **options)
    assert torch.equal(loss, theirs) and grads.keys() == others.keys()
    assert all(torch.equal(g, others[name]) for name, g in grads.items())


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_outputs_that_a_hook_has_seen_keep_their_values(family, recompute):
    """A hooked module is called, and what it gave belongs to its caller."""
    model, seen = adapted(family), []

    def look(module, args, output):
        seen.append((output.detach(), output.detach().clone()))

    mlp = model.get_base_model().model.layers[1].mlp
    (mlp.gate_up_proj if family == "phi3" else mlp.up_proj).register_forward_hook(look)
    lemo.apply(model, lemo.LemoConfig(block_size=8, phases=SKIP.phases, recompute=recompute))
    found = gradients(model, batch("right"))
    assert seen and all(torch.equal(now, before) for now, before in seen)
    theirs = step(family)
    assert_close(found[1], theirs[1])


def test_only_what_the_cheap_path_made_counts_as_its_own():
    h, w = torch.randn(4, 8).requires_grad_(), torch.randn(6, 8)
    (y,) = LinearGroup.apply(h, [(1.0, None)], True, None, w, None, None, None, None)
    assert made_here(y) and not made_here(h @ w.t()) and not made_here(h)


def test_a_pass_without_a_backward_pass_is_freed_at_once(monkeypatch):
    """What makes an input again holds rows and weights, nothing that holds the graph: there is no cycle."""
    rows, put = [], Records.put
    monkeypatch.setattr(Records, "put", lambda self, r: (rows.append(weakref.ref(r.x_kept)), put(self, r))[1])
    model = adapted("llama")
    lemo.apply(model, SKIP)
    gc.collect()
    gc.disable()
    try:
        output = model(**batch("right"))
        assert rows and all(r() is not None for r in rows)
        del output
        assert [r() for r in rows] == [None] * len(rows)
    finally:
        gc.enable()


@pytest.mark.parametrize("phase", ["dense", "skip", "backward"])
@pytest.mark.parametrize("targets", [ATTENTION["llama"], LINEARS["llama"]], ids=["attention", "all"])
def test_peaks_are_those_of_the_estimate(phase, targets, monkeypatch):
    """All that is allocated at a time, in the proportions of Llama-3-8B."""
    monkeypatch.setattr(lemo.engine.memory, "_LOSS_BYTES", 0)
    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 448}
    model = lora(base("llama", layers=4, **sizes, max_position_embeddings=2048), targets).train()
    config = lemo.LemoConfig(
        phases=[lemo.Phase(phase, policy=None if phase == "dense" else "random")], recompute="none"
    )
    lemo.apply(model, config)
    ids = torch.randint(3, 80, (1, 2048))

    def run():
        model(input_ids=ids, labels=ids).loss.backward()

    run()
    model.zero_grad()
    found = lemo.estimate(model, config, 2048, element=4, lora_rank=4, lora_targets=targets)["phases"][0]
    assert peak_bytes(run) == pytest.approx(found["saved"] + found["working"], rel=0.05)


@pytest.mark.parametrize("phase", ["dense", "skip", "backward", "sparse"])
def test_the_first_step_takes_no_more_memory_than_later_ones(phase):
    """A run does not fail in its first step for what it needs only once."""
    model = lora(base("llama", layers=3, hidden_size=256, max_position_embeddings=1024), ATTENTION["llama"]).train()
    lemo.apply(model, lemo.LemoConfig(phases=[lemo.Phase(phase, **({"keys": 256} if phase == "sparse" else {}))]))
    ids = torch.randint(3, 80, (1, 1024))

    def run():
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()

    first, later = peak_bytes(run), peak_bytes(run)
    kept = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    kept += 2 * 1024 * model.config.head_dim * 4  # positions' cosines and sines
    assert first - kept <= 1.01 * later
