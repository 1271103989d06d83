"""From a padded or packed batch to the tokens that take part, and back.

A document is a row of the batch without its padding, or a segment of it that starts where position ids reset, or what
`cu_seq_lens_q` (transformers' name) or `seq_lens` give for the flattened batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo.engine.families.base import Family
from lemo.engine.layout import Blocks


@dataclass(frozen=True, eq=False)
class Packed:
    """T tokens of a batch [B, S].

    places: int64 [T], place of every token in the flattened batch, or None if that is the identity;
    positions: int64 [T]; blocks: the tokens' documents and blocks; shape: (B, S).
    """

    places: Tensor | None
    positions: Tensor
    blocks: Blocks
    shape: tuple[int, int]

    @property
    def gaps(self) -> Tensor | None:
        """int32 [T], `places`, if the mask leaves out tokens between those of a document; else None. Waits for the
        device if there is padding."""
        if self.places is None:
            return None
        apart = self.places.diff() != 1
        apart[self.blocks.cu_seqlens[1:-1].long() - 1] = False
        return self.places.int() if bool(apart.any()) else None

    def take(self, x: Tensor) -> Tensor:
        """Rows [T, ...] of x [B, S, ...]."""
        flat = x.reshape(-1, *x.shape[2:])
        return flat if self.places is None else flat.index_select(0, self.places)

    def put(self, rows: Tensor) -> Tensor:
        """The batch [B, S, d] of rows [T, d]; zeros at padding."""
        if self.places is None:
            return rows.view(*self.shape, rows.shape[-1])
        full = rows.new_zeros(self.shape[0] * self.shape[1], rows.shape[-1])
        return full.index_copy(0, self.places, rows).view(*self.shape, rows.shape[-1])


def _explicit_lengths(kwargs: dict[str, Any]) -> list[int] | None:
    lengths = kwargs.get("seq_lens")
    if lengths is not None:
        return [int(n) for n in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]
    offsets = kwargs.get("cu_seq_lens_q")
    if offsets is None:
        return None
    values = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
    return [int(b) - int(a) for a, b in itertools.pairwise(values)]


def _check_lengths(lengths: Sequence[int], tokens: int) -> None:
    if not lengths or min(lengths) < 1:
        raise ValueError(f"seq_lens / cu_seq_lens_q: every document needs at least one token; got lengths {lengths}")
    if sum(lengths) != tokens:
        raise ValueError(
            f"seq_lens / cu_seq_lens_q: lengths must sum to the {tokens} tokens of the batch; got {sum(lengths)}"
        )


def pack(
    family: Family,
    shape: tuple[int, int],
    device: torch.device,
    block_size: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
) -> Packed:
    """Finds the documents of a batch.

    attention_mask: 0/1 [B, S]; position_ids: integers [B, S] or [1, S]; kwargs: may give the lengths of documents. With
    a mask or position ids, lengths are read from the device once. Raises ValueError for a mask of another shape and for
    rows without a token.
    """
    batch, length = shape
    if batch < 1 or length < 1:
        raise ValueError(f"input_ids must hold at least one token; got shape {list(shape)}")
    if attention_mask is not None and (attention_mask.dim() != 2 or tuple(attention_mask.shape) != shape):
        raise ValueError(
            f"attention_mask must have shape {list(shape)} (1 = token, 0 = padding) in training with lemo; got "
            f"{list(attention_mask.shape)}. Separate documents by position_ids that start again, or by cu_seq_lens_q"
        )
    if position_ids is not None:
        position_ids = _full_positions(position_ids, shape)
    lengths = _explicit_lengths(kwargs)
    if lengths is None and (attention_mask is not None or position_ids is not None):
        return _pack_masked(family, shape, device, block_size, attention_mask, position_ids)
    if lengths is None:
        lengths = [length] * batch
        positions = family.default_positions(torch.ones(shape, dtype=torch.int64, device=device)).reshape(-1)
    else:
        _check_lengths(lengths, batch * length)
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask must not mark padding if cu_seq_lens_q or seq_lens give the documents")
        if position_ids is None:
            positions = torch.cat([torch.arange(n) for n in lengths]).to(device)
        else:
            positions = position_ids.reshape(-1)
    return Packed(None, positions, Blocks.from_lengths(lengths, block_size, device), shape)


def _full_positions(position_ids: Tensor, shape: tuple[int, int]) -> Tensor:
    """[B, S] of position ids [B, S], [1, S] or [S]."""
    batch, length = shape
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    if position_ids.dim() != 2 or position_ids.shape[1] != length or position_ids.shape[0] not in (1, batch):
        raise ValueError(f"position_ids must have shape {list(shape)}; got {list(position_ids.shape)}")
    return position_ids.expand(batch, length)


def _pack_masked(
    family: Family,
    shape: tuple[int, int],
    device: torch.device,
    block_size: int,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Packed:
    """Documents by a mask [B, S], by position ids [B, S], or by both."""
    batch, length = shape
    mask = torch.ones(shape, dtype=torch.bool, device=device) if attention_mask is None else attention_mask.bool()
    documents = torch.arange(batch, device=device)[:, None].expand(shape)[mask]
    if position_ids is None:
        positions = family.default_positions(mask.long())[mask]
        starts = torch.zeros_like(positions, dtype=torch.bool)
    else:
        positions = position_ids[mask].long()
        starts = torch.zeros_like(positions, dtype=torch.bool)
        starts[1:] = positions[1:] <= positions[:-1]
    starts[1:] |= documents[1:] != documents[:-1]
    starts[:1] = True
    tokens = positions.shape[0]
    if tokens < batch * length:
        empty = (~mask.any(1)).nonzero()[:, 0].tolist()
        if empty:
            raise ValueError(f"attention_mask: row {empty[0]} has no token (an empty document); leave the row out")
    firsts = starts.nonzero()[:, 0].tolist()
    lengths = [b - a for a, b in zip(firsts, [*firsts[1:], tokens], strict=True)]
    places = None if tokens == batch * length else mask.reshape(-1).nonzero()[:, 0]
    return Packed(places, positions, Blocks.from_lengths(lengths, block_size, device), shape)
