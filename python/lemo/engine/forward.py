"""The layers' forward pass, in place of the residual stream x [T, d]; see `lemo.engine.stack` for what a layer does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lemo import ops
from lemo.engine.config import Recompute
from lemo.engine.layout import Kept, KeptPair
from lemo.engine.linear import Again
from lemo.engine.randomness import Generators, generators, same_generators
from lemo.engine.records import Record, SavedList, Stream
from lemo.engine.residual import Norms, change, cross, cross_again, enter, join, leave
from lemo.engine.segments import split, trace
from lemo.engine.step import LayerRun, Step


def forward(step: Step, x: Tensor) -> None:
    """Runs all layers over x in place. What the backward pass needs is put into `step.records`."""
    *again, last = step.layer_segments
    for layers in again:
        states = generators(x.device) if step.random is not False else None
        step.records.put_stream(Stream(layers.start, x.clone()))
        for i in layers:
            step.runs[i] = _first_run(step, i, x, None)
        step.runs[layers.start].generators = states
    for i in last:
        _first_run(step, i, x, step.recompute_of(i))
    step.forget_lists()


def forward_again(step: Step, layers: range, x: Tensor) -> None:
    """Runs the layers of a segment over the stream x before them, as `forward` did, and puts their records. x is used
    up."""
    for i in layers:
        run = dataclasses.replace(
            step.runs.pop(i), saves=step.recompute_of(i), again=True, last=i == layers[-1], generators=None
        )
        with step.layer(i) as layer:
            _run(step, i, layer, x, run, (None, None))


def _first_run(step: Step, i: int, x: Tensor, saves: Recompute | None) -> LayerRun:
    """Chooses the lists of layer i and runs it."""
    with step.layer(i) as layer:
        kept = step.choose(i, x)
        for k in kept:
            step.check_later(k)
        attention, mlp = (None if k is None else step.saved_list(k) for k in kept)
        run = LayerRun(attention, mlp, saves)
        _run(step, i, layer, x, run, kept)
    return run


def _run(step: Step, i: int, layer: nn.Module, x: Tensor, run: LayerRun, kept: KeptPair) -> None:
    """Layer i on its lists. kept: the same lists, for whoever observes the layer."""
    step.records.send()
    if step.mode == "backward":
        # What a layer that runs again saves then decides now, too: its numbers are those of the first time.
        in_parts = step.recompute_of(i) == "none" and run.attention is not None
        work = _exact_layer_in_parts if in_parts else _exact_layer
        with _no_draws(step, i, x.device):
            work(step, i, layer, x, run)
    elif run.attention is run.mlp:
        if run.attention is not None:
            _kept_layer(step, i, layer, x, run, kept[0])
    else:
        if run.attention is not None:
            _kept_attention(step, i, layer, x, run, kept[0])
        if run.mlp is not None:
            step.records.send()
            _kept_mlp(step, i, layer, x, run)


# --- kept rows only ---------------------------------------------------------------------------------------------------


def _kept_layer(step: Step, i: int, layer: nn.Module, x: Tensor, run: LayerRun, kept: Kept | None) -> None:
    """Attention and MLP on one kept list."""
    saved = run.attention
    assert saved is not None
    norms = step.family.norms(layer)
    states = _generators(step, run, x.device)
    if run.last and run.saves == "full":
        step.records.put(Record(i, "layer", saved, _last_rows(x, saved), generators=states, tiles=run.tiles))
        return
    h, x_kept = enter(x, saved.rows, norms[0])
    record = Record(i, "layer", saved, x_kept, generators=states)
    a = _attend(step, layer, record, h, run)
    del h
    if run.last and not run.graphs:
        step.records.put(record)
        return
    observe, lengths = None if run.again else step.observe, []
    if run.graphs:
        h2, record.x_mlp, base = cross(x_kept, None, a, norms)
        a = a if observe is not None else a.new_empty(0)  # not while the MLP runs
        again = _again(step, layer, record.x_mlp, cross_again)
        m, record.mlp = trace(lambda leaf: step.family.mlp(layer, leaf), h2, _count(step, run, i), again)
        y, record.x_out = join(m, base, norms[1])
        leave(x, saved.rows, y, base, norms[1])
        if observe is not None:
            lengths.append(_lengths(change(y, a, x_kept, norms[1])))
    else:
        for c in step.chunks(saved.count):
            added = step.family.attention_output(layer, a[c])
            h2, _, base = cross(x_kept[c], None, added, norms)
            y, _ = join(_mlp(step, layer, h2, _count(step, run, i)), base, norms[1])
            leave(x, saved.rows[c], y, base, norms[1])
            if observe is not None:
                lengths.append(_lengths(change(y, added, x_kept[c], norms[1])))
    if observe is not None and kept is not None:
        observe(i, torch.cat(lengths), kept)
    _put(step, record, run)


def _kept_attention(step: Step, i: int, layer: nn.Module, x: Tensor, run: LayerRun, kept: Kept | None) -> None:
    """Attention alone, if the MLP has another list."""
    saved = run.attention
    assert saved is not None
    states = _generators(step, run, x.device)
    n = step.family.norms(layer)[0]
    h, x_kept = enter(x, saved.rows, n)
    record = Record(i, "attention", saved, x_kept, generators=states)
    a = _attend(step, layer, record, h, run)
    del h
    observe, lengths = None if run.again else step.observe, []
    for c in (slice(0, saved.count),) if run.graphs else step.chunks(saved.count):
        added = a if run.graphs else step.family.attention_output(layer, a[c])
        y, s = join(added, x_kept[c], n)
        leave(x, saved.rows[c], y, x_kept[c], n)
        if run.graphs:
            record.x_out = s
        if observe is not None:
            lengths.append(_lengths(change(y, None, x_kept[c], n)))
    if observe is not None and kept is not None:
        observe(i, torch.cat(lengths), kept)
    _put(step, record, run)


def _kept_mlp(step: Step, i: int, layer: nn.Module, x: Tensor, run: LayerRun) -> None:
    """The MLP alone, if attention has another list."""
    saved = run.mlp
    assert saved is not None
    states = _generators(step, run, x.device)
    if run.last and not run.graphs:
        step.records.put(Record(i, "mlp", saved, _last_rows(x, saved), generators=states))
        return
    n = step.family.norms(layer)[1]
    h, x_kept = enter(x, saved.rows, n)
    record = Record(i, "mlp", saved, x_kept, generators=states)
    if run.graphs:
        again = _again(step, layer, x_kept, _mlp_input)
        m, record.mlp = trace(lambda leaf: step.family.mlp(layer, leaf), h, _count(step, run, i), again)
    else:
        m = torch.empty_like(x_kept)
        for c in step.chunks(saved.count):
            m[c] = _mlp(step, layer, h[c], _count(step, run, i))
    y, s = join(m, x_kept, n)
    leave(x, saved.rows, y, x_kept, n)
    if run.graphs:
        record.x_out = s
    _put(step, record, run)


def _attend(step: Step, layer: nn.Module, record: Record, h: Tensor, run: LayerRun) -> Tensor:
    """Attention of the kept rows from its input h [M, d]. Fills the record's graph, and gives what is added to
    the rows, [M, d]; or else its output and log-sum-exp, and gives the output [M, Hq D], which is still to be
    projected."""
    saved = record.saved_list
    choice = run.tiles
    if not run.again and step.tiles is not None and step.attention.options(layer).window is None:
        choice = run.tiles = step.tiles(record.layer, record.x_kept, saved)
    if run.graphs:
        a, record.attention = trace(
            lambda leaf: step.family.attention_output(
                layer, step.attention.differentiable(layer, leaf, saved, choice).flatten(1)
            ),
            h,
            again=_again(step, layer, record.x_kept, _attention_input),
        )
        return a
    out, lse = step.attention.forward(layer, h, saved, choice)
    record.tiles = choice
    if run.saves == "attention":
        record.out, record.lse = out, lse
    return out.flatten(1)


def _again(step: Step, layer: nn.Module, rows: Tensor, make: Callable[[Tensor, Norms], Tensor]) -> Again:
    """Makes a sub-layer's input again from the rows that its backward pass needs anyway. Norms' weights are looked up
    then: divided ones are gathered anew. (The graph holds this, so it must not hold the step, which holds the graph.)
    """
    family = step.family
    return Again(lambda rows: make(rows, family.norms(layer)), (rows,))


def _attention_input(rows: Tensor, norms: Norms) -> Tensor:
    return enter(rows, None, norms[0])[0]


def _mlp_input(rows: Tensor, norms: Norms) -> Tensor:
    """Of an MLP with a list of its own."""
    return enter(rows, None, norms[1])[0]


def _put(step: Step, record: Record, run: LayerRun) -> None:
    if run.saves is not None:
        step.records.put(record)


def _last_rows(x: Tensor, saved: SavedList) -> Tensor:
    """Rows of a stream that nothing else reads any more."""
    return x if saved.table_rows is None else ops.gather(x, saved.rows)


def _count(step: Step, run: LayerRun, i: int) -> Callable[[Tensor], None]:
    """What takes the MLP's statistics: they are added up once."""
    return (lambda _: None) if run.again else (lambda statistics: step.statistics.add(i, statistics))


def _mlp(step: Step, layer: nn.Module, h: Tensor, count: Callable[[Tensor], None]) -> Tensor:
    """What the MLP adds, [M, d], of its input h [M, d]. Without a graph."""
    y, statistics = split(step.family.mlp(layer, h))
    if statistics is not None:
        count(statistics)
    return y


# --- mode "backward" --------------------------------------------------------------------------------------------------


def _exact_layer(step: Step, i: int, layer: nn.Module, x: Tensor, run: LayerRun) -> None:
    """The exact layer on all tokens; of kept rows, its input and attention's output are saved, and no graphs."""
    norms = step.family.norms(layer)
    record = None
    if run.saves is not None and run.attention is not None:
        record = Record(i, "layer", run.attention, ops.gather(x, run.attention.rows))
    if run.last and record is None:
        return
    everything = step.everything
    # Without a name for the norm's output, [T, d]: it is gone before attention runs.
    out, lse = step.attention.forward(layer, enter(x, None, norms[0])[0], everything)
    if record is not None:
        rows = record.saved_list.rows
        record.out, record.lse = out.index_select(0, rows), lse.index_select(1, rows)
        step.records.put(record)
    if run.last:
        return
    out = out.flatten(1)
    observe, lengths = None if run.again else step.observe, []
    for c in step.chunks(x.shape[0]):
        added = step.family.attention_output(layer, out[c])
        h2, _, base = cross(x[c], None, added, norms)
        y, _ = join(_mlp(step, layer, h2, _count(step, run, i)), base, norms[1])
        if observe is not None:
            lengths.append(_lengths(change(y, added, x[c], norms[1])))
        leave(x[c], None, y, base, norms[1])
    if observe is not None:
        observe(i, torch.cat(lengths), Kept.everything(step.blocks))


def _exact_layer_in_parts(step: Step, i: int, layer: nn.Module, x: Tensor, run: LayerRun) -> None:
    """As `_exact_layer`, with local graphs of the kept rows, so that nothing is multiplied again: what is computed row
    by row is computed once for these rows, with a graph, and once for the others, without."""
    saved = run.attention
    assert saved is not None
    norms = step.family.norms(layer)
    others = None if saved.table_rows is None else _left_out(saved.rows, x.shape[0])
    h, x_kept = enter(x, saved.rows, norms[0])
    record = Record(i, "layer", saved, x_kept)
    out: list[Tensor] = []  # of attention, [T, Hq D]

    def attend(leaf: Tensor) -> Tensor:
        y, whole = _exact_attention(step, layer, leaf, x, saved, others)
        out.append(whole)
        return step.family.attention_output(layer, y)

    if run.graphs:
        again = _again(step, layer, x_kept, _attention_input)
        a, record.attention = trace(attend, h, again=again, held=step.held(i, layer, saved))
    else:
        a = attend(h)
    h, record.x_mlp, base = cross(x_kept, None, a, norms)
    count, observe = _count(step, run, i), None if run.again else step.observe
    a = a if observe is not None else a.new_empty(0)  # not while the MLP runs
    if run.graphs:
        again = _again(step, layer, record.x_mlp, cross_again)
        m, record.mlp = trace(lambda leaf: step.family.mlp(layer, leaf), h, count, again, step.held(i, layer, saved))
    else:
        m = torch.empty_like(base)
        for c in step.chunks(saved.count):
            m[c] = _mlp(step, layer, h[c], count)
    y, record.x_out = join(m, base, norms[1])
    _put(step, record, run)
    if run.last:
        return
    del h, m, record
    lengths = None if observe is None else x.new_empty(x.shape[0], dtype=torch.float32)
    leave(x, saved.rows, y, base, norms[1])
    if lengths is not None:
        lengths[saved.rows.long()] = _lengths(change(y, a, x_kept, norms[1]))
    for rows in () if others is None else (others[c] for c in step.chunks(others.shape[0])):
        a = step.family.attention_output(layer, ops.gather(out[0], rows))
        h, _, base = cross(x, rows, a, norms)
        y, _ = join(_mlp(step, layer, h, count), base, norms[1])
        if lengths is not None:
            before = ops.gather(x, rows) if norms[1].after else None
            lengths[rows.long()] = _lengths(change(y, a, before, norms[1]))
        leave(x, rows, y, base, norms[1])
    if observe is not None and lengths is not None:
        observe(i, lengths, Kept.everything(step.blocks))


def _exact_attention(
    step: Step, layer: nn.Module, h: Tensor, x: Tensor, saved: SavedList, others: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of attention's input h [M, d] of the kept rows: its output among all tokens, [M, Hq D], with the graph of
    these rows alone; and that of all tokens, [T, Hq D], without one."""
    attention = step.attention
    projected = attention.project(layer, h, saved.table_rows)
    with torch.no_grad():
        q, k, v = (t.detach() for t in projected)
        if others is not None:
            rest = attention.project(layer, enter(x, others, step.family.norms(layer)[0])[0], others)
            rows = saved.rows.long(), others.long()
            q, k, v = (_joined(x.shape[0], rows, pair) for pair in zip((q, k, v), rest, strict=True))
            del rest
        out, lse = attention.of_projected(layer, q, k, v, step.everything)
        del q, k, v
        own = (out, lse)
        if others is not None:
            own = ops.gather(out.flatten(1), saved.rows).view(-1, *out.shape[1:]), lse.index_select(1, saved.rows)
    y = attention.of_projected_with_gradient(layer, *projected, saved, out=own[0], lse=own[1])
    return y.flatten(1), out.flatten(1)


def _left_out(rows: Tensor, tokens: int) -> Tensor:
    """int32: the tokens that are not in rows, ascending. Does not wait for the device."""
    count = tokens - rows.shape[0]
    every = torch.arange(tokens, dtype=torch.int32, device=rows.device)
    left = torch.ones(tokens, dtype=torch.bool, device=rows.device).index_fill_(0, rows.long(), False)
    places = torch.where(left, left.cumsum(0) - 1, count)  # tokens in rows go to a place behind all others
    return every.new_empty(count + 1).scatter_(0, places, every)[:count]


def _joined(tokens: int, rows: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """[tokens, ...] of several values [M, ...] at rows int64 [M]."""
    whole = values[0].new_empty(tokens, *values[0].shape[1:])
    flat = [t.flatten(1) for t in (whole, *values)]
    # Eight bytes at a time, if they are aligned.
    sizes = [(t.shape[1] * t.element_size(), t.storage_offset() * t.element_size()) for t in flat]
    if all(t.is_contiguous() for t in flat) and not any(n % 8 for pair in sizes for n in pair):
        flat = [t.view(torch.int64) for t in flat]
    for index, given in zip(rows, flat[1:], strict=True):
        flat[0].index_copy_(0, index, given)
    return whole


# --- random numbers ---------------------------------------------------------------------------------------------------


def _generators(step: Step, run: LayerRun, device: torch.device) -> Generators | None:
    """The states that recomputation has to start from."""
    return generators(device) if step.random is not False and run.saves in ("full", "attention") else None


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


def _lengths(added: Tensor) -> Tensor:
    """float32 [M] of what was added to M rows."""
    return torch.linalg.vector_norm(added, dim=1, dtype=torch.float32)
