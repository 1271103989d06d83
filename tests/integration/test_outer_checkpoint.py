"""An activation checkpoint around the whole model: recomputation keeps the blocks of the pass that it repeats."""

import contextlib

import lemo
import pytest
import torch
from support.models import VOCAB, assert_close, base, tuned
from support.pairs import pairs
from torch.utils.checkpoint import checkpoint

PHASES = {
    "skip": lemo.Phase("skip", keep=0.5, policy="random"),
    "skip, by norms": lemo.Phase("skip", keep=0.5, policy="update_norm"),
    "backward": lemo.Phase("backward", keep=0.5, policy="random"),
    "dense": lemo.Phase("dense"),
    "sparse": lemo.Phase("sparse", density=0.5),
    "sparse, skip": lemo.Phase("sparse", density=0.5, keep=0.8, policy="random"),
}
TOKENS = 700  # of a document in which mode "sparse" has something to leave out


def apply(model, phase="skip", **options):
    return lemo.apply(model, lemo.LemoConfig(block_size=8, phases=[PHASES[phase]], **options))


def batches(count, tokens=48):
    torch.manual_seed(3)
    return [torch.randint(3, VOCAB, (2, tokens)) for _ in range(count)]


def collect(model, run):
    model.zero_grad()
    run()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def loss(model, ids):
    return model(input_ids=ids, labels=ids).loss


def checkpointed(model, ids, **options):
    # The region has to start from something with a gradient, or a checkpoint has nothing to do.
    scale = torch.ones((), requires_grad=True)
    return checkpoint(lambda s: loss(model, ids) * s.exp() / torch.e, scale, use_reentrant=False, **options)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("recompute", ["auto", "none", "attention", "full"])
def test_gradients_are_those_without_a_checkpoint(phase, recompute):
    model, (ids,) = tuned("llama"), batches(1, TOKENS if "sparse" in phase else 48)
    controller = apply(model, phase, recompute=recompute)
    expected = collect(model, lambda: loss(model, ids).backward())
    report = controller.report()
    controller.seek(0)
    got = collect(model, lambda: checkpointed(model, ids).backward())
    assert_close(got, expected)
    assert controller.micro_batch == 1
    # The checkpoint recomputes more, and so leaves out another share of all products.
    repeated = controller.report()
    assert repeated.pop("cost_ratio") > 0 and report.pop("cost_ratio") > 0
    assert repeated == report
    assert "sparse" not in phase or all(density < 1 for density in report["density"])


def together(model, ids):
    sum(checkpointed(model, i) for i in ids).backward()


def in_reverse(model, ids):
    for value in reversed([checkpointed(model, i) for i in ids]):
        value.backward()


def one_by_one(model, ids):
    for i in ids:
        checkpointed(model, i).backward()


def in_one_region(model, ids):
    scale = torch.ones((), requires_grad=True)
    checkpoint(lambda s: sum(loss(model, i) for i in ids) * s.exp() / torch.e, scale, use_reentrant=False).backward()


def nested(model, ids):
    for i in ids:
        scale = torch.ones((), requires_grad=True)
        inner = lambda s, i=i: checkpoint(lambda t: loss(model, i) * t.exp() / torch.e, s, use_reentrant=False)  # noqa: E731
        checkpoint(lambda s, inner=inner: inner(s) * s.exp() / torch.e, scale, use_reentrant=False).backward()


def offloaded(model, ids):
    """Another hook lies between the checkpoint and the model."""

    def region(scale, i):
        with torch.autograd.graph.save_on_cpu():
            return loss(model, i) * scale.exp() / torch.e

    scale = torch.ones((), requires_grad=True)
    sum(checkpoint(region, scale, i, use_reentrant=False) for i in ids).backward()


def without_rng(model, ids):
    sum(checkpointed(model, i, preserve_rng_state=False) for i in ids).backward()


WAYS = (together, in_reverse, one_by_one, in_one_region, nested, offloaded, without_rng)


@pytest.mark.parametrize(("run", "identical", "recompute"), pairs(WAYS, [False, True], ["auto", "none"]))
def test_several_batches_in_flight(run, identical, recompute):
    """Every micro-batch has a separate draw, even if the batches are the same."""
    model = tuned("llama")
    ids = batches(1) * 3 if identical else batches(3)
    controller = apply(model, recompute=recompute)
    expected = collect(model, lambda: [loss(model, i).backward() for i in ids])
    controller.seek(0)
    assert_close(collect(model, lambda: run(model, ids)), expected)
    assert controller.micro_batch == 3


def test_the_step_may_move_on_before_backward():
    model, (ids,) = tuned("llama"), batches(1)
    controller = apply(model, recompute="none")
    expected = collect(model, lambda: loss(model, ids).backward())
    controller.seek(0)
    value = checkpointed(model, ids)
    controller.step()
    assert_close(collect(model, value.backward), expected)


def test_a_call_in_backward_that_repeats_nothing_is_refused():
    model, (ids,) = tuned("llama"), batches(1)
    apply(model)
    value = loss(model, ids)

    @torch.enable_grad()
    def call(_):
        loss(model, ids)

    value.register_hook(call)
    with pytest.raises(RuntimeError, match="which forward pass this recomputes is not known"):
        value.backward()


@pytest.mark.parametrize("phase", ["skip", "sparse", "dense"])
def test_a_reentrant_checkpoint(phase):
    model, (ids,) = tuned("llama"), batches(1, TOKENS)
    expected = collect(model, lambda: loss(model, ids).backward())
    apply(model, phase)
    scale = torch.ones((), requires_grad=True)
    value = checkpoint(lambda s: loss(model, ids) * s.exp() / torch.e, scale, use_reentrant=True)
    refused = pytest.raises(RuntimeError, match="use_reentrant=False") if phase != "dense" else contextlib.nullcontext()
    with refused:
        assert_close(collect(model, value.backward), expected)


def test_logits_under_a_checkpoint():
    """A loss of the user's own, inside the region."""
    model, (ids,) = tuned("llama"), batches(1)
    controller = apply(model)

    def own(embeddings):
        logits = model(inputs_embeds=embeddings).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    expected = collect(model, lambda: own(embeddings).backward())
    controller.seek(0)
    got = collect(model, lambda: checkpoint(own, embeddings, use_reentrant=False).backward())
    assert_close(got, expected)


def test_full_fine_tuning():
    model, (ids,) = base("llama").train(), batches(1)
    controller = apply(model, recompute="none")
    expected = collect(model, lambda: loss(model, ids).backward())
    controller.seek(0)
    assert_close(collect(model, lambda: checkpointed(model, ids).backward()), expected)
