"""The layers' backward pass, in place of the gradient dx [T, d] of the residual stream, from the last layer.

Lists are replayed from the records, never chosen again; what was not saved is recomputed, on kept rows. A segment of
layers without records first runs forward again, from the stream before it, with the lists of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lemo import ops
from lemo.engine.families.base import NormWeights
from lemo.engine.forward import forward_again, gather_norm
from lemo.engine.gradients import ParameterGradients
from lemo.engine.randomness import Generators, generators, set_generators
from lemo.engine.records import Record
from lemo.engine.segments import Segment, trace
from lemo.engine.step import Step


def backward(step: Step, dx: Tensor, params: Sequence[Tensor]) -> ParameterGradients:
    """Runs the layers' gradients over dx in place; every record is dropped once it is used."""
    grads = ParameterGradients(params, step.general, step.weights)
    *again, last = step.layer_segments
    _segment(step, last, dx, grads)
    for layers in reversed(again):
        with _replay(step.runs[layers.start].generators, dx.device):
            forward_again(step, layers, step.records.pop_stream())
        _segment(step, layers, dx, grads)
    # Read only now that the device has done the work anyway, and before any gradient is handed out.
    step.raise_on_fault()
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
    """Attention and MLP on one list. g [M, d]: gradient of what the layer adds to its rows."""
    saved, (n1, n2) = record.saved_list, step.family.norms(layer)
    weighted = saved.weights is not None
    g = ops.gather(dx, saved.rows, saved.weights, saved.slots)
    if record.mlp is not None:
        assert record.x_mlp is not None and record.attention is not None
        dstatistics = step.statistics.gradient(record.layer, saved, slice(0, saved.count))
        dh2 = grads.through(record.mlp, g, grads.held_by(step.family.mlp_modules(layer)), dstatistics)
        record.mlp = None
        ds2 = branch = _norm_backward(dh2, record.x_mlp, n2, g, grads)
        segment, record.attention, record.x_mlp = record.attention, None, None
    else:
        a, segment = _attention_again(step, layer, record, n1, want_output=True)
        branch = _mlp_again(step, layer, record, a, g, grads)
        del a
        # With weights, branch lacks g: the identity path keeps its own gradient.
        ds2 = g.add_(branch) if weighted else branch
    del g
    dh = grads.through(segment, ds2, _attention_parameters(step, layer, grads))
    # Unweighted: g reached the input through x_mlp, so the rows are replaced. Weighted: they still hold the identity's.
    _norm_backward_into(dx, saved.rows, dh, record.x_kept, n1, branch, weighted, grads)


def _mlp_again(step: Step, layer: nn.Module, record: Record, a: Tensor, g: Tensor, grads: ParameterGradients) -> Tensor:
    """Gradient [M, d] that reaches the MLP norm's input from g, recomputed in chunks of rows from attention's a [M, d];
    includes g itself (the identity path) unless gradients are weighted."""
    family, weighted = step.family, record.saved_list.weights is not None
    n2, params = family.norms(layer)[1], grads.held_by(family.mlp_modules(layer))
    branch = torch.empty_like(g)
    want_output = bool(step.random)
    for c in step.chunks(record.saved_list.count):
        h2, x_mlp = gather_norm(a[c], None, record.x_kept[c], n2)
        _, mlp = trace(lambda leaf: family.mlp(layer, leaf, want_output), h2)
        del h2
        dh2 = grads.through(mlp, g[c], params, step.statistics.gradient(record.layer, record.saved_list, c))
        _norm_backward_into(branch[c], None, dh2, x_mlp, n2, None if weighted else g[c], False, grads)
    return branch


def _attention(step: Step, layer: nn.Module, record: Record, dx: Tensor, grads: ParameterGradients) -> None:
    """Attention alone, if the MLP has another list."""
    n1, rows = step.family.norms(layer)[0], record.saved_list.rows
    segment = record.attention or _attention_again(step, layer, record, n1, want_output=False)[1]
    record.attention = None
    dh = grads.through(segment, ops.gather(dx, rows), _attention_parameters(step, layer, grads))
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


def _attention_again(
    step: Step, layer: nn.Module, record: Record, n: NormWeights, want_output: bool
) -> tuple[Tensor, Segment]:
    """Attention of the kept rows, recomputed with its graph: (a [M, d], graph from the norm's output to a)."""
    h, _ = gather_norm(record.x_kept, None, None, n)
    want_output = want_output or bool(step.random)

    def attend(leaf: Tensor) -> Tensor:
        out = step.attention.differentiable(layer, leaf, record.saved_list, record.tiles, record.out, record.lse)
        return step.family.attention_output(layer, out.flatten(1), want_output)

    return trace(attend, h)


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
