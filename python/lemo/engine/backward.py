"""The layers' backward pass, in place of the gradient dx [T, d] of the residual stream, from the last layer.

Lists are replayed from the records, never chosen again; what was not saved is recomputed, on kept rows. A segment of
layers without records first runs forward again, from the stream before it, with the lists of the forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from lemo import ops
from lemo.engine.attend import tiles_of
from lemo.engine.families.base import NormWeights
from lemo.engine.forward import forward_again, gather_norm
from lemo.engine.gradients import ParameterGradients
from lemo.engine.randomness import Generators, generators, set_generators
from lemo.engine.records import Record
from lemo.engine.segments import Segment, gradients_through, trace
from lemo.engine.step import SEPARATE_BYTES, Step


def backward(step: Step, dx: Tensor, params: Sequence[Tensor]) -> ParameterGradients:
    """Runs the layers' gradients over dx in place; every record is dropped once it is used."""
    grads = ParameterGradients(params, step.general, step.weights)
    *again, last = step.layer_segments
    _segment(step, last, dx, grads)
    for layers in reversed(again):
        with _replay(step.runs[layers.start].generators, dx.device):
            forward_again(step, layers, step.records.pop_stream())
        _segment(step, layers, dx, grads)
    return grads


def _segment(step: Step, layers: range, dx: Tensor, grads: ParameterGradients) -> None:
    """Layers that have records."""
    for i in reversed(layers):
        with step.layer(i) as layer:
            while (record := step.records.pop(i)) is not None:
                with _replay(record.generators, dx.device):
                    _BACKWARD[record.part](step, layer, record, dx, grads)
            grads.divide()


def _layer(step: Step, layer: nn.Module, record: Record, dx: Tensor, grads: ParameterGradients) -> None:
    """Attention and MLP on one list. g [M, d]: gradient of what the layer adds to its rows. With weights, which g has,
    the rows of dx keep the identity's gradient, which has none, and the branch's is added to them."""
    saved, (n1, n2) = record.saved_list, step.family.norms(layer)
    if record.mlp is None:
        _layer_again(step, layer, record, dx, grads)
        return
    assert record.x_mlp is not None and record.attention is not None
    g = ops.gather(dx, saved.rows, saved.weights, saved.slots)
    dstatistics = step.statistics.gradient(record.layer, saved, slice(0, saved.count))
    dh2 = grads.through(record.mlp, g, grads.held_by(step.family.mlp_modules(layer)), dstatistics)
    record.mlp = None
    weighted = saved.weights is not None
    branch = _norm_backward(dh2, record.x_mlp, n2, None if weighted else g, grads)
    segment, record.attention, record.x_mlp = record.attention, None, None
    above = g.add_(branch) if weighted else branch
    del g, dh2
    dh = grads.through(segment, above, _attention_parameters(step, layer, grads))
    # Without weights, g reached the input through x_mlp, so the rows are replaced.
    _norm_backward_into(dx, saved.rows, dh, record.x_kept, n1, branch, weighted, grads)


def _layer_again(step: Step, layer: nn.Module, record: Record, dx: Tensor, grads: ParameterGradients) -> None:
    """As `_layer`, of what was not saved. Without weights, the rows' gradient g is updated in place, in dx itself if
    the layer works on all tokens. With weights the rows of dx keep the identity's gradient, and g becomes the branch's:
    what reaches the input by way of the MLP, without the identity."""
    saved, n1 = record.saved_list, step.family.norms(layer)[0]
    weighted = saved.weights is not None
    in_place = saved.table_rows is None and not weighted
    g = dx if in_place else ops.gather(dx, saved.rows, saved.weights, saved.slots)

    def into_stream(dh: Tensor, c: slice) -> None:
        """From the gradient dh of the norm's output, for rows c."""
        if in_place:
            _norm_backward_into(dx[c], None, dh, record.x_kept[c], n1, None, True, grads)
        else:
            _norm_backward_into(dx, saved.rows[c], dh, record.x_kept[c], n1, g[c], weighted, grads)

    if separately(step, layer, record.x_kept):
        _by_parts(step, layer, record, lambda out: _mlp_again(step, layer, record, out, g, grads), into_stream, grads)
        return
    out, segment = _attention_again(step, layer, record, n1)
    dout = _mlp_again(step, layer, record, out, g, grads)
    del out
    dh = grads.through(segment, dout, _attention_parameters(step, layer, grads))
    del segment, dout
    into_stream(dh, slice(0, saved.count))


def _by_parts(
    step: Step,
    layer: nn.Module,
    record: Record,
    gradient: Callable[[Tensor], Tensor],
    into_stream: Callable[[Tensor, slice], None],
    grads: ParameterGradients,
) -> None:
    """Backward through attention, whose graph holds q, k and v alone, and then through their projections in chunks of
    rows, with the norm's output made once more. gradient: that of attention's output."""
    saved, n1, tables = record.saved_list, step.family.norms(layer)[0], step.attention.tables
    h = gather_norm(record.x_kept, None, None, n1)[0]
    projected = step.family.queries_keys_values(layer, h, tables, saved.table_rows)
    del h
    q, k, v = (t.detach().requires_grad_() for t in projected)
    del projected
    options = step.attention.options(layer)
    sinks = [options.sinks] if options.sinks is not None and grads.wants(options.sinks) else []
    with torch.enable_grad():
        where = (saved, saved, options, tiles_of(record.tiles, options, q, k), record.out, record.lse)
        y = step.attention.attend_with_gradient(q, k, v, *where, reuse_out=True)
        edge, out = get_gradient_edge(y), y.detach().flatten(1)
    record.out = record.lse = None
    del where, y
    dout = gradient(out).view(out.shape[0], *q.shape[1:])
    del out
    found = torch.autograd.grad([edge], [q, k, v, *sinks], [dout])
    del q, k, v, edge, dout
    grads.add(sinks, found[3:])
    held = _attention_parameters(step, layer, grads)
    for c in step.chunks(saved.count):
        dh, others = gradients_through(
            functools.partial(_projected, step, layer, saved.rows[c]),
            gather_norm(record.x_kept[c], None, None, n1)[0],
            [d[c] for d in found[:3]],
            held,
        )
        grads.add(held, others)
        into_stream(dh, c)


def _projected(step: Step, layer: nn.Module, rows: Tensor, h: Tensor) -> Sequence[Tensor]:
    return step.family.queries_keys_values(layer, h, step.attention.tables, rows, want_output=False)


def separately(step: Step, layer: nn.Module, x_kept: Tensor) -> bool:
    """Whether the layer's rows are so many that the norm's output is better made twice than kept."""
    return x_kept.nbytes >= SEPARATE_BYTES and step.random is False and step.attention.separable(layer)


def _mlp_again(
    step: Step, layer: nn.Module, record: Record, out: Tensor, g: Tensor, grads: ParameterGradients
) -> Tensor:
    """Gradient [M, Hq D] of attention's output out [M, Hq D], from g [M, d]. Output projection and MLP are computed
    again in chunks of rows, and g is replaced by the gradient that reaches the MLP norm's input: it includes g itself
    (the identity path) unless gradients are weighted."""
    family, saved = step.family, record.saved_list
    n2, params = family.norms(layer)[1], grads.held_by(family.mlp_modules(layer))
    of_attention = _attention_parameters(step, layer, grads)
    want_output = bool(step.random)

    def part(c: slice) -> Tensor:
        a, projection = trace(lambda leaf: family.attention_output(layer, leaf), out[c])
        h2, x_mlp = gather_norm(a, None, record.x_kept[c], n2)
        _, mlp = trace(lambda leaf: family.mlp(layer, leaf, want_output), h2)
        del a, h2
        dh2 = grads.through(mlp, g[c], params, step.statistics.gradient(record.layer, saved, c))
        if saved.weights is None:
            _norm_backward_into(g[c], None, dh2, x_mlp, n2, None, True, grads)
            return grads.through(projection, g[c], of_attention)
        branch = _norm_backward(dh2, x_mlp, n2, None, grads)
        dout = grads.through(projection, g[c] + branch, of_attention)
        g[c] = branch
        return dout

    return _in_chunks(step, out, part)


def _in_chunks(step: Step, like: Tensor, part: Callable[[slice], Tensor]) -> Tensor:
    """part(c) of all chunks of rows, of the shape of `like`."""
    whole = None
    for c in step.chunks(like.shape[0]):
        found = part(c)
        if found.shape[0] == like.shape[0]:
            return found
        whole = torch.empty_like(like) if whole is None else whole
        whole[c] = found
    assert whole is not None
    return whole


def _attention(step: Step, layer: nn.Module, record: Record, dx: Tensor, grads: ParameterGradients) -> None:
    """Attention alone, if the MLP has another list."""
    n1, rows, held = step.family.norms(layer)[0], record.saved_list.rows, _attention_parameters(step, layer, grads)
    if record.attention is not None:
        segment, record.attention = record.attention, None
        dh = grads.through(segment, ops.gather(dx, rows), held)
    else:
        out, segment = _attention_again(step, layer, record, n1)

        def part(c: slice) -> Tensor:
            projection = trace(lambda leaf: step.family.attention_output(layer, leaf, bool(step.random)), out[c])[1]
            return grads.through(projection, ops.gather(dx, rows[c]), held)

        dout = _in_chunks(step, out, part)
        del out
        dh = grads.through(segment, dout, held)
    _norm_backward_into(dx, rows, dh, record.x_kept, n1, None, True, grads)


def _mlp(step: Step, layer: nn.Module, record: Record, dx: Tensor, grads: ParameterGradients) -> None:
    """The MLP alone, if attention has another list."""
    family, saved = step.family, record.saved_list
    n2 = family.norms(layer)[1]
    params = grads.held_by(family.mlp_modules(layer))
    for c in (slice(0, saved.count),) if record.mlp is not None else step.chunks(saved.count):
        segment = record.mlp
        if segment is None:
            h, _ = gather_norm(record.x_kept[c], None, None, n2)
            segment = trace(lambda leaf: family.mlp(layer, leaf, bool(step.random)), h)[1]
        record.mlp = None
        dstatistics = step.statistics.gradient(record.layer, saved, c)
        dh = grads.through(segment, ops.gather(dx, saved.rows[c]), params, dstatistics)
        _norm_backward_into(dx, saved.rows[c], dh, record.x_kept[c], n2, None, True, grads)


_BACKWARD = {"layer": _layer, "attention": _attention, "mlp": _mlp}


def _attention_parameters(step: Step, layer: nn.Module, grads: ParameterGradients) -> list[Tensor]:
    """The trained parameters that the layer's attention uses, each once."""
    sinks = step.family.attention_options(layer).sinks
    held = grads.held_by(step.family.attention_modules(layer))
    return held if sinks is None or not grads.wants(sinks) or any(p is sinks for p in held) else [*held, sinks]


def _attention_again(step: Step, layer: nn.Module, record: Record, n: NormWeights) -> tuple[Tensor, Segment]:
    """Attention of the kept rows, recomputed with its graph: (out [M, Hq D], graph from the norm's output to out). The
    graph's backward pass may overwrite out."""
    saved, given = record.saved_list, (record.out, record.lse)
    h, _ = gather_norm(record.x_kept, None, None, n)
    return trace(
        lambda leaf: step.attention.differentiable(layer, leaf, saved, record.tiles, *given, reuse_out=True).flatten(1),
        h,
    )


def _norm_backward(dy: Tensor, s: Tensor, n: NormWeights, extra: Tensor | None, grads: ParameterGradients) -> Tensor:
    """ds [M, d] of the norm at s [M, d], plus `extra`; adds the gradients of its weights."""
    ds, dw, db = ops.gather_norm_backward(
        dy, s, n.operands[0], extra, n.kind, n.eps, grads.wants(n.weight), grads.wants(n.bias)
    )
    grads.add((n.weight, n.bias), (dw, db))
    return ds


def _norm_backward_into(
    dx: Tensor,
    rows: Tensor | None,
    dy: Tensor,
    s: Tensor,
    n: NormWeights,
    extra: Tensor | None,
    accumulate: bool,
    grads: ParameterGradients,
) -> None:
    """As `_norm_backward`, added to the rows of dx (None: to all), or (not `accumulate`) in place of them."""
    dw, db = ops.gather_norm_backward_(
        dx, rows, dy, s, n.operands[0], extra, n.kind, n.eps, accumulate, grads.wants(n.weight), grads.wants(n.bias)
    )
    grads.add((n.weight, n.bias), (dw, db))


@contextmanager
def _replay(states: Generators | None, device: torch.device) -> Iterator[None]:
    """The random numbers of the forward pass again; the generators are left as they were found."""
    if states is None:
        yield
        return
    before = generators(device)
    set_generators(states, device)
    try:
        yield
    finally:
        set_generators(before, device)
