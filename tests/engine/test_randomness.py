"""What is recomputed draws what the forward pass drew, whoever draws; mode "backward" refuses it before training."""

import logging
import random

import lemo
import peft
import pytest
import torch
import torch.nn.functional as F
from support.models import ATTENTION, LINEARS, assert_close, base, batch, gradients, lora, tuned
from torch import nn

DENSE = [lemo.Phase("dense")]
SKIP_THEN_BACKWARD = [lemo.Phase("skip", policy="random", share=4), lemo.Phase("backward", share=1)]


def settings(recompute="none", phases=DENSE):
    return lemo.LemoConfig(block_size=8, recompute=recompute, phases=phases)


def adapter(kind, **options):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base("llama"), config).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


class Noisy(nn.Linear):
    """A projection of someone's own that draws: with torch, and with Python."""

    def forward(self, x):
        keep = random.random() < 0.5
        return super().forward(x) * (1.0 + 0.5 * torch.rand(self.out_features)) if keep else 2 * super().forward(x)


def noisy():
    model = tuned("llama")
    for layer in model.get_base_model().model.layers:
        layer.mlp.down_proj.__class__ = Noisy
        layer.mlp.down_proj.requires_grad_()
    return model


def hooked():
    model = tuned("llama")
    for layer in model.get_base_model().model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda m, args, y: F.dropout(y, 0.3, training=m.training))
    return model


def random_activation():
    model = lora(base("llama"), LINEARS["llama"]).train()
    for layer in model.get_base_model().model.layers:
        layer.mlp.act_fn = nn.RReLU(0.1, 0.9)
    return model


DRAWING = {
    "loha": lambda: adapter("LoHaConfig", r=4, target_modules=LINEARS["llama"], rank_dropout=0.3, init_weights=False),
    "lokr": lambda: adapter("LoKrConfig", r=4, target_modules=LINEARS["llama"], rank_dropout=0.3, init_weights=False),
    "loha module": lambda: adapter("LoHaConfig", r=4, target_modules=LINEARS["llama"], module_dropout=0.5),
    "boft": lambda: adapter("BOFTConfig", boft_block_size=4, target_modules=ATTENTION["llama"], boft_dropout=0.3),
    "oft": lambda: adapter("OFTConfig", r=0, oft_block_size=4, target_modules=ATTENTION["llama"], module_dropout=0.3),
    "pvera": lambda: adapter("PveraConfig", r=4, target_modules=["q_proj", "o_proj"]),
    "lora": lambda: lora(base("llama"), LINEARS["llama"], lora_dropout=0.3).train(),
    "dora": lambda: lora(base("llama"), LINEARS["llama"], lora_dropout=0.3, use_dora=True).train(),
    "model": lambda: tuned("opt", dropout=0.3),
    "activation": random_activation,
}
MAY_DRAW = {"own module": noisy, "hook": hooked}


def made(make):
    try:
        return make()
    except AttributeError:
        pytest.skip("this peft does not have it")


def seeded(model, inputs):
    torch.manual_seed(5)
    random.seed(5)
    return gradients(model, inputs)


@pytest.mark.parametrize("kind", [*DRAWING, *MAY_DRAW])
@pytest.mark.parametrize(
    ("recompute", "phase"),
    [("full", lemo.Phase("dense")), ("attention", lemo.Phase("skip", policy="random", mlp_keep=0.25))],
)
def test_recomputation_draws_the_same(kind, recompute, phase):
    """Saving everything recomputes nothing: with the same seed the gradients are the same."""
    model, inputs = made({**DRAWING, **MAY_DRAW}[kind]), batch("right")
    results = []
    for how in ("none", recompute):
        lemo.apply(model, settings(how, [phase]))
        results.append(seeded(model, inputs))
        state = torch.get_rng_state(), random.getstate()
        lemo.remove(model)
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[1][1], results[0][1])
    seeded(model.eval(), inputs)
    # The generators go on as after a forward pass: what was replayed leaves them alone.
    model.train()
    lemo.apply(model, settings("none", [phase]))
    seeded(model, inputs)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]


@pytest.mark.parametrize("kind", ["loha", "lokr", "boft", "pvera", "activation", "own module"])
def test_draws_as_without_lemo(kind):
    """Without padding these draw the same numbers for packed rows as for a batch."""
    model, inputs = made({**DRAWING, **MAY_DRAW}[kind]), batch("plain")
    model.config.use_cache = False
    loss, expected = seeded(model, inputs)
    lemo.apply(model, settings("full"))
    ours, got = seeded(model, inputs)
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=0)
    assert_close(got, expected, 2e-5)


@pytest.mark.parametrize("kind", DRAWING)
def test_a_later_backward_phase_is_refused_at_apply(kind):
    model = made(DRAWING[kind])
    with pytest.raises(ValueError, match=r'mode "backward".*rank_dropout'):
        lemo.apply(model, settings(phases=SKIP_THEN_BACKWARD))
    assert "_lemo" not in model.get_base_model().__dict__


def test_adapters_that_came_after_apply_are_checked_before_training():
    model = base("llama")
    controller = lemo.apply(model, settings(phases=SKIP_THEN_BACKWARD))
    controller.total_steps = 10
    late = lora(model, LINEARS["llama"], lora_dropout=0.1).train()
    with pytest.raises(ValueError, match=r'mode "backward".*lora_dropout'):
        late(**batch("plain"))
    assert all(p.grad is None for p in late.parameters())


def test_phases_that_are_over_do_not_matter():
    model, inputs = tuned("opt"), batch("plain")
    controller = lemo.apply(model, settings(phases=[lemo.Phase("backward"), lemo.Phase("dense")]))
    controller.total_steps = 2
    gradients(model, inputs)
    controller.step()
    for layer in model.get_base_model().model.decoder.layers:
        layer.dropout = 0.1
    gradients(model, inputs)
    controller.seek(0)
    with pytest.raises(ValueError, match='mode "backward"'):
        model(**inputs)


@pytest.mark.parametrize("kind", MAY_DRAW)
def test_what_may_draw_is_watched_in_mode_backward(kind):
    model = MAY_DRAW[kind]()
    lemo.apply(model, settings(phases=[lemo.Phase("backward")]))
    with pytest.raises(ValueError, match="layer 0 drew random numbers"):
        model(**batch("plain"))


def test_what_may_draw_and_does_not():
    model, inputs = tuned("llama"), batch("plain")
    model.get_base_model().model.layers[0].mlp.up_proj.register_forward_hook(lambda m, args, y: 2 * y)
    _, expected = gradients(model, inputs)
    lemo.apply(model, settings(phases=[lemo.Phase("backward", keep=1.0)]))
    assert_close(gradients(model, inputs)[1], expected)


def test_dropout_of_a_layer_in_evaluation_mode():
    model, inputs = tuned("opt", dropout=0.3), batch("plain")
    for layer in model.get_base_model().model.decoder.layers:
        layer.eval()
    _, expected = gradients(model, inputs)
    lemo.apply(model, settings())
    assert_close(gradients(model, inputs)[1], expected)


# --- phases that a run never reaches ----------------------------------------------------------------------------------


def test_a_phase_without_steps_is_said(caplog):
    model, inputs = tuned("llama"), batch("plain")
    controller = lemo.apply(model, lemo.LemoConfig(block_size=8))
    controller.total_steps = 3
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            gradients(model, inputs)
            controller.step()
    said = [r.message for r in caplog.records if "has none of the run's 3 steps" in r.message]
    assert said == [
        "phase 1 (dense) has none of the run's 3 steps: with a share of 0.135 it needs a run of 4 steps or more, or a "
        "larger share"
    ]
    assert controller.schedule.least_steps(1) == 4
    rare = lemo.LemoConfig(phases=[lemo.Phase("dense"), lemo.Phase("backward", share=1e-6)])
    assert lemo.Schedule(rare.phases).least_steps(1) is None


def test_a_phase_that_an_ended_run_did_not_reach_is_said(caplog):
    model, inputs = tuned("llama"), batch("plain")
    phases = [lemo.Phase("skip", policy="random"), lemo.Phase("dense")]
    for steps in (2, 4):
        controller = lemo.apply(model, settings(phases=phases))
        controller.total_steps = 4
        caplog.clear()
        for _ in range(steps):
            gradients(model, inputs)
            controller.step()
        lemo.remove(model)
        said = [r.message for r in caplog.records if "was never reached" in r.message]
        assert said == (
            ["training ended in phase 0 (skip): phase 1 (dense, 2 of 4 steps) was never reached"] if steps == 2 else []
        )
