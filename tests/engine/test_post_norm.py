"""Norms behind residual sums, and a projection before the head: what the tests of every family do not reach."""

import types

import lemo
import lemo.engine.backward
import lemo.engine.step
import pytest
import torch
from lemo.engine import budget
from lemo.engine.loss import head_input
from lemo.engine.memory import layer_shape
from lemo.engine.policies import Random, UpdateNorm
from support import own_layers
from support.models import ATTENTION, LINEARS, assert_close, base, batch, clone, gradients, lora, packed, tuned
from support.saved import count

FAMILY, BLOCK = "opt_350m", 8


def settings(recompute="none", mode="skip", keep=0.5, policy="random", **phase):
    options = {} if mode == "dense" else {"keep": keep, "policy": policy}
    phases = [lemo.Phase(mode, **options, **phase)]
    return lemo.LemoConfig(block_size=BLOCK, recompute=recompute, phases=phases, seed=3)


def run(recompute="none", targets=None, **phase):
    model = lora(base(FAMILY), targets or LINEARS[FAMILY]).train()
    lemo.apply(model, settings(recompute, **phase))
    return gradients(model, batch("right"))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_kept_rows_are_normalized_and_the_others_left_alone(recompute, chosen, monkeypatch):
    """Against transformers' layers in float64, on the kept rows; and what policies are told that a layer changed."""
    observed: list[torch.Tensor] = []
    monkeypatch.setattr(Random, "needs_update", True)
    monkeypatch.setattr(Random, "observe", lambda self, i, norms, kept: observed.append(norms))
    model, inputs = tuned(FAMILY), batch("right")
    plain = clone(model).double()
    lemo.apply(model, settings(recompute))
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed(FAMILY, inputs)
    m = own_layers.Model(plain, positions, document)
    rows = [k.rows.long() for k in chosen]
    x = m.embed(ids)
    for i, kept in enumerate(rows):
        before = x
        x = x.index_copy(0, kept, m.layer(i, x[kept], kept, own_layers.masked(kept, m.visible(kept))))
        gone = torch.ones(len(x), dtype=torch.bool).index_fill(0, kept, False)
        assert torch.equal(x[gone], before[gone])
        changed = (x - before).detach()[kept].norm(dim=1).float()
        torch.testing.assert_close(observed[i], changed, rtol=1e-5, atol=1e-6)
    expected = m.loss(x, targets.masked_fill(~torch.isin(torch.arange(len(ids)), torch.cat(rows)), -100))
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=0)
    plain.zero_grad()
    expected.backward()
    assert_close(got, {n: p.grad.float() for n, p in plain.named_parameters() if p.grad is not None})


PHASES = {
    "skip": {},
    "another list for the MLP": {"mlp_keep": 0.25},
    "backward": {"mode": "backward", "weighted": True, "policy": "sampled"},
    "dense": {"mode": "dense"},
}


@pytest.mark.parametrize("recompute", ["attention", "full"])
@pytest.mark.parametrize("phase", PHASES)
def test_pieces_of_rows_and_of_the_backward_pass_are_the_whole(phase, recompute, monkeypatch):
    """MLPs in pieces of rows, and attention apart from its projections."""
    options = PHASES[phase]
    expected = run(recompute, **options)
    monkeypatch.setattr(lemo.engine.step, "MLP_ROWS", 16)
    for most in (1 << 30, 0):
        monkeypatch.setattr(lemo.engine.backward, "SEPARATE_BYTES", most)
        loss, got = run(recompute, **options)
        assert torch.equal(loss, expected[0])
        assert_close(got, expected[1])


@pytest.mark.parametrize("where", ["attention", "all"])
def test_bytes_of_separate_lists(where, monkeypatch):
    targets = ATTENTION[FAMILY] if where == "attention" else LINEARS[FAMILY]
    for recompute in ("none", "attention", "full"):
        model = lora(base(FAMILY), targets).train()
        config = settings(recompute, mlp_keep=0.25)
        config.always_first = 1
        got, _, _ = count(model, config, monkeypatch)
        shape = layer_shape(model.config, element=4, lora_rank=4, lora_targets=targets)
        phase = config.phases[0]
        lists = budget.layer_lists(config, phase, (64, 64), [None] * 3)
        assert got == sum(budget.layer_bytes(shape, of_layer, phase, recompute).total for of_layer in lists), recompute


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_exact_pass_says_what_changed(recompute, monkeypatch):
    observed: list[torch.Tensor] = []
    monkeypatch.setattr(UpdateNorm, "observe", lambda self, i, norms, kept: observed.append(norms))
    model, inputs = tuned(FAMILY), batch("plain")
    states = model(**inputs, output_hidden_states=True).hidden_states  # the last one is projected
    lemo.apply(model, settings(recompute, mode="backward", policy="update_norm"))
    model(**inputs)
    assert len(observed) == 3
    for norms, before, after in zip(observed[:2], states, states[1:3], strict=False):
        torch.testing.assert_close(norms, (after - before).norm(dim=-1).flatten(), rtol=1e-4, atol=1e-5)


def test_adapters_of_the_projection_that_processes_cannot_share_are_refused():
    model = lora(base(FAMILY), ["project_out"], use_dora=True)
    project = model.get_base_model().model.decoder.project_out
    x = torch.randn(5, 32)
    alone = types.SimpleNamespace(share=None, weights=types.SimpleNamespace(fleeting=False))
    torch.testing.assert_close(head_input(x, None, project, alone), project(x))
    for shared in ({"share": object()}, {"weights": types.SimpleNamespace(fleeting=True)}):
        step = types.SimpleNamespace(**vars(alone) | shared)
        with pytest.raises(ValueError, match=r"project_out is a Linear whose adapter several processes .*plain LoRA"):
            head_input(x, None, project, step)
