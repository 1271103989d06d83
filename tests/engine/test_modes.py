"""Modes against their definition in plain torch; identity, replay, repeatability, accumulation."""

import lemo
import lemo.engine.policies
import pytest
import torch
from lemo.engine.families.llama import Llama
from lemo.engine.layout import Kept
from support import reference
from support.models import (
    LINEARS,
    NORM_PLACES,
    assert_close,
    base,
    batch,
    clone,
    gradients,
    lora,
    packed,
    reference_gradients,
    tuned,
)
from support.pairs import pairs

BLOCK = 8
RECOMPUTE = ("none", "attention", "full")


def layers_of(family, model, inputs):
    """Arguments of the reference functions: the model, ids and targets."""
    ids, targets, positions, document = packed(family, inputs)
    return reference.Model(model, positions, document), ids, targets


def config(recompute="none", **phase):
    options = {"mode": "skip", "keep": 0.5, "policy": "random", **phase}
    return lemo.LemoConfig(block_size=BLOCK, recompute=recompute, phases=[lemo.Phase(**options)], seed=3)


def blocks_of(kept: Kept) -> torch.Tensor:
    """Block of every token."""
    sizes = kept.source.offsets[1:] - kept.source.offsets[:-1]
    return torch.repeat_interleave(torch.arange(kept.source.num_blocks), sizes.long())


@pytest.mark.parametrize(("family", "recompute", "kind"), pairs(NORM_PLACES, RECOMPUTE, ("right", "left", "packed")))
def test_skip(family, recompute, kind, chosen):
    model, inputs = lora(base(family), LINEARS[family]).train(), batch(kind)
    plain = clone(model)
    controller = lemo.apply(model, config(recompute))
    loss, got = gradients(model, inputs)
    assert len(chosen) == 3  # once per layer, whatever is recomputed
    assert all(0 < k.num_rows < k.source.num_tokens for k in chosen)
    ids, targets, positions, document = packed(family, inputs)
    m = reference.Model(plain, positions, document)
    lists = [(k.rows.long(), k.rows.long()) for k in chosen]
    valid = reference.took_part(lists, len(ids)) & (targets != -100)
    assert 0 < valid.sum() == controller.report()["loss_tokens"] < (targets != -100).sum()
    expected_loss = reference.skip(m, ids, targets, lists)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected_loss))


@pytest.mark.parametrize(
    ("family", "recompute", "keeps"), pairs(NORM_PLACES, RECOMPUTE, [(0.5, 0.25), (0.5, 1.0), (0.5, 0.0), (0.0, 0.5)])
)
def test_skip_with_a_list_for_the_mlp(family, recompute, keeps, chosen):
    model, inputs = lora(base(family), LINEARS[family]).train(), batch("right")
    plain = clone(model)
    lemo.apply(model, config(recompute, keep=keeps[0], mlp_keep=keeps[1]))
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed(family, inputs)
    lists, drawn = [], iter(chosen)
    for _ in range(3):
        pair = [
            None if keep == 0 else torch.arange(len(ids)) if keep == 1 else next(drawn).rows.long() for keep in keeps
        ]
        lists.append(tuple(pair))
    expected_loss = reference.skip(reference.Model(plain, positions, document), ids, targets, lists)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected_loss))


@pytest.mark.parametrize(
    ("family", "weighted", "policy", "recompute", "kind"),
    pairs(NORM_PLACES, [False, True], ["random", "sampled"], ["none", "attention"], ["right", "packed"], of=3),
)
def test_backward(family, weighted, policy, recompute, kind, chosen):
    model, inputs = lora(base(family), LINEARS[family]).train(), batch(kind)
    plain = clone(model)
    dense = plain(**inputs).loss.detach() if kind == "right" else None
    lemo.apply(model, config(recompute, mode="backward", policy=policy, weighted=weighted))
    loss, got = gradients(model, inputs)
    ids, targets, positions, document = packed(family, inputs)
    if dense is not None:
        torch.testing.assert_close(loss, dense, rtol=1e-5, atol=0)
    weights = [k.weights[k.row_slots.long()] for k in chosen] if weighted else None
    if weighted:
        assert max(w.max() for w in weights) > 1.2
    m = reference.Model(plain, positions, document)
    rows = [k.rows.long() for k in chosen]
    expected_loss = reference.backward(m, ids, targets, rows, weights, blocks_of(chosen[0]))
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-5, atol=0)
    assert_close(got, reference_gradients(plain, expected_loss))


@pytest.mark.parametrize(("recompute", "again"), [("none", False), ("attention", True)])
def test_backward_computes_every_row_once_and_none_again(recompute, again, chosen, monkeypatch):
    """What a layer computes row by row, counted in rows."""
    rows: dict[tuple[str, bool], int] = {}
    parts = {name: getattr(Llama, name) for name in ("queries_keys_values", "attention_output", "mlp")}

    def counting(name):
        def counted(self, layer, h, *given):
            rows[name, bool(total)] = rows.get((name, bool(total)), 0) + h.shape[0]
            return parts[name](self, layer, h, *given)

        return counted

    for name in parts:
        monkeypatch.setattr(Llama, name, counting(name))
    monkeypatch.setattr("lemo.engine.step.MLP_ROWS", 5)
    total: list[torch.Tensor] = []
    model, inputs = tuned("llama"), batch("packed")
    lemo.apply(model, config(recompute, mode="backward", weighted=True))
    total.append(model(**inputs).loss)
    total[0].backward()
    kept, tokens = sum(k.num_rows for k in chosen), inputs["input_ids"].numel()
    assert 0 < kept < 3 * tokens
    for name in parts:
        assert rows[name, False] == 3 * tokens and rows.get((name, True), 0) == again * kept


@pytest.mark.parametrize("family", NORM_PLACES)
def test_nothing_kept_is_the_identity(family):
    model, inputs = tuned(family), batch("right")
    controller = lemo.apply(model, config(keep=0.0))
    with torch.no_grad():
        expected = reference.skip(*layers_of(family, model, inputs), [(None, None)] * 3, everyone=True)
    loss, got = gradients(model, inputs)
    assert not got
    assert controller.kept_ratios == [0.0] * 3
    assert (loss.item(), controller.report()["loss_tokens"]) == (0.0, 0)  # no token took part
    model.get_output_embeddings().weight.requires_grad_()  # the head has a gradient of every token
    torch.testing.assert_close(gradients(model, inputs)[0], expected, rtol=1e-5, atol=0)


def test_layers_that_do_not_eliminate(chosen):
    model = tuned("llama")
    settings = config()
    settings.layers = [1]
    controller = lemo.apply(model, settings)
    gradients(model, batch("plain"))
    assert len(chosen) == 1
    assert controller.kept_ratios[0] == controller.kept_ratios[2] == 1.0
    assert 0.3 < controller.kept_ratios[1] < 0.8


@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
@pytest.mark.parametrize("mode", ["skip", "backward"])
def test_a_seeded_run_is_bitwise_repeatable(recompute, mode):
    runs = []
    for _ in range(2):
        model = tuned("llama")
        controller = lemo.apply(model, config(recompute, mode=mode))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            gradients(model, batch("right"))
            optimizer.step()
            controller.step()
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradient_accumulation(chosen):
    """One selection per micro-batch; gradients add up."""
    model, inputs = tuned("llama"), batch("plain")
    controller = lemo.apply(model, config())
    model.zero_grad()
    for _ in range(2):
        model(**inputs).loss.backward()
    total = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    first, second = [k.rows.tolist() for k in chosen[:3]], [k.rows.tolist() for k in chosen[3:]]
    assert first != second
    controller.seek(0)
    _, one = gradients(model, inputs)
    _, two = gradients(model, inputs)
    assert_close(total, {n: one[n] + two[n] for n in one})
    assert [k.rows.tolist() for k in chosen[6:9]] == first


def test_autograd_grad_and_hooks():
    """Trained parameters are inputs of the function, so autograd sees them like any others."""
    model, inputs = tuned("llama"), batch("plain")
    lemo.apply(model, config())
    trained = [p for p in model.parameters() if p.requires_grad]
    seen = []
    trained[0].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm()))
    _, expected = gradients(model, inputs, scale=2.0)
    assert len(seen) == 1
    lemo.remove(model)
    lemo.apply(model, config())
    grads = torch.autograd.grad(model(**inputs).loss, trained)
    for g, e in zip(grads, expected.values(), strict=True):
        torch.testing.assert_close(2 * g, e)


def test_second_backward_is_an_error():
    model = tuned("llama")
    lemo.apply(model, config())
    loss = model(**batch("plain")).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(("tokens", "kept_all"), [(BLOCK, True), (4 * BLOCK, False)])
def test_a_phase_that_keeps_every_block_is_said_once(tokens, kept_all, caplog):
    m, ids = tuned("llama"), torch.arange(3, 3 + tokens)[None]
    controller = lemo.apply(m, config())
    for _ in range(2):
        gradients(m, {"input_ids": ids, "labels": ids})
        controller.step()
    assert (set(controller.kept_ratios) == {1.0}) == kept_all
    notes = [r.getMessage() for r in caplog.records if "kept every block" in r.getMessage()]
    assert len(notes) == kept_all and all("documents of at most 8 tokens" in note for note in notes)
