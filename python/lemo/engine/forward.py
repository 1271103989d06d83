"""The layers' forward pass, in place of the residual stream x [T, d]; see `lemo.engine.stack` for what a layer does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lemo import ops
from lemo.engine.families.base import NormWeights
from lemo.engine.layout import Kept
from lemo.engine.randomness import Generators, generators, same_generators
from lemo.engine.records import Record
from lemo.engine.segments import split, trace
from lemo.engine.step import Step


def forward(step: Step, x: Tensor) -> None:
    """Runs all layers over x in place. What the backward pass needs is put into `step.records`."""
    for i in range(len(step.layers)):
        with step.layer(i) as layer:
            attention, mlp = step.choose(i, x)
            step.check_later(attention)
            step.check_later(mlp)
            if step.mode == "backward":
                with _no_draws(step, i, x.device):
                    _exact_layer(step, i, layer, x, attention)
            elif attention is mlp:
                if attention is not None:
                    _kept_layer(step, i, layer, x, attention)
            else:
                if attention is not None:
                    _kept_attention(step, i, layer, x, attention)
                if mlp is not None:
                    _kept_mlp(step, i, layer, x, mlp)
    step.forget_lists()


def gather_norm(x: Tensor, rows: Tensor | None, residual: Tensor | None, n: NormWeights) -> tuple[Tensor, Tensor]:
    """(norm(s), s), both [M, d], of s = x[rows] + residual; rows int32 [M], None: all of x."""
    return ops.gather_norm(x, rows, residual, *n.operands, n.kind, n.eps)


# --- kept rows only ---------------------------------------------------------------------------------------------------


def _kept_layer(step: Step, i: int, layer: nn.Module, x: Tensor, kept: Kept) -> None:
    """Attention and MLP on one kept list."""
    saved = step.saved_list(kept)
    n1, n2 = step.family.norms(layer)
    states = _generators(step, i, x.device)
    h, x_kept = gather_norm(x, saved.rows, None, n1)
    record = Record(i, "layer", saved, x_kept, generators=states)
    a = _attend(step, layer, record, h)
    del h
    norms = []
    if step.recompute_of(i) == "none":
        h2, record.x_mlp = gather_norm(a, None, x_kept, n2)
        m, record.mlp = trace(lambda leaf: step.family.mlp(layer, leaf), h2, lambda s: step.statistics.add(i, s))
        ops.scatter_add_(x, saved.rows, m, record.x_mlp)
        if step.observe is not None:
            norms.append(_lengths(a + m))
    else:
        for c in step.chunks(saved.count):
            h2, x_mlp = gather_norm(a[c], None, x_kept[c], n2)
            m = _mlp(step, i, layer, h2)
            ops.scatter_add_(x, saved.rows[c], m, x_mlp)
            if step.observe is not None:
                norms.append(_lengths(m + a[c]))
    if step.observe is not None:
        step.observe(i, torch.cat(norms), kept)
    step.records.put(record)


def _kept_attention(step: Step, i: int, layer: nn.Module, x: Tensor, kept: Kept) -> None:
    """Attention alone, if the MLP has another list."""
    saved = step.saved_list(kept)
    states = _generators(step, i, x.device)
    h, x_kept = gather_norm(x, saved.rows, None, step.family.norms(layer)[0])
    record = Record(i, "attention", saved, x_kept, generators=states)
    a = _attend(step, layer, record, h)
    if step.observe is not None:
        step.observe(i, _lengths(a), kept)
    ops.scatter_add_(x, saved.rows, a, x_kept)
    step.records.put(record)


def _kept_mlp(step: Step, i: int, layer: nn.Module, x: Tensor, kept: Kept) -> None:
    """The MLP alone, if attention has another list."""
    saved = step.saved_list(kept)
    states = _generators(step, i, x.device)
    h, x_kept = gather_norm(x, saved.rows, None, step.family.norms(layer)[1])
    record = Record(i, "mlp", saved, x_kept, generators=states)
    if step.recompute_of(i) == "none":
        m, record.mlp = trace(lambda leaf: step.family.mlp(layer, leaf), h, lambda s: step.statistics.add(i, s))
    else:
        m = torch.empty_like(x_kept)
        for c in step.chunks(saved.count):
            m[c] = _mlp(step, i, layer, h[c])
    ops.scatter_add_(x, saved.rows, m, x_kept)
    step.records.put(record)


def _attend(step: Step, layer: nn.Module, record: Record, h: Tensor) -> Tensor:
    """What attention adds to the kept rows, [M, d], of the norm's output h [M, d]; fills the record's graph, or its
    output and log-sum-exp."""
    saved = record.saved_list
    choice = None if step.tiles is None else step.tiles(record.layer, record.x_kept, saved)
    if step.recompute_of(record.layer) == "none":
        a, record.attention = trace(
            lambda leaf: step.family.attention_output(
                layer, step.attention.differentiable(layer, leaf, saved, choice).flatten(1)
            ),
            h,
        )
        return a
    out, lse = step.attention.forward(layer, h, saved, choice)
    record.tiles = choice
    if step.recompute_of(record.layer) == "attention":
        record.out, record.lse = out, lse
    return step.family.attention_output(layer, out.flatten(1))


def _mlp(step: Step, i: int, layer: nn.Module, h: Tensor) -> Tensor:
    """What the MLP adds, [M, d], of the norm's output h [M, d]. Without a graph."""
    y, statistics = split(step.family.mlp(layer, h))
    if statistics is not None:
        step.statistics.add(i, statistics)
    return y


# --- mode "backward" --------------------------------------------------------------------------------------------------


def _exact_layer(step: Step, i: int, layer: nn.Module, x: Tensor, kept: Kept | None) -> None:
    """The exact layer on all tokens; only kept rows of its input and attention output are saved."""
    n1, n2 = step.family.norms(layer)
    record = None
    if kept is not None:
        saved = step.saved_list(kept)
        record = Record(i, "layer", saved, ops.gather(x, saved.rows))
    everything = step.everything
    # Without a name for the norm's output, [T, d]: it is gone before attention runs.
    out, lse = step.attention.forward(layer, gather_norm(x, None, None, n1)[0], everything)
    if record is not None:
        rows = record.saved_list.rows
        record.out, record.lse = out.index_select(0, rows), lse.index_select(1, rows)
    a = step.family.attention_output(layer, out.flatten(1))
    del out, lse
    norms = []
    for c in step.chunks(x.shape[0]):
        h2, x_mlp = gather_norm(a[c], None, x[c], n2)
        m = _mlp(step, i, layer, h2)
        torch.add(x_mlp, m, out=x[c])
        if step.observe is not None:
            norms.append(_lengths(m + a[c]))
    if step.observe is not None:
        step.observe(i, torch.cat(norms), Kept.everything(step.blocks))
    if record is not None:
        step.records.put(record)


# --- random numbers ---------------------------------------------------------------------------------------------------


def _generators(step: Step, i: int, device: torch.device) -> Generators | None:
    """The states that recomputation has to start from."""
    return generators(device) if step.random is not False and step.recompute_of(i) != "none" else None


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
