"""The decoder stack as one autograd function: kept rows in, gradients for kept rows out, one gradient buffer.

x [T, d] is the residual stream, updated in place layer by layer; dx [T, d] the gradient, likewise, in reverse order.
A layer works on the M kept rows of its list:

    h, xk = gather + norm (x)          a = attention(h)
    h2, x2 = norm (xk + a)             m = mlp(h2)             x[rows] = x2 + m

What a layer saves ("recompute"): "none": xk, x2 and what the local autograd graphs of attention and MLP save;
"attention": xk, the attention output and its log-sum-exp; "full": xk. The kept list is saved with it and replayed.
Mode "backward" runs the layer on all rows without saving and keeps xk, output and log-sum-exp of the kept rows:
backward is then the recomputation of "attention" on kept rows, with the weights 1/p where asked for.
`lemo.engine.memory.saved_bytes` is the exact formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lemo import ops
from lemo.engine.families.base import Family, NormWeights, Tables
from lemo.engine.layout import Blocks, Kept
from lemo.engine.participation import Participation, leaves
from lemo.engine.randomness import Generators, generators, same_generators, set_generators
from lemo.ops._autograd import first_order

# Rows the MLP works on at a time where its activations are not kept: bounds the largest transient of a step.
MLP_ROWS = 8192


@dataclass(frozen=True, eq=False)
class Rows:
    """A kept list, reduced to what the backward pass reads; tensors own exactly their memory.

    table_rows: rows of the rotary tables, None where they are all tokens in order.
    """

    rows: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    table_rows: Tensor | None
    weights: Tensor | None
    slots: Tensor | None

    @property
    def count(self) -> int:
        return self.rows.shape[0]


def own(x: Tensor) -> Tensor:
    """x, or a copy of it if x is a window into a larger buffer that would be kept alive."""
    return x if x.untyped_storage().nbytes() == x.numel() * x.element_size() else x.clone()


def _rows(step: Step, kept: Kept) -> Rows:
    if step.reduced is None or step.reduced[0] is not kept:
        step.reduced = (kept, reduce_list(kept, step.weighted))
    return step.reduced[1]


def reduce_list(kept: Kept, weighted: bool) -> Rows:
    if kept.is_everything:
        # Shared by all layers of a step: nothing to own.
        slots, weights = (kept.row_slots, kept.weights) if weighted else (None, None)
        return Rows(kept.rows, kept.cu_seqlens, kept.max_seqlen, None, weights, slots)
    rows = own(kept.rows)
    weights, slots = (own(kept.weights), own(kept.row_slots)) if weighted else (None, None)
    return Rows(rows, own(kept.cu_seqlens), kept.max_seqlen, rows, weights, slots)


@dataclass(eq=False)
class Step:
    """One training forward pass: what all layers share.

    choose(i, x): kept lists of layer i's attention and MLP (None = nothing kept), called once per layer.
    weighted: gradients are weighted by 1/p.
    observe: gets (i, norms [M], kept) where the policy wants to know what a layer added; None otherwise.
    borrowed: x belongs to someone else and must be copied before it is updated.
    random: whether layers draw random numbers; None: they may. general: some modules are called as they are; what their
        graphs reach is then checked.
    """

    family: Family
    layers: Sequence[nn.Module]
    blocks: Blocks
    tables: Tables
    mode: str
    recompute: str
    weighted: bool
    deterministic: bool
    random: bool | None
    choose: Callable[[int, Tensor], tuple[Kept | None, Kept | None]]
    observe: Callable[[int, Tensor, Kept], None] | None
    borrowed: bool
    autocast: tuple[str, torch.dtype, bool]
    general: bool = True
    # The gradient buffer that the loss made for this step; any other gradient is copied before it is changed.
    gradient: int = 0
    faults: list[Kept] = field(default_factory=list)
    # The last list and what was made of it: layers that share a list share its tensors.
    reduced: tuple[Kept, Rows] | None = None
    # The tokens that any layer kept.
    part: Participation = field(default_factory=Participation)

    def context(self) -> Any:
        """Autocast as the layers want it, whatever the caller of forward or backward has switched on.

        Without its cache: weights cast while gradients are off would have none when they are recomputed.
        """
        kind, dtype, enabled = self.autocast
        return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


@dataclass(eq=False)
class Record:
    """What one sub-layer (or a whole layer) keeps for its backward pass."""

    layer: int
    part: str  # "layer", "attention" or "mlp"
    rows: Rows
    xk: Tensor
    x2: Tensor | None = None
    out: Tensor | None = None
    lse: Tensor | None = None
    attention: Segment | None = None
    mlp: Segment | None = None
    rng: Generators | None = None


# --- local graphs -----------------------------------------------------------------------------------------------------


class _Enter(Function):
    """Starts a local graph at h without keeping h alive, as a leaf would."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, anchor: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[None, None]:
        return None, None


@dataclass(eq=False)
class Segment:
    """The graph from h to y. Neither h nor y is kept unless the graph itself needs it."""

    enter: GradientEdge
    leave: GradientEdge

    def backward(self, dy: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor | None]]:
        """dh, and the gradients of params (None where the graph does not reach one). Frees the graph."""
        grads = torch.autograd.grad((self.leave,), [self.enter, *params], (dy,), allow_unused=True)  # type: ignore[arg-type]
        return grads[0], grads[1:]


def trace(function: Callable[[Tensor], Tensor], h: Tensor) -> tuple[Tensor, Segment]:
    """function(h) with its local graph."""
    with torch.enable_grad():
        start = _Enter.apply(h.detach(), torch.zeros((), requires_grad=True))
        edge = get_gradient_edge(start)
        y = function(start)
        return y.detach(), Segment(edge, get_gradient_edge(y))


# --- pieces of a layer ------------------------------------------------------------------------------------------------


def _gather_norm(x: Tensor, rows: Tensor | None, residual: Tensor | None, n: NormWeights) -> tuple[Tensor, Tensor]:
    return ops.gather_norm(x, rows, residual, *n.contiguous, n.kind, n.eps)


def _attend(
    step: Step, layer: nn.Module, rows: Rows, out: Tensor | None = None, lse: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Attention of kept rows as a differentiable function of h: [M, d] -> [M, Hq * D]."""

    def run(h: Tensor) -> Tensor:
        q, k, v = step.family.queries_keys_values(layer, h, step.tables, rows.table_rows)
        y = ops.attention(
            q,
            k,
            v,
            rows.cu_seqlens,
            rows.max_seqlen,
            scale=step.family.scale(layer),
            key_weights=rows.weights,
            row_slots=rows.slots,
            out=out,
            lse=lse,
            deterministic=step.deterministic,
        )
        return y.flatten(1)

    return run


def _chunks(step: Step, rows: int) -> Iterator[slice]:
    # What is known to draw does so once for all rows, as without lemo. (Pieces replay in order, so any would be right.)
    size = rows if step.random else MLP_ROWS
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


class _Params:
    """Gradients of the trained parameters, by parameter; and which of them each piece of a layer holds."""

    def __init__(self, params: Sequence[Tensor], strict: bool) -> None:
        self.wanted = {id(p) for p in params}
        self.strict = strict
        self.grads: dict[int, Tensor] = {}

    def of(self, modules: Sequence[nn.Module]) -> list[Tensor]:
        """Each once, however many of the modules share it: autograd gives every mention the whole gradient."""
        return list({id(p): p for m in modules for p in m.parameters() if id(p) in self.wanted}.values())

    def through(self, segment: Segment, dy: Tensor, params: Sequence[Tensor]) -> Tensor:
        """dh; adds the gradients of params. Frees the graph."""
        if self.strict:
            known = {id(p) for p in params}
            for leaf in leaves(segment.leave.node, segment.enter.node):
                if id(leaf) not in known:
                    raise RuntimeError(
                        f"lemo: a trained tensor of shape {list(leaf.shape)} takes part in an attention or MLP whose "
                        "modules do not hold it, so it would get no gradient: register it as a parameter of the "
                        "module that uses it, or train without lemo (lemo.remove)"
                    )
        dh, grads = segment.backward(dy, params)
        self.add(params, grads)
        return dh

    def wants(self, weight: Tensor | None) -> bool:
        return weight is not None and id(weight) in self.wanted

    def add(self, params: Sequence[Tensor | None], grads: Sequence[Tensor | None]) -> None:
        for p, g in zip(params, grads, strict=True):
            if p is not None and g is not None:
                g = g.to(p.dtype)
                self.grads[id(p)] = g if id(p) not in self.grads else self.grads[id(p)] + g


# --- forward ----------------------------------------------------------------------------------------------------------


def _rng_state(step: Step, device: torch.device) -> Generators | None:
    return generators(device) if step.random is not False and step.recompute != "none" else None


@contextmanager
def _replay(rng: Generators | None, device: torch.device) -> Iterator[None]:
    """The random numbers of the forward pass again; the generators are left as they were found."""
    if rng is None:
        yield
        return
    before = generators(device)
    set_generators(rng, device)
    try:
        yield
    finally:
        set_generators(before, device)


@contextmanager
def _no_draws(step: Step, i: int, device: torch.device) -> Iterator[None]:
    """Mode "backward" draws for all rows and could not draw the same for the kept ones again."""
    before = generators(device) if step.random is not False else None
    yield
    if before is not None and not same_generators(before, generators(device)):
        raise ValueError(
            f'layer {i} drew random numbers, and mode "backward" recomputes kept tokens only and cannot draw the same '
            "for them again: switch the randomness of its adapter off, or use modes skip and dense"
        )


def forward(step: Step, x: Tensor) -> list[Record]:
    """Runs all layers over x in place. Returns what the backward pass needs, in order."""
    records: list[Record] = []
    for i, layer in enumerate(step.layers):
        attention, mlp = step.choose(i, x)
        for kept in (attention, mlp):
            if kept is not None and kept.info is not None and not any(k is kept for k in step.faults):
                step.faults.append(kept)
        if attention is None and mlp is None:
            if step.mode == "backward":
                with _no_draws(step, i, x.device):
                    _dense_forward(step, i, layer, x, None)
            continue
        if step.mode == "backward":
            assert attention is not None
            with _no_draws(step, i, x.device):
                record = _dense_forward(step, i, layer, x, _rows(step, attention))
            assert record is not None
            records.append(record)
            continue
        if attention is mlp:
            assert attention is not None
            records.append(_skip_forward(step, i, layer, x, _rows(step, attention), attention))
            continue
        for part, kept in (("attention", attention), ("mlp", mlp)):
            if kept is not None:
                records.append(_part_forward(step, i, layer, x, _rows(step, kept), kept, part))
    step.reduced = None
    return records


def _attention_forward(step: Step, layer: nn.Module, record: Record, h: Tensor, keep_graph: bool) -> Tensor:
    """a [M, d]; fills the record's graph, or output and log-sum-exp."""
    rows = record.rows
    if keep_graph:
        run = _attend(step, layer, rows)
        a, record.attention = trace(lambda leaf: step.family.attention_output(layer, run(leaf)), h)
        return a
    q, k, v = step.family.queries_keys_values(layer, h, step.tables, rows.table_rows)
    out, lse = ops.attention_forward(q, k, v, rows.cu_seqlens, None, rows.max_seqlen, step.family.scale(layer))
    del q, k, v
    if step.recompute == "attention":
        record.out, record.lse = out, lse
    return step.family.attention_output(layer, out.flatten(1))


def _skip_forward(step: Step, i: int, layer: nn.Module, x: Tensor, rows: Rows, kept: Kept) -> Record:
    n1, n2 = step.family.norms(layer)
    rng = _rng_state(step, x.device)
    h, xk = _gather_norm(x, rows.rows, None, n1)
    record = Record(i, "layer", rows, xk, rng=rng)
    keep_graph = step.recompute == "none"
    a = _attention_forward(step, layer, record, h, keep_graph)
    del h
    norms = []
    if keep_graph:
        h2, record.x2 = _gather_norm(a, None, xk, n2)
        m, record.mlp = trace(lambda leaf: step.family.mlp(layer, leaf), h2)
        ops.scatter_add_(x, rows.rows, m, record.x2)
        if step.observe is not None:
            norms.append(torch.linalg.vector_norm(a + m, dim=1, dtype=torch.float32))
    else:
        for c in _chunks(step, rows.count):
            h2, x2 = _gather_norm(a[c], None, xk[c], n2)
            m = step.family.mlp(layer, h2)
            ops.scatter_add_(x, rows.rows[c], m, x2)
            if step.observe is not None:
                norms.append(torch.linalg.vector_norm(m + a[c], dim=1, dtype=torch.float32))
    if step.observe is not None:
        step.observe(i, torch.cat(norms), kept)
    return record


def _part_forward(step: Step, i: int, layer: nn.Module, x: Tensor, rows: Rows, kept: Kept, part: str) -> Record:
    """Attention or the MLP alone, on a kept list of its own."""
    n = step.family.norms(layer)[part == "mlp"]
    rng = _rng_state(step, x.device)
    h, s = _gather_norm(x, rows.rows, None, n)
    record = Record(i, part, rows, s, rng=rng)
    if part == "attention":
        y = _attention_forward(step, layer, record, h, step.recompute == "none")
        if step.observe is not None:
            step.observe(i, torch.linalg.vector_norm(y, dim=1, dtype=torch.float32), kept)
    elif step.recompute == "none":
        y, record.mlp = trace(lambda leaf: step.family.mlp(layer, leaf), h)
    else:
        y = torch.empty_like(s)
        for c in _chunks(step, rows.count):
            y[c] = step.family.mlp(layer, h[c])
    ops.scatter_add_(x, rows.rows, y, s)
    return record


def _dense_forward(step: Step, i: int, layer: nn.Module, x: Tensor, rows: Rows | None) -> Record | None:
    """Mode "backward": the exact layer on all tokens; only kept rows of its input and attention output are saved."""
    n1, n2 = step.family.norms(layer)
    record = None
    if rows is not None:
        record = Record(i, "layer", rows, ops.gather(x, rows.rows))
    h, _ = _gather_norm(x, None, None, n1)
    q, k, v = step.family.queries_keys_values(layer, h, step.tables, None)
    del h
    blocks = step.blocks
    out, lse = ops.attention_forward(q, k, v, blocks.cu_seqlens, None, blocks.max_seqlen, step.family.scale(layer))
    del q, k, v
    if record is not None and rows is not None:
        record.out, record.lse = out.index_select(0, rows.rows), lse.index_select(1, rows.rows)
    a = step.family.attention_output(layer, out.flatten(1))
    del out, lse
    norms = []
    for c in _chunks(step, x.shape[0]):
        h2, x2 = _gather_norm(a[c], None, x[c], n2)
        m = step.family.mlp(layer, h2)
        torch.add(x2, m, out=x[c])
        if step.observe is not None:
            norms.append(torch.linalg.vector_norm(m + a[c], dim=1, dtype=torch.float32))
    if step.observe is not None:
        step.observe(i, torch.cat(norms), Kept.everything(blocks))
    return record


# --- backward ---------------------------------------------------------------------------------------------------------


def backward(step: Step, records: list[Record], dx: Tensor, params: Sequence[Tensor]) -> _Params:
    """Runs the layers' gradients over dx in place, from the last; every record is dropped when it is done."""
    grads = _Params(params, step.general)
    while records:
        record = records.pop()
        layer = step.layers[record.layer]
        with _replay(record.rng, dx.device):
            if record.part == "layer":
                _layer_backward(step, layer, record, dx, grads)
            elif record.part == "attention":
                _attention_part_backward(step, layer, record, dx, grads)
            else:
                _mlp_part_backward(step, layer, record, dx, grads)
    for kept in step.faults:
        # Read only now, when the device has done the work anyway; the gradients are not handed out before.
        kept.raise_on_fault()
    return grads


def _norm_backward(dy: Tensor, s: Tensor, n: NormWeights, extra: Tensor | None, grads: _Params) -> Tensor:
    ds, dw, db = ops.gather_norm_backward(
        dy, s, n.contiguous[0], extra, n.kind, n.eps, grads.wants(n.weight), grads.wants(n.bias)
    )
    grads.add((n.weight, n.bias), (dw, db))
    return ds


def _norm_backward_into(
    dx: Tensor,
    rows: Tensor,
    dy: Tensor,
    s: Tensor,
    n: NormWeights,
    extra: Tensor | None,
    accumulate: bool,
    grads: _Params,
) -> None:
    dw, db = ops.gather_norm_backward_(
        dx, rows, dy, s, n.contiguous[0], extra, n.kind, n.eps, accumulate, grads.wants(n.weight), grads.wants(n.bias)
    )
    grads.add((n.weight, n.bias), (dw, db))


def _attention_again(
    step: Step, layer: nn.Module, record: Record, n: NormWeights, want_output: bool
) -> tuple[Tensor, Segment]:
    """The attention sub-layer of the kept rows, recomputed with its graph."""
    h, _ = _gather_norm(record.xk, None, None, n)
    run = _attend(step, layer, record.rows, record.out, record.lse)
    want_output = want_output or bool(step.random)
    return trace(lambda leaf: step.family.attention_output(layer, run(leaf), want_output), h)


def _layer_backward(step: Step, layer: nn.Module, record: Record, dx: Tensor, grads: _Params) -> None:
    family, rows = step.family, record.rows
    n1, n2 = family.norms(layer)
    attention = family.attention_modules(layer)
    mlp_params = grads.of(family.mlp_modules(layer))
    weighted = rows.weights is not None
    # Gradient of what the layer adds to the kept rows.
    g = ops.gather(dx, rows.rows, rows.weights, rows.slots)
    if record.mlp is not None:
        assert record.x2 is not None and record.attention is not None
        dh2 = grads.through(record.mlp, g, mlp_params)
        record.mlp = None
        ds2 = branch = _norm_backward(dh2, record.x2, n2, g, grads)
        segment, record.attention, record.x2 = record.attention, None, None
    else:
        a, segment = _attention_again(step, layer, record, n1, True)
        branch = torch.empty_like(g)
        want_output = bool(step.random)
        for c in _chunks(step, rows.count):
            h2, x2 = _gather_norm(a[c], None, record.xk[c], n2)
            _, mlp = trace(lambda leaf: family.mlp(layer, leaf, want_output), h2)
            del h2
            dh2 = grads.through(mlp, g[c], mlp_params)
            # With weights the identity path keeps its own gradient, so g is added to the attention branch only.
            branch[c] = _norm_backward(dh2, x2, n2, None if weighted else g[c], grads)
        del a
        ds2 = g.add_(branch) if weighted else branch
    del g
    dh = grads.through(segment, ds2, grads.of(attention))
    # Unweighted: g reached the input through x2, so the rows are replaced. Weighted: they still hold the identity's.
    _norm_backward_into(dx, rows.rows, dh, record.xk, n1, branch, weighted, grads)


def _attention_part_backward(step: Step, layer: nn.Module, record: Record, dx: Tensor, grads: _Params) -> None:
    n1 = step.family.norms(layer)[0]
    segment = record.attention or _attention_again(step, layer, record, n1, False)[1]
    record.attention = None
    params = grads.of(step.family.attention_modules(layer))
    dh = grads.through(segment, ops.gather(dx, record.rows.rows), params)
    _norm_backward_into(dx, record.rows.rows, dh, record.xk, n1, None, True, grads)


def _mlp_part_backward(step: Step, layer: nn.Module, record: Record, dx: Tensor, grads: _Params) -> None:
    family, rows = step.family, record.rows.rows
    norms = family.norms(layer)
    params = grads.of(family.mlp_modules(layer))
    for c in (slice(0, record.rows.count),) if record.mlp is not None else _chunks(step, record.rows.count):
        segment = record.mlp
        if segment is None:
            h, _ = _gather_norm(record.xk[c], None, None, norms[1])
            segment = trace(lambda leaf: family.mlp(layer, leaf, bool(step.random)), h)[1]
        record.mlp = None
        dh = grads.through(segment, ops.gather(dx, rows[c]), params)
        _norm_backward_into(dx, rows[c], dh, record.xk[c], norms[1], None, True, grads)


@contextmanager
def _silent(params: Sequence[Tensor]) -> Iterator[None]:
    """Hooks of the parameters see the whole gradient, once, when `Stack` hands it out; not the local graphs' shares."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in params if p._backward_hooks]
    for registered, _ in hooks:
        registered.clear()
    try:
        yield
    finally:
        for registered, before in hooks:
            registered.update(before)


# --- the function -----------------------------------------------------------------------------------------------------


class Stack(Function):
    """All layers at once. Inputs: x [T, d], the step, and the trained parameters of the layers, each once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Step, *params: Tensor) -> Tensor:
        stream = x.clone(memory_format=torch.contiguous_format) if step.borrowed else x.detach()
        with step.context():
            ctx.records = forward(step, stream)
        ctx.step, ctx.params = step, params
        ctx.depends = params
        return stream

    @staticmethod
    @first_order("a training step")
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        if ctx.records is None:
            raise RuntimeError(
                "lemo: backward through the same step a second time: its saved tensors are gone (and retain_graph "
                "cannot keep them); run the forward pass again"
            )
        step: Step = ctx.step
        owned = step.gradient == dy.data_ptr() and dy.is_contiguous()
        dx = dy.detach() if owned else dy.clone(memory_format=torch.contiguous_format)
        records, ctx.records = ctx.records, None
        drawn = {record.layer for record in records}
        with step.context(), _silent(ctx.params):
            grads = backward(step, records, dx, ctx.params)
        if step.weighted:  # a layer for which nothing was drawn has an estimate too: zero
            empty = [layer for i, layer in enumerate(step.layers) if i not in drawn]
            unseen = [p for p in grads.of(empty) if id(p) not in grads.grads]
            grads.add(unseen, [torch.zeros_like(p) for p in unseen])
        found = grads.grads
        # What no kept row reached has no gradient, but hooks cannot take None.
        out = (
            torch.zeros_like(p) if p._backward_hooks and id(p) not in found else found.get(id(p)) for p in ctx.params
        )
        return dx if ctx.needs_input_grad[0] else None, None, *out
