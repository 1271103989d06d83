"""The seams of a step: what is put there sees everything once and in order, and the numbers stay what they were.

Each stands for something that will use it: plain torch for other kernels, chunks of queries for a million tokens,
weights that are only there while their layer is worked on for FSDP and offload, records that leave the device for it.
"""

import contextlib
import itertools
import weakref

import lemo
import lemo.engine.loss
import lemo.engine.stack
import pytest
import torch
from lemo.engine.attend import Attention, PackedRows
from lemo.engine.gradients import Handover
from lemo.engine.records import Records
from lemo.engine.step import Step
from support.models import LAYERS, LINEARS, assert_close, base, batch, gradients, lora
from support.pairs import pairs

PHASES = {
    "dense": {"mode": "dense"},
    "skip": {"mode": "skip", "policy": "random"},
    "two-lists": {"mode": "skip", "policy": "random", "mlp_keep": 0.25},
    "no-attention": {"mode": "skip", "policy": "random", "keep": 0.0, "mlp_keep": 0.5},
    "exact-scores": {"mode": "skip", "policy": "exact"},
    "backward": {"mode": "backward", "policy": "random"},
    "weighted": {"mode": "backward", "policy": "random", "weighted": True},
}


def settings(phase, recompute="none", **options):
    return lemo.LemoConfig(block_size=8, recompute=recompute, phases=[lemo.Phase(**PHASES[phase])], seed=3, **options)


def run(model, config, inputs=None):
    """Loss and gradients of one step, from the same draws every time."""
    controller = lemo.apply(model, config)
    try:
        return gradients(model, batch("right") if inputs is None else inputs)
    finally:
        lemo.remove(model)
        assert controller.micro_batch == 1


def adapted(family="llama", **options):
    return lora(base(family, **options), LINEARS[family]).train()


def assert_same(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=0)
    assert_close(got[1], expected[1], tolerance)


# --- attention --------------------------------------------------------------------------------------------------------


class PlainAttention(Attention):
    """Dense matrices in plain torch. Documents are aligned at their ends, so queries may be fewer than keys."""

    def scores(self, q, k, queries, keys, options):
        def places(rows):
            lengths = rows.cu_seqlens.diff().long()
            document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            from_end = rows.cu_seqlens[1:].long()[document] - torch.arange(len(document))
            return document, from_end

        (document, end), (document_k, end_k) = places(queries), places(keys)
        seen = (document[:, None] == document_k) & (end_k >= end[:, None])
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return torch.einsum("ihd,jhd->hij", q, k).mul(options.scale).masked_fill(~seen, -torch.inf)

    def attend(self, q, k, v, queries, keys, options, tiles=None):
        s = self.scores(q, k, queries, keys, options)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        return torch.einsum("hij,jhd->ihd", s.softmax(-1), v), s.logsumexp(-1)

    def attend_with_gradient(self, q, k, v, queries, keys, options, tiles, out, lse, reuse_out=False):
        if out is None:
            out, lse = self.attend(q.detach(), k.detach(), v.detach(), queries, keys, options)
        s, v = self.scores(q, k, queries, keys, options), v.repeat_interleave(q.shape[1] // v.shape[1], 1)
        p = (s.detach() - lse[..., None]).exp()
        if keys.weights is not None:
            other = queries.slots[:, None] != keys.slots
            p = p * torch.where(other, keys.weights[keys.slots.long()], 1.0)
        # The value is out; the gradient that of the softmax with these probabilities.
        moved = (s - s.detach()).nan_to_num()
        through_s = torch.einsum("hij,hij,jhd->ihd", p, moved, v.detach()) - out * (p * moved).sum(-1).t()[..., None]
        return out + through_s + torch.einsum("hij,jhd->ihd", p, v - v.detach())


def one_sided(rows: PackedRows, document: int, first: int, last: int) -> PackedRows:
    """Rows first to last of one document."""
    start = int(rows.cu_seqlens[document])
    own = slice(start + first, start + last)
    slots = None if rows.slots is None else rows.slots[own]
    tokens = (torch.arange(int(rows.cu_seqlens[-1])).int() if rows.table_rows is None else rows.table_rows)[own]
    cu_seqlens = torch.tensor([0, last - first], dtype=torch.int32)
    return PackedRows(cu_seqlens, last - first, tokens, rows.weights, slots)


class Chunks(Attention):
    """Queries in chunks of five rows, each over its document's keys so far."""

    def chunks(self, rows):
        for document, (start, end) in enumerate(itertools.pairwise(rows.cu_seqlens.tolist())):
            for first in range(0, end - start, 5):
                last = min(first + 5, end - start)
                own, seen = slice(start + first, start + last), slice(start, start + last)
                yield own, seen, one_sided(rows, document, first, last), one_sided(rows, document, 0, last)

    def attend(self, q, k, v, queries, keys, options, tiles=None):
        if queries is not keys:  # a chunk
            return super().attend(q, k, v, queries, keys, options)
        parts = [
            super(Chunks, self).attend(q[own], k[seen], v[seen], chunk, so_far, options)
            for own, seen, chunk, so_far in self.chunks(queries)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1)

    def attend_with_gradient(self, q, k, v, queries, keys, options, tiles, out, lse, reuse_out=False):
        parts = []
        for own, seen, chunk, so_far in self.chunks(queries):
            saved = (None, None) if out is None else (out[own], lse[:, own])
            given = (q[own], k[seen], v[seen], chunk, so_far, options, tiles)
            parts.append(super().attend_with_gradient(*given, *saved))
        return torch.cat(parts)


class ChunkedPlain(Chunks, PlainAttention):
    pass


def substitute(monkeypatch, kind):
    """Puts a kind of attention where the engine's own is made, and makes the operators unusable."""

    def fail(*_args, **_options):
        raise AssertionError("the engine reached an attention operator past Step.attention")

    monkeypatch.setattr("lemo.integration.training_pass.Attention", kind)
    for name in ("attention", "attention_forward", "attention_backward"):
        monkeypatch.setattr(lemo.ops, name, fail)


@pytest.mark.parametrize(
    ("phase", "recompute", "kind"), pairs(list(PHASES), ["none", "attention", "full"], [PlainAttention, ChunkedPlain])
)
def test_all_attention_goes_through_one_object(phase, recompute, kind, monkeypatch):
    model = adapted()
    expected = run(model, settings(phase, recompute))
    substitute(monkeypatch, kind)
    assert_same(run(model, settings(phase, recompute)), expected, 3e-5)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_queries_in_chunks(phase, recompute, monkeypatch):
    """The operators with fewer queries than keys."""
    model = adapted()
    expected = run(model, settings(phase, recompute))
    monkeypatch.setattr("lemo.integration.training_pass.Attention", Chunks)
    assert_same(run(model, settings(phase, recompute)), expected, 3e-5)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def visits(monkeypatch):
    """Layers in the order in which they are entered ("+") and left ("-")."""
    seen = []
    original = Step.layer

    @contextlib.contextmanager
    def layer(step, i):
        seen.append(f"+{i}")
        with original(step, i) as module:
            yield module
        seen.append(f"-{i}")

    monkeypatch.setattr(Step, "layer", layer)
    return seen


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_every_layer_is_entered_once_per_pass(phase, recompute, visits):
    model = adapted()
    lemo.apply(model, settings(phase, recompute, layers=[0, 2]))
    loss = model(**batch("right")).loss
    assert visits == ["+0", "-0", "+1", "-1", "+2", "-2"]
    visits.clear()
    loss.backward()
    assert visits == ["+2", "-2", "+1", "-1", "+0", "-0"]


def test_a_layer_that_keeps_nothing_is_entered_too(visits):
    """Processes that gather weights together have to do so in step, whatever each of them keeps."""
    model = adapted()
    phase = lemo.Phase("skip", keep=0.0, policy="random")
    controller = lemo.apply(model, lemo.LemoConfig(block_size=8, phases=[phase], layers=[1]))
    model(**batch("right")).loss.backward()
    assert controller.kept_ratios == [1.0, 0.0, 1.0]
    assert visits == ["+0", "-0", "+1", "-1", "+2", "-2", "+2", "-2", "+1", "-1", "+0", "-0"]


def test_a_reference_pass_and_the_teacher_enter_layers_too(visits):
    from lemo.predictors.teacher import Teacher

    model, inputs = adapted(), batch("plain")
    controller = lemo.apply(model, settings("skip"))
    model(**inputs)
    visits.clear()
    with controller.reference_pass():
        model(**inputs)
    assert visits == ["+0", "-0", "+1", "-1", "+2", "-2"]
    visits.clear()
    lemo.remove(model)
    Teacher(model, 8, False).read_eliminating(inputs["input_ids"][0], lambda *_: None, 0.5)
    assert visits == ["+0", "-0", "+1", "-1", "+2", "-2"]


@pytest.mark.parametrize(("family", "phase", "recompute"), pairs(LAYERS, list(PHASES), ["none", "attention", "full"]))
def test_weights_are_only_read_inside_their_layer(family, phase, recompute, monkeypatch):
    """Outside of it they are NaN, as if they were sharded or on the host."""
    model = adapted(family)
    expected = run(model, settings(phase, recompute))
    original = Step.layer
    stored = {}

    def hide(module):
        for p in module.parameters():
            stored[p] = p.detach().clone()
            p.data.fill_(float("nan"))

    @contextlib.contextmanager
    def layer(step, i):
        for p in step.layers[i].parameters():
            p.data.copy_(stored[p])
        with original(step, i) as module:
            yield module
        hide(module)

    monkeypatch.setattr(Step, "layer", layer)
    inner = model.get_base_model().model
    for module in (inner if family == "llama" else inner.decoder).layers:
        hide(module)
    assert_same(run(model, settings(phase, recompute)), expected, 1e-12)


# --- records ----------------------------------------------------------------------------------------------------------

SAVED = ("x_kept", "x_mlp", "x_out", "out", "lse")


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("recompute", ["none", "attention", "full"])
def test_saved_rows_may_leave_the_device_meanwhile(phase, recompute, monkeypatch):
    """`put` takes their values away, `pop` brings them back; no one else holds them in between."""
    model = adapted()
    expected = run(model, settings(phase, recompute))
    put, pop = Records.put, Records.pop
    order: list[tuple[int, str]] = []
    originals: list[weakref.ref[torch.Tensor]] = []
    host: dict = {}

    def to_host(records, record):
        order.append((record.layer, record.part))
        host[id(record)] = {name: getattr(record, name) for name in SAVED if getattr(record, name) is not None}
        originals.extend(weakref.ref(tensor) for tensor in host[id(record)].values())
        host[id(record)] = {name: tensor.numpy().tobytes() for name, tensor in host[id(record)].items()}
        shapes[id(record)] = {name: getattr(record, name).shape for name in host[id(record)]}
        for name in host[id(record)]:
            setattr(record, name, None)
        put(records, record)

    def from_host(records, layer):
        record = pop(records, layer)
        if record is not None:
            alive.append([r for r in originals if r() is not None])
            order.append((record.layer, record.part))
            for name, values in host.pop(id(record)).items():
                tensor = torch.frombuffer(bytearray(values), dtype=torch.float32)
                setattr(record, name, tensor.view(shapes[id(record)][name]))
        return record

    shapes: dict = {}
    alive: list = []
    monkeypatch.setattr(Records, "put", to_host)
    monkeypatch.setattr(Records, "pop", from_host)
    assert_same(run(model, settings(phase, recompute)), expected, 1e-12)
    half = len(order) // 2
    assert order[half:] == order[:half][::-1] and not host
    parts = {"two-lists": ["attention", "mlp"], "no-attention": ["mlp"]}.get(phase, ["layer"])
    assert order[:half] == [(i, part) for i in range(3) for part in parts]
    if recompute != "none" and phase != "no-attention":  # a local graph may hold a norm's input
        assert originals and not any(alive)


# --- who may write into the gradient ----------------------------------------------------------------------------------


def test_the_loss_hands_its_buffer_over():
    handover, buffer = Handover(), torch.ones(4, 3)
    handover.offer(buffer)
    taken = handover.take(buffer.view(4, 3))
    assert taken.data_ptr() == buffer.data_ptr()
    assert handover.take(buffer).data_ptr() != buffer.data_ptr()  # once only


@pytest.mark.parametrize(
    "arrives",
    [
        lambda buffer: buffer.clone(),
        lambda buffer: buffer[:2],
        lambda buffer: buffer.t(),
        lambda buffer: torch.ones(()).expand(4, 3),
    ],
    ids=["another", "part", "transposed", "expanded"],
)
def test_anything_else_is_copied(arrives):
    handover, buffer = Handover(), torch.arange(12.0).view(4, 3)
    handover.offer(buffer)
    gradient = arrives(buffer)
    expected = gradient.clone()
    taken = handover.take(gradient)
    assert taken.is_contiguous() and torch.equal(taken, expected)
    taken.fill_(7)
    assert torch.equal(gradient, expected)


@pytest.fixture
def takings(monkeypatch):
    """Whether each gradient of a residual stream was taken over (True) or copied."""
    seen = []
    original = Handover.take

    def take(handover, gradient):
        taken = original(handover, gradient)
        seen.append(taken.data_ptr() == gradient.data_ptr())
        return taken

    monkeypatch.setattr(Handover, "take", take)
    return seen


@pytest.fixture
def stream(monkeypatch):
    """Calls every function in the list with the residual stream that the loss is about to read."""
    original = lemo.engine.stack.run
    functions: list = []

    def run(step, x, params):
        x = original(step, x, params)
        for function in functions:
            x = function(x)
        return x

    monkeypatch.setattr(lemo.engine.stack, "run", run)
    return functions


@pytest.mark.parametrize("phase", ["dense", "skip", "weighted"])
def test_a_plain_step_makes_one_gradient_buffer(phase, takings):
    run(adapted(), settings(phase))
    assert takings == [True]


@pytest.mark.parametrize("phase", ["dense", "skip", "weighted"])
def test_a_gradient_that_a_hook_put_in_its_place_stays_as_it_is(phase, takings, stream):
    model = adapted()
    _, expected = run(model, settings(phase))
    held: list = []

    def replace(gradient):
        held.append(2 * gradient)
        held.append(held[0].clone())
        return held[0]

    stream.append(lambda x: x.register_hook(replace) and x)
    _, got = run(model, settings(phase))
    assert takings == [True, False] and torch.equal(held[0], held[1])
    assert_close(got, {name: 2 * g for name, g in expected.items()})


@pytest.mark.parametrize("phase", ["dense", "weighted"])
def test_another_loss_over_the_same_stream(phase, monkeypatch, stream):
    """Autograd adds the gradients; both count, whoever holds what."""
    model, kept = adapted(), []
    stream.append(lambda x: kept.append(x) or x)
    direction = torch.linspace(-1, 1, 32)

    def both(inputs):
        kept.clear()
        lemo.apply(model, settings(phase))
        model.zero_grad()
        (model(**inputs).loss + (kept[0] * direction).mean()).backward()
        lemo.remove(model)
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    got = both(batch("right"))
    monkeypatch.setattr(Handover, "take", lambda _, gradient: gradient.clone())
    assert_close(both(batch("right")), got, 1e-12)
    _, alone = run(model, settings(phase))
    assert any(not torch.allclose(alone[name], g) for name, g in got.items())


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_exact_pass_of_mode_backward_drops_the_norms_output_before_attention(monkeypatch):
    """It is as large as the residual stream. (With "none", the kept rows' is held while their graph is made.)"""
    import lemo.engine.residual

    norms, alive = [], []
    gather_norm, attention = lemo.engine.residual.gather_norm, lemo.ops.attention_forward

    def normed(x, rows, residual, n):
        result = gather_norm(x, rows, residual, n)
        if residual is None:
            norms.append(weakref.ref(result[0]))
        return result

    def attend(*args, **options):
        assert norms  # since the last layer's attention
        alive.append(sum(norm() is not None for norm in norms))
        norms.clear()
        return attention(*args, **options)

    monkeypatch.setattr(lemo.engine.residual, "gather_norm", normed)
    monkeypatch.setattr(lemo.ops, "attention_forward", attend)
    run(adapted(), settings("backward", "attention"))
    assert alive == [0, 0, 0]
