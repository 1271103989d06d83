"""Causal attention over kept rows, forward and backward, by document (paper section 5.1; weights: the docs on modes).

M packed rows of D documents (``cu_seqlens`` int32 [D + 1]); packed row i lies at row rows[i] of every tensor (``rows``
int32 [M], or None: row i), ascending within a document. q [R, Hq, D], k and v [R, Hk, D] with Hk dividing Hq; rows and
heads may be strided. ``lse`` float32 [Hq, M] is by packed row. ``max_seqlen``: longest document in packed rows, or
more. Errors: ValueError naming the argument, what was expected and what was given; nothing is written then.

Keys with separate rows (chunks of queries over all keys so far, context parallelism): with ``cu_seqlens_k`` (int32
[D + 1]), k and v are [Rk, Hk, D], packed key row j lies at row rows_k[j] (``rows_k`` int32 [Mk], or None: row j), and
``max_seqlen_k`` is the longest document in packed key rows, or more; what is named above describes the queries. Each
document is aligned at its end: query i of nq sees key j of nk iff j <= i + nk - nq. A query that sees no key has out 0,
lse -inf and gradients 0. Not together with tile lists.

Options of a model's attention, with s_ij = scale q_i . k_j:
``softcap`` c > 0 makes it c tanh(s_ij / c). ``window`` w > 0: i sees j only if place(j) > place(i) - w; places are
``places`` (int32 [M], ascending within a document) or else storage rows, so that rows which ``rows`` leaves out count.
With cu_seqlens_k, ``places`` and ``places_k`` (int32 [Mk]) are needed. Not together with tile lists. ``sinks`` (float32
[Hq]): a logit per query head in the denominator of its softmax, without a value; ``lse`` covers it, and is the sink if
a query sees no key.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lemo._native import constant
from lemo.ops._autograd import library
from lemo.ops._operator import Size, need, operator


def _like(x: Tensor, rows: Tensor | None) -> Tensor:
    # Rows that `rows` does not name must read as zero; packed tensors have none.
    return x.new_empty(x.shape) if rows is None else x.new_zeros(x.shape)


def _need_longest(cu_seqlens_k: Tensor | None, max_seqlen_k: int | None) -> None:
    if cu_seqlens_k is not None and max_seqlen_k is None:
        raise ValueError("max_seqlen_k: expected the longest document in key rows with cu_seqlens_k, got None")


@operator("out lse")
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    max_seqlen: Size,
    scale: float,
    tile_offsets: Tensor | None = None,
    tiles: Tensor | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    rows_k: Tensor | None = None,
    max_seqlen_k: Size | None = None,
    window: Size = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    places: Tensor | None = None,
    places_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out_i = sum_j softmax_j(scale q_i . k_j) v_j over j <= i of i's document: (out [R, Hq, D], lse float32 [Hq, M]).

    Rows of out that ``rows`` does not name are zero. Differentiable, once, in q, k, v and sinks.

    Two-dimensional sparsity: tile i of document d is its packed rows [128 i, 128 i + 128) and has the slot
    cu_seqlens[d] // 128 + d + i, of S = M // 128 + D slots (some stay empty). With tile_offsets (int32 [S + 1]) and
    tiles (int32 [L]), the queries of slot s see their own tile, causally, and the whole earlier tiles
    tiles[tile_offsets[s] : tile_offsets[s + 1]] (ascending numbers within the document), and nothing else.
    """
    need("q", q, "R Hq D")
    if rows is not None:
        need("rows", rows, "M")
    _need_longest(cu_seqlens_k, max_seqlen_k)
    capacity = q.shape[0] if rows is None else rows.shape[0]
    return _like(q, rows), q.new_empty(q.shape[1], capacity, dtype=torch.float32)


def transpose_tile_lists(tile_offsets: Tensor, tiles: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """From the key tiles of every query tile to the query tiles of every key tile: (tile_offsets, tiles), same shapes.

    That is the form ``attention_backward`` reads. Applied twice it gives the lists back. Nothing is synchronized.
    """
    slots, device = tile_offsets.shape[0] - 1, tiles.device
    firsts = cu_seqlens[:-1] // constant("LEMO_TILE_ROWS") + torch.arange(
        cu_seqlens.shape[0] - 1, dtype=torch.int32, device=device
    )
    entries = torch.arange(tiles.shape[0], dtype=torch.int32, device=device)
    slot = torch.searchsorted(tile_offsets, entries, right=True, out_int32=True) - 1
    used = slot < slots  # entries beyond the last list are padding and stay behind the others
    first = firsts[torch.searchsorted(firsts, slot, right=True) - 1]
    other = torch.where(used, first + tiles, slots)
    order = torch.argsort(other, stable=True)
    counts = torch.zeros(slots + 1, dtype=torch.int64, device=device).scatter_add_(0, other.long(), used.long())
    offsets = torch.cat((counts.new_zeros(1), counts[:slots].cumsum(0))).to(torch.int32)
    return offsets, torch.where(used, slot - first, 0)[order].to(torch.int32)


@operator("dq dk dv dsinks", derivative="error")
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    rows: Tensor | None,
    key_weights: Tensor | None,
    row_slots: Tensor | None,
    max_seqlen: Size,
    scale: float,
    deterministic: bool = False,
    tile_offsets: Tensor | None = None,
    tiles: Tensor | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    rows_k: Tensor | None = None,
    row_slots_k: Tensor | None = None,
    max_seqlen_k: Size | None = None,
    window: Size = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    places: Tensor | None = None,
    places_k: Tensor | None = None,
    want_dsinks: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients (dq, dk, dv, dsinks) restricted to the given rows, from the output and LSE of the forward pass.

    If that pass saw more keys than these rows, probabilities P_ij = exp(scale q_i . k_j - lse_i) are still exact:
    dS_ij = P_ij (dout_i . v_j - dout_i . out_i); dq_i = scale sum_j w_ij dS_ij k_j; dk_j = scale sum_i w_ij dS_ij q_i;
    dv_j = sum_i w_ij P_ij dout_i. w_ij = key_weights[row_slots[j]] (float32 [K], int32 [M]), or 1 if i and j share a
    slot, or 1 without key_weights. deterministic: bitwise repeatable, as also with torch's deterministic algorithms.
    tile_offsets, tiles: the forward pass's lists, transposed (``transpose_tile_lists``).

    With cu_seqlens_k, dk and dv have the shape of k, and the slot of key j is row_slots_k[j] (int32 [Mk]).

    softcap: dS_ij has the further factor 1 - tanh(s_ij / c)^2 in dq and dk. dsinks, float32 [Hq] or None unless wanted:
    -sum_i exp(sinks - lse_i) dout_i . out_i. For nothing else does this pass need the sinks, since ``lse`` covers them.
    """
    _need_longest(cu_seqlens_k, max_seqlen_k)
    if want_dsinks and sinks is None:
        raise ValueError("sinks: expected float32 [Hq] with want_dsinks, got None")
    key_rows = rows if cu_seqlens_k is None else rows_k
    dsinks = q.new_empty(q.shape[1], dtype=torch.float32) if want_dsinks else None
    return _like(q, rows), _like(k, key_rows), _like(v, key_rows), dsinks


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float | None = None,
    rows: Tensor | None = None,
    key_weights: Tensor | None = None,
    row_slots: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    deterministic: bool = False,
    cu_seqlens_k: Tensor | None = None,
    rows_k: Tensor | None = None,
    row_slots_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    tile_lists: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    places: Tensor | None = None,
    places_k: Tensor | None = None,
    reuse_out: bool = False,
) -> Tensor:
    """Differentiable attention, [R, Hq, D]. scale defaults to 1 / sqrt(D).

    tile_lists: offsets and key tiles of every query tile (``attention_forward``), then offsets and query tiles of every
    key tile, as ``list_tiles`` makes them. sinks may have any floating-point dtype here.

    With ``out`` and ``lse`` of an earlier forward pass over more keys, that output is returned without computing it,
    and gradients are those of ``attention_backward`` with the given key weights (mode `backward`).

    The backward pass takes as many heads at a time as ``HEADS_BYTES`` of workspace allow. reuse_out: it may then put
    dq in the memory of the output, which must be free by that time: nothing but the functions whose gradients arrived
    has read it.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if (out is None) != (lse is None):
        raise ValueError("lse: expected out and lse together, got one of them")
    _need_longest(cu_seqlens_k, max_seqlen_k)
    sinks = None if sinks is None else sinks.float()
    if out is None:
        given = (q.detach(), k.detach(), v.detach(), cu_seqlens, rows, max_seqlen, scale)
        forward: Any = (None, None) if tile_lists is None else tile_lists[:2]
        out, lse = attention_forward(
            *given,
            *forward,
            cu_seqlens_k=cu_seqlens_k,
            rows_k=rows_k,
            max_seqlen_k=max_seqlen_k,
            window=window,
            softcap=softcap,
            sinks=None if sinks is None else sinks.detach(),
            places=places,
            places_k=places_k,
        )
    transposed: Any = (None, None) if tile_lists is None else tile_lists[2:]
    lists = (cu_seqlens, rows, key_weights, row_slots, max_seqlen, scale, deterministic, *transposed)
    keys = (cu_seqlens_k, rows_k, row_slots_k, max_seqlen_k)
    return _Attention.apply(q, k, v, sinks, reuse_out, out, lse, *lists, *keys, window, softcap, places, places_k)


# dq, dk, dv, dsinks.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


class _Attention(torch.autograd.Function):
    """Ties a computed output to the backward pass over the given rows."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, reuse_out, out, *others):
        ctx.reuse_out = reuse_out
        ctx.numbers = [None if isinstance(x, Tensor) else x for x in others]
        ctx.save_for_backward(q, k, v, sinks, out, *(x if isinstance(x, Tensor) else None for x in others))
        return out.detach()  # a view could not be changed in place afterwards

    @staticmethod
    def backward(ctx, dout):
        q, k, v, sinks, out, *tensors = ctx.saved_tensors
        pairs = zip(tensors, ctx.numbers, strict=True)
        *lists, cu_seqlens_k, rows_k, row_slots_k, max_seqlen_k, window, softcap, places, places_k = (
            number if tensor is None else tensor for tensor, number in pairs
        )
        lse, *lists = lists

        def run(heads: slice | None, key_heads: slice | None) -> Gradients:
            return attention_backward(
                _cut(dout, heads),
                _cut(q, heads),
                _cut(k, key_heads),
                _cut(v, key_heads),
                _cut(out, heads),
                lse if heads is None else lse[heads],
                *lists,
                cu_seqlens_k=cu_seqlens_k,
                rows_k=rows_k,
                row_slots_k=row_slots_k,
                max_seqlen_k=max_seqlen_k,
                window=window,
                softcap=softcap,
                sinks=sinks if sinks is None or heads is None else sinks[heads],
                places=places,
                places_k=places_k,
                want_dsinks=ctx.needs_input_grad[3],
            )

        dout = dout.contiguous()
        found = _by_heads(run, q, k, v, out if ctx.reuse_out else None, sinks if ctx.needs_input_grad[3] else None)
        return *found, *(None for _ in ctx.needs_input_grad[4:])


# What the backward pass may take to add up dq in float32: with longer inputs, it takes fewer heads at a time.
HEADS_BYTES = 1 << 30


def heads_at_a_time(rows: int, heads: int, key_heads: int, head_dim: int) -> int:
    """Key heads whose queries' gradients of so many rows fit into ``HEADS_BYTES``, or 1."""
    return min(key_heads, max(1, HEADS_BYTES // (4 * rows * head_dim * (heads // key_heads) or 1)))


def _cut(x: Tensor, heads: slice | None) -> Tensor:
    return x if heads is None else x[:, heads]


def _by_heads(
    run: Callable[[slice | None, slice | None], Gradients],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    space: Tensor | None,
    sinks: Tensor | None,
) -> Gradients:
    """(dq, dk, dv, dsinks) of run(heads, key_heads), which are independent; None: all of them. space: memory for dq, of
    its shape."""
    key_heads = k.shape[1]
    group, size = q.shape[1] // key_heads, heads_at_a_time(q.shape[0], q.shape[1], key_heads, q.shape[2])
    if size == key_heads:
        return run(None, None)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format) if space is None else space
    dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (k, v))
    dsinks = None if sinks is None else torch.empty_like(sinks, dtype=torch.float32)
    for first in range(0, key_heads, size):
        of_keys = slice(first, first + size)
        heads = slice(group * first, group * (first + size))
        found = run(heads, of_keys)
        dq[:, heads], dk[:, of_keys], dv[:, of_keys] = found[:3]
        if dsinks is not None and found[3] is not None:
            dsinks[heads] = found[3]
        del found  # before the next heads' are made
    return dq, dk, dv, dsinks


_SINKS = 14  # their place among the inputs of attention_forward


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_seqlens, rows, ctx.max_seqlen, ctx.scale, *others = inputs
    *lists, ctx.max_seqlen_k, ctx.window, ctx.softcap, sinks, places, places_k = others
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, rows, *lists, sinks, places, places_k)
    ctx.set_materialize_grads(False)


def _grad(ctx, dout, dlse):
    q, k, v, out, lse, cu_seqlens, rows, tile_offsets, tiles, cu_seqlens_k, rows_k, *options = ctx.saved_tensors
    sinks, places, places_k = options
    lists = (None, None) if tile_offsets is None else transpose_tile_lists(tile_offsets, tiles, cu_seqlens)
    where: Any = (cu_seqlens, rows, None, None, ctx.max_seqlen, ctx.scale, False, *lists)
    others: Any = {"cu_seqlens_k": cu_seqlens_k, "rows_k": rows_k, "max_seqlen_k": ctx.max_seqlen_k}
    others |= {"window": ctx.window, "softcap": ctx.softcap, "places": places, "places_k": places_k}
    # The dispatcher leaves out defaults at the end: only as many gradients are wanted.
    needed = ctx.needs_input_grad
    others |= {"sinks": sinks, "want_dsinks": any(needed[_SINKS:])}
    found: list[Any] = []
    if dout is not None:
        found.append(attention_backward(dout.contiguous(), q, k, v, out, lse, *where, **others))
    if dlse is not None:
        # dlse_i / ds_ij = P_ij. With v = 0, dout_i = (dlse_i, 0, ...) and out_i = (-1, 0, ...), dS_ij = P_ij dlse_i.
        first = q.new_zeros(q.shape[-1])
        first[0] = 1
        outer = _by_row(dlse, q, cu_seqlens, rows) * first
        minus = -first.expand(q.shape).contiguous()
        dq, dk, _, dsinks = attention_backward(outer, q, k, torch.zeros_like(v), minus, lse, *where, **others)
        found.append((dq, dk, None, dsinks))
    sums = [functools.reduce(_add, (grads[i] for grads in found), None) for i in range(4)]
    return *sums[:3], *((sums[3] if i == _SINKS else None) for i in range(3, len(needed)))


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _by_row(dlse: Tensor, q: Tensor, cu_seqlens: Tensor, rows: Tensor | None) -> Tensor:
    """dlse [Hq, M] of packed rows at the rows of q: [R, Hq, 1], zero at rows of no document."""
    packed = torch.arange(dlse.shape[1], device=dlse.device)
    weights = torch.where(packed < cu_seqlens[-1], dlse, 0).t().to(q.dtype)
    if rows is not None:
        weights = weights.new_zeros(q.shape[:2]).index_add(0, rows.clamp(min=0).long(), weights)
    return weights[..., None]


torch.library.register_autograd("lemo::attention_forward", _grad, setup_context=_context, lib=library)
