"""Where tokens lie: the blocks of a packed batch, and the blocks a sub-layer keeps.

All sequences of a batch are packed into T tokens; a block is up to ``block_size`` consecutive tokens of ONE document.
``Blocks`` describes that cut, ``Kept`` the part of it that takes part in a sub-layer. Both hold small int32 tensors on
the device of the batch and plain Python sizes, so that allocating by size never waits for the device.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Required, TypedDict, Unpack

import torch
from torch import Tensor

from lemo import ops

# How `select` turns scores into a kept list.
SelectMode = Literal["threshold", "budget", "sample", "poisson"]


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a packed batch of D documents with T tokens in nb blocks.

    offsets: int32 [nb + 1], first token of every block; documents: int32 [D + 1], first block of every document;
    block_size: the most tokens a block has; lengths: tokens of every document.
    """

    offsets: Tensor
    documents: Tensor
    block_size: int
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], block_size: int, device: torch.device | str = "cpu") -> Blocks:
        """Cuts documents of the given lengths into blocks. Raises ValueError for an empty list, document or block."""
        lengths = tuple(int(n) for n in lengths)
        if block_size < 1:
            raise ValueError(f"block_size: expected at least 1, got {block_size}")
        if not lengths:
            raise ValueError("lengths: expected at least one document, got none")
        if min(lengths) < 1:
            shortest = min(lengths)
            raise ValueError(
                f"lengths: expected at least 1 token in every document, got {shortest} (empty document) "
                f"at index {lengths.index(shortest)}"
            )
        if sum(lengths) >= 2**31:
            raise ValueError(f"lengths: expected fewer than 2**31 tokens in all, got {sum(lengths)}")
        starts: list[int] = []
        documents = [0]
        first = 0
        for n in lengths:
            starts.extend(range(first, first + n, block_size))
            first += n
            documents.append(len(starts))
        starts.append(first)
        # One transfer: both lists live in one buffer.
        both = torch.tensor(starts + documents, dtype=torch.int32).to(device)
        return cls(both[: len(starts)], both[len(starts) :], block_size, lengths)

    @functools.cached_property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @property
    def num_blocks(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def max_seqlen(self) -> int:
        return max(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.offsets.device

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [D + 1]: first token of every document, T at the end."""
        return self.offsets[self.documents.long()]

    @functools.cached_property
    def blocks_per_document(self) -> tuple[int, ...]:
        return tuple(-(-n // self.block_size) for n in self.lengths)

    @functools.cached_property
    def positions(self) -> Tensor:
        """int64 [T]: position of every token within its document."""
        token = torch.arange(self.num_tokens, device=self.device)
        starts = self.cu_seqlens.long()
        return token - starts[torch.bucketize(token, starts[1:], right=True)]


@dataclass(frozen=True, eq=False)
class Kept:
    """K kept blocks with M kept tokens of ``source``, in order.

    blocks: int32 [K], kept block ids ascending; slots: int32 [nb], position of a block in ``blocks`` or -1;
    row_offsets: int32 [K + 1], first packed row of every kept block; cu_seqlens: int32 [D + 1], packed rows of every
    document; rows: int32 [M], token behind every packed row; row_slots: int32 [M], position in ``blocks`` of every
    packed row's block; weights: float32 [K], 1/p of a block drawn by Poisson sampling, else 1. max_seqlen: the longest
    document in packed rows, or an upper bound of it. info: what `lemo.ops.SelectInfo.read` reads, if the selection has
    not been checked for faults yet. chosen_by: who made the list, for error messages. whole: the list that this one is
    a part of, if several processes share a sequence; counts: rows of it in each of them.
    """

    blocks: Tensor
    slots: Tensor
    row_offsets: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    row_slots: Tensor
    weights: Tensor
    num_blocks: int
    num_rows: int
    max_seqlen: int
    source: Blocks
    info: Tensor | None = field(default=None, repr=False)
    chosen_by: str = ""
    whole: Kept | None = field(default=None, repr=False)
    counts: tuple[int, ...] = ()

    @classmethod
    def everything(cls, blocks: Blocks) -> Kept:
        """Keeps every block: rows are the identity and weights are 1."""
        device, nb, tokens = blocks.device, blocks.num_blocks, blocks.num_tokens
        ids = torch.arange(nb, dtype=torch.int32, device=device)
        sizes = blocks.offsets[1:] - blocks.offsets[:-1]
        return cls(
            blocks=ids,
            slots=ids,
            row_offsets=blocks.offsets,
            cu_seqlens=blocks.cu_seqlens,
            rows=torch.arange(tokens, dtype=torch.int32, device=device),
            row_slots=torch.repeat_interleave(ids, sizes, output_size=tokens),
            weights=torch.ones(nb, dtype=torch.float32, device=device),
            num_blocks=nb,
            num_rows=tokens,
            max_seqlen=blocks.max_seqlen,
            source=blocks,
        )

    @property
    def is_everything(self) -> bool:
        return self.num_rows == self.source.num_tokens

    def raise_on_fault(self) -> None:
        """Reads the device's fault flag (one host synchronisation) and raises FloatingPointError if it is set.

        Only needed after a selection that was made without a synchronisation; see ``select``.
        """
        if self.info is not None:
            _raise_fault(ops.SelectInfo.read(self.info).fault, self.chosen_by)


# Kept lists of a layer's attention and MLP; None: nothing kept. One object if they share a list.
KeptPair = tuple[Kept | None, Kept | None]


def kept_per_document(blocks: Blocks, keep: float, always_first: int = 1, always_last: int = 0) -> tuple[int, ...]:
    """Blocks a budget keeps of every document."""
    return kept_counts(blocks.blocks_per_document, keep, always_first, always_last)


def kept_counts(blocks: Sequence[int], keep: float, always_first: int = 1, always_last: int = 0) -> tuple[int, ...]:
    """Of n blocks min(n, max(floor(keep n + 1/2), forced, 1)), as the kernels count, for documents of n blocks each."""
    share = ctypes.c_float(keep).value  # the kernels hold `keep` in single precision
    return tuple(min(n, max(math.floor(share * n + 0.5), min(n, always_first + always_last), 1)) for n in blocks)


@dataclass(frozen=True, eq=False)
class Selection:
    """A selection that has been started, and that the device may not have made yet.

    made: what the operator gave, or its error. sizes: blocks, rows and the longest document in rows if they are known
    beforehand; None: `info` has them, on the host once `arrived`.
    """

    source: Blocks
    chosen_by: str
    made: Sequence[Tensor] | FloatingPointError
    sizes: tuple[int, int, int] | None = None
    info: Tensor | None = None
    arrived: torch.cuda.Event | None = None

    def finish(self) -> Kept:
        """The list. Waits for the device if only that knows the sizes; raises what `select` raises."""
        if isinstance(self.made, FloatingPointError):
            raise FloatingPointError(f"{self.chosen_by}: {self.made}" if self.chosen_by else str(self.made)) from None
        kept, slots, row_offsets, cu_seqlens, rows, row_slots, weights, info = self.made
        if self.sizes is not None:
            num_blocks, num_rows, max_seqlen = self.sizes
        else:
            assert self.info is not None
            if self.arrived is not None:
                self.arrived.synchronize()
            num_blocks, num_rows, max_seqlen, fault = ops.SelectInfo.read(self.info)
            _raise_fault(fault, self.chosen_by)
        return Kept(
            blocks=kept[:num_blocks],
            slots=slots,
            row_offsets=row_offsets[: num_blocks + 1],
            cu_seqlens=cu_seqlens,
            rows=rows[:num_rows],
            row_slots=row_slots[:num_rows],
            weights=weights[:num_blocks],
            num_blocks=num_blocks,
            num_rows=num_rows,
            max_seqlen=max_seqlen,
            source=self.source,
            info=info if self.sizes is not None else None,
            chosen_by=self.chosen_by,
        )


def sizes_known(mode: SelectMode, blocks: Blocks) -> bool:
    """Whether the size of a list follows from the lengths of documents."""
    return mode in ("budget", "sample") and all(n % blocks.block_size == 0 for n in blocks.lengths)


def start(
    scores: Tensor,
    blocks: Blocks,
    *,
    mode: SelectMode,
    keep: float = 1.0,
    threshold: float = 0.0,
    always_first: int = 1,
    always_last: int = 0,
    seed: int = 0,
    chosen_by: str = "",
) -> Selection:
    """As `select`, without waiting for the device, and without errors: `Selection.finish` does and has these. (Nine
    arguments: they are those of the operator.)"""
    b = blocks.block_size
    how = (mode, keep, threshold, always_first, always_last, seed)
    try:
        made = ops.select_blocks(scores, blocks.offsets, blocks.documents, b, blocks.num_tokens, *how)
    except FloatingPointError as error:
        return Selection(blocks, chosen_by, error)
    if sizes_known(mode, blocks) and _waiting_costs(scores):
        counts = kept_per_document(blocks, keep, always_first, always_last)
        return Selection(blocks, chosen_by, made, (sum(counts), sum(counts) * b, max(counts) * b))
    info = made[-1]
    if not info.is_cuda:
        return Selection(blocks, chosen_by, made, None, info)
    on_host = torch.empty(info.shape, dtype=info.dtype, device="cpu", pin_memory=True).copy_(info, non_blocking=True)
    return Selection(blocks, chosen_by, made, None, on_host, torch.cuda.current_stream(info.device).record_event())


class How(TypedDict, total=False):
    """The arguments of `start` and `select` after scores and blocks, with the defaults of `start`."""

    mode: Required[SelectMode]
    keep: float
    threshold: float
    always_first: int
    always_last: int
    seed: int
    chosen_by: str


def select(scores: Tensor, blocks: Blocks, **how: Unpack[How]) -> Kept:
    """Chooses blocks by score (paper section 4.2) and returns tensors of exact size.

    scores: float32 [nb]; for modes "sample" and "poisson" probabilities in (0, 1].
    mode: "threshold" keeps scores >= threshold; "budget" the highest share ``keep`` of each document's blocks;
    "sample" draws that many by Pareto sampling with ``seed``, which follows unequal probabilities only approximately;
    "poisson" draws every block independently with exactly its probability, so that the number kept varies (``keep`` is
    not used) and may be 0, and sets weights to 1/p.
    always_first, always_last: blocks of each document that are kept whatever their score, with weight 1.
    chosen_by: prefix of error messages, for instance the layer and policy.

    Raises FloatingPointError, naming the block, for a score that is not finite (or not a valid probability), and if a
    threshold keeps nothing. Costs one host synchronisation on a GPU, unless sizes are known beforehand (a budget or
    sample over documents whose lengths are multiples of the block size): faults are then reported by
    ``Kept.raise_on_fault``.
    """
    return start(scores, blocks, **how).finish()


def raise_on_faults(lists: Sequence[Kept]) -> None:
    """`Kept.raise_on_fault` of several lists, with one synchronisation for all."""
    pending = [(kept, kept.info) for kept in lists if kept.info is not None]
    if pending:
        read = torch.stack([info for _, info in pending]).cpu()
        for (kept, _), info in zip(pending, read, strict=True):
            _raise_fault(ops.SelectInfo.read(info).fault, kept.chosen_by)


def _waiting_costs(scores: Tensor) -> bool:
    """Whether what a selection reports is read later, if sizes are known without it."""
    return scores.is_cuda


def _raise_fault(fault: int, chosen_by: str) -> None:
    prefix = f"{chosen_by}: " if chosen_by else ""
    if fault > 0:
        raise FloatingPointError(
            f"{prefix}scores: block {fault - 1} is not finite (or, as a probability, not in (0, 1]): expected finite "
            "scores; nothing was selected"
        )
    if fault < 0:
        raise FloatingPointError(
            f"{prefix}scores: no block reaches the threshold: expected at least one kept block; lower the "
            "threshold or force blocks with always_first"
        )
