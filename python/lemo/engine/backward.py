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
from lemo.engine.forward import forward_again
from lemo.engine.gradients import ParameterGradients
from lemo.engine.randomness import Generators, generators, set_generators
from lemo.engine.records import Record
from lemo.engine.residual import (
    cross,
    cross_backward,
    enter,
    enter_backward,
    leave_backward,
    norm_backward,
    norm_backward_into,
)
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
    saved, norms = record.saved_list, step.family.norms(layer)
    if record.mlp is None:
        _layer_again(step, layer, record, dx, grads)
        return
    assert record.x_mlp is not None and record.attention is not None
    weighted, after = saved.weights is not None, norms[1].after
    g = ops.gather(dx, saved.rows, saved.weights, saved.slots)
    dm = leave_backward(g, record.x_out, norms[1], grads)
    dstatistics = step.statistics.gradient(record.layer, saved, slice(0, saved.count))
    dh2 = grads.through(record.mlp, dm, grads.held_by(step.family.mlp_modules(layer)), dstatistics)
    record.mlp = record.x_out = None
    if weighted and not after:
        branch = norm_backward(dh2, record.x_mlp, norms[1], None, grads)
    else:
        branch = cross_backward(dh2, record.x_mlp, norms, dm, grads)
    segment, record.attention, record.x_mlp = record.attention, None, None
    above = g.add_(branch) if weighted and not after else branch
    if weighted and after:
        branch = above - g
    del g, dm, dh2
    dh = grads.through(segment, above, _attention_parameters(step, layer, grads))
    # Without weights, g reached the input through x_mlp, so the rows are replaced.
    enter_backward(dx, saved.rows, dh, record.x_kept, norms[0], branch, weighted, grads)


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
            enter_backward(dx[c], None, dh, record.x_kept[c], n1, None, True, grads)
        else:
            enter_backward(dx, saved.rows[c], dh, record.x_kept[c], n1, g[c], weighted, grads)

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
    h = enter(record.x_kept, None, n1)[0]
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
            enter(record.x_kept[c], None, n1)[0],
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
    norms, params = family.norms(layer), grads.held_by(family.mlp_modules(layer))
    of_attention, after = _attention_parameters(step, layer, grads), norms[1].after
    want_output = bool(step.random) or after

    def part(c: slice) -> Tensor:
        a, projection = trace(lambda leaf: family.attention_output(layer, leaf), out[c])
        h2, x_mlp, base = cross(record.x_kept[c], None, a, norms)
        m, mlp = trace(lambda leaf: family.mlp(layer, leaf, want_output), h2)
        x_out = base + m if after else None
        del a, h2, base, m
        dm = leave_backward(g[c], x_out, norms[1], grads)
        del x_out
        dh2 = grads.through(mlp, dm, params, step.statistics.gradient(record.layer, saved, c))
        if after:
            whole = cross_backward(dh2, x_mlp, norms, dm, grads)
            dout = grads.through(projection, whole, of_attention)
            g[c] = whole if saved.weights is None else whole - g[c]
            return dout
        if saved.weights is None:
            norm_backward_into(g[c], None, dh2, x_mlp, norms[1], None, True, grads)
            return grads.through(projection, g[c], of_attention)
        branch = norm_backward(dh2, x_mlp, norms[1], None, grads)
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
    n, rows, held = step.family.norms(layer)[0], record.saved_list.rows, _attention_parameters(step, layer, grads)
    if record.attention is not None:
        segment, record.attention = record.attention, None
        g = leave_backward(ops.gather(dx, rows), record.x_out, n, grads)
        dh = grads.through(segment, g, held)
        whole = g if n.after else None
        del g
    else:
        out, segment = _attention_again(step, layer, record, n)
        want_output = bool(step.random) or n.after
        whole = torch.empty_like(record.x_kept) if n.after else None

        def part(c: slice) -> Tensor:
            a, projection = trace(lambda leaf: step.family.attention_output(layer, leaf, want_output), out[c])
            x_out = record.x_kept[c] + a if n.after else None
            g = leave_backward(ops.gather(dx, rows[c]), x_out, n, grads)
            if whole is not None:
                whole[c] = g
            return grads.through(projection, g, held)

        dout = _in_chunks(step, out, part)
        del out
        dh = grads.through(segment, dout, held)
    # Behind a norm the rows of dx have another gradient than in front of it: they are replaced.
    enter_backward(dx, rows, dh, record.x_kept, n, whole, not n.after, grads)


def _mlp(step: Step, layer: nn.Module, record: Record, dx: Tensor, grads: ParameterGradients) -> None:
    """The MLP alone, if attention has another list."""
    family, saved = step.family, record.saved_list
    n = family.norms(layer)[1]
    params = grads.held_by(family.mlp_modules(layer))
    for c in (slice(0, saved.count),) if record.mlp is not None else step.chunks(saved.count):
        segment, x_out = record.mlp, record.x_out
        if segment is None:
            h, kept = enter(record.x_kept[c], None, n)
            m, segment = trace(lambda leaf: family.mlp(layer, leaf, bool(step.random) or n.after), h)
            x_out = kept + m if n.after else None
            del h, kept, m
        record.mlp = record.x_out = None
        dstatistics = step.statistics.gradient(record.layer, saved, c)
        g = leave_backward(ops.gather(dx, saved.rows[c]), x_out, n, grads)
        dh = grads.through(segment, g, params, dstatistics)
        whole = g if n.after else None
        del g
        enter_backward(dx, saved.rows[c], dh, record.x_kept[c], n, whole, not n.after, grads)


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
    h, _ = enter(record.x_kept, None, n)
    return trace(
        lambda leaf: step.attention.differentiable(layer, leaf, saved, record.tiles, *given, reuse_out=True).flatten(1),
        h,
    )


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
