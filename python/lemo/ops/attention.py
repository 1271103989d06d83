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
"""

from __future__ import annotations

import math
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
) -> tuple[Tensor, Tensor]:
    """out_i = sum_j softmax_j(scale q_i . k_j) v_j over j <= i of i's document: (out [R, Hq, D], lse float32 [Hq, M]).

    Rows of out that ``rows`` does not name are zero. Differentiable, once, in q, k and v.

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


@operator("dq dk dv", derivative="error")
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) restricted to the given rows, from the output and LSE of the forward pass that made them.

    If that pass saw more keys than these rows, probabilities P_ij = exp(scale q_i . k_j - lse_i) are still exact:
    dS_ij = P_ij (dout_i . v_j - dout_i . out_i); dq_i = scale sum_j w_ij dS_ij k_j; dk_j = scale sum_i w_ij dS_ij q_i;
    dv_j = sum_i w_ij P_ij dout_i. w_ij = key_weights[row_slots[j]] (float32 [K], int32 [M]), or 1 if i and j share a
    slot, or 1 without key_weights. deterministic: bitwise repeatable, as also with torch's deterministic algorithms.
    tile_offsets, tiles: the forward pass's lists, transposed (``transpose_tile_lists``).

    With cu_seqlens_k, dk and dv have the shape of k, and the slot of key j is row_slots_k[j] (int32 [Mk]).
    """
    _need_longest(cu_seqlens_k, max_seqlen_k)
    key_rows = rows if cu_seqlens_k is None else rows_k
    return _like(q, rows), _like(k, key_rows), _like(v, key_rows)


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
) -> Tensor:
    """Differentiable attention, [R, Hq, D]. scale defaults to 1 / sqrt(D).

    tile_lists: offsets and key tiles of every query tile (``attention_forward``), then offsets and query tiles of every
    key tile, as ``list_tiles`` makes them.

    With ``out`` and ``lse`` of an earlier forward pass over more keys, that output is returned without computing it,
    and gradients are those of ``attention_backward`` with the given key weights (mode `backward`).
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    if (out is None) != (lse is None):
        raise ValueError("lse: expected out and lse together, got one of them")
    _need_longest(cu_seqlens_k, max_seqlen_k)
    if out is None:
        keys: Any = {"cu_seqlens_k": cu_seqlens_k, "rows_k": rows_k, "max_seqlen_k": max_seqlen_k}
        forward: Any = (None, None) if tile_lists is None else tile_lists[:2]
        out, lse = attention_forward(
            q.detach(), k.detach(), v.detach(), cu_seqlens, rows, max_seqlen, scale, *forward, **keys
        )
    transposed: Any = (None, None) if tile_lists is None else tile_lists[2:]
    lists = (cu_seqlens, rows, key_weights, row_slots, *transposed, cu_seqlens_k, rows_k, row_slots_k)
    return _Attention.apply(q, k, v, out, lse, *lists, max_seqlen, scale, deterministic, max_seqlen_k)


class _Attention(torch.autograd.Function):
    """Ties a computed output to the backward pass over the given rows."""

    @staticmethod
    def forward(ctx, q, k, v, out, *others):
        *tensors, ctx.max_seqlen, ctx.scale, ctx.deterministic, ctx.max_seqlen_k = others
        ctx.save_for_backward(q, k, v, out, *tensors)
        return out.detach()  # a view could not be changed in place afterwards

    @staticmethod
    def backward(ctx, dout):
        *tensors, tile_offsets, tiles, cu_seqlens_k, rows_k, row_slots_k = ctx.saved_tensors
        inputs: Any = (*tensors, ctx.max_seqlen, ctx.scale, ctx.deterministic, tile_offsets, tiles)
        keys: Any = {"cu_seqlens_k": cu_seqlens_k, "rows_k": rows_k, "max_seqlen_k": ctx.max_seqlen_k}
        grads = attention_backward(dout.contiguous(), *inputs, row_slots_k=row_slots_k, **keys)
        return *grads, *(None for _ in ctx.needs_input_grad[3:])


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cu_seqlens, rows, ctx.max_seqlen, ctx.scale, *lists, ctx.max_seqlen_k = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, rows, *lists)
    ctx.set_materialize_grads(False)


def _grad(ctx, dout, dlse):
    q, k, v, out, lse, cu_seqlens, rows, tile_offsets, tiles, cu_seqlens_k, rows_k = ctx.saved_tensors
    lists = (None, None) if tile_offsets is None else transpose_tile_lists(tile_offsets, tiles, cu_seqlens)
    keys: Any = {"cu_seqlens_k": cu_seqlens_k, "rows_k": rows_k, "max_seqlen_k": ctx.max_seqlen_k}

    def backward(dout):
        arguments: Any = (q, k, v, out, lse, cu_seqlens, rows, None, None, ctx.max_seqlen, ctx.scale, False, *lists)
        return attention_backward(dout.contiguous(), *arguments, **keys)

    grads = [None] * 3 if dout is None else list(backward(dout))
    if dlse is not None:
        # dlse_i / ds_ij = P_ij: dq is the output with keys as values, dk the gradient of v for dout_i = dlse_i q_i.
        weights = _by_row(dlse, q, cu_seqlens, rows)
        layout = (cu_seqlens, rows, ctx.max_seqlen, ctx.scale, tile_offsets, tiles)
        means = attention_forward(q, k, k, *layout, **keys)[0]
        dq = torch.where(weights == 0, 0, ctx.scale * weights * means)
        dk = ctx.scale * backward(weights * q)[2]
        grads[:2] = [g if other is None else g + other for g, other in zip((dq, dk), grads, strict=False)]
    return *grads, *(None for _ in ctx.needs_input_grad[3:])


def _by_row(dlse: Tensor, q: Tensor, cu_seqlens: Tensor, rows: Tensor | None) -> Tensor:
    """dlse [Hq, M] of packed rows at the rows of q: [R, Hq, 1], zero at rows of no document."""
    packed = torch.arange(dlse.shape[1], device=dlse.device)
    weights = torch.where(packed < cu_seqlens[-1], dlse, 0).t().to(q.dtype)
    if rows is not None:
        weights = weights.new_zeros(q.shape[:2]).index_add(0, rows.clamp(min=0).long(), weights)
    return weights[..., None]


torch.library.register_autograd("lemo::attention_forward", _grad, setup_context=_context, lib=library)
