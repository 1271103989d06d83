"""One sequence in several processes, as Ulysses divides it: rows for all that is done row by row, heads for attention.

Every process is given the whole batch, and holds the residual stream of one run of its tokens, cut between blocks.
Kept lists are chosen from the scores of all blocks and are the same in all processes. Before attention, rows are
exchanged for heads: each process attends with its share of the heads over all kept rows; afterwards heads are exchanged
for rows. The loss and the gradients of parameters are summed over the processes, so that each has what one process
would have computed from the whole batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lemo.engine.attend import Attention, PackedRows, TileChoice, WholeRows, tiles_of
from lemo.engine.families.base import AttentionOptions, ModelShape
from lemo.engine.layout import Blocks, Kept
from lemo.ops._autograd import first_order

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Group:
    """The processes that share a sequence: a process group of torch.distributed, seen from one of its members."""

    processes: Any
    rank: int
    size: int

    @classmethod
    def of(cls, processes: Any) -> Group:
        """Raises ValueError if this process is not one of them."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            raise ValueError(
                "sequence_group: torch.distributed is not initialized; start the processes with torchrun and call "
                "torch.distributed.init_process_group first"
            )
        rank = distributed.get_rank(processes)
        if rank < 0:
            raise ValueError("sequence_group: this process is not in the group that was given")
        return cls(processes, rank, distributed.get_world_size(processes))

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self  # processes cannot be copied

    @property
    def number(self) -> int:
        """Differs between the groups of a program."""
        return int(torch.distributed.get_process_group_ranks(self.processes)[0])

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over the processes, in place of x, which is contiguous."""
        torch.distributed.all_reduce(x, group=self.processes)
        return x

    def check_heads(self, shape: ModelShape) -> None:
        """Raises ValueError unless the heads can be divided among the processes."""
        queries, keys, n = shape.heads, shape.kv_heads, self.size
        if queries % n or (keys % n and n % keys):
            raise ValueError(
                f"sequence_group: the model has {queries} heads and {keys} key/value heads, which {n} processes cannot "
                "divide: expected a number of processes that divides the heads, and divides or is a multiple of the "
                "key/value heads"
            )

    def check_same(self, *given: Tensor | None) -> None:
        """Raises ValueError, in every process, unless all of them were given these very tensors. Waits for the
        device."""
        device = next(x.device for x in given if x is not None)
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        marks = torch.stack([nothing if x is None else _mark(x) for x in given])
        both = torch.cat((marks, -marks))
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX, group=self.processes)
        highest, lowest = both.chunk(2)
        if not torch.equal(highest, -lowest):
            raise ValueError(
                "sequence_group: the processes were given different batches. Those that share a sequence have to be "
                "given the whole of it, in every process the same (a data loader that is not divided among them, or "
                "one divided by group)"
            )


def _mark(x: Tensor) -> Tensor:
    """int64 [] that differs between tensors, as good as certainly."""
    # 32 bits of every value, embeddings included, times odd numbers that depend on the place.
    values = x.detach().reshape(-1)
    values = values.float().view(torch.int32) if values.is_floating_point() else values
    place = torch.arange(values.shape[0], device=x.device)
    mixed = (values.long() + 0x9E3779B9) * (2 * place + 1) * 0x5851F42D4C957F2D
    mixed = mixed ^ (mixed >> 29)
    return (mixed.sum() + x.dim() * 31 + sum(x.shape)) >> 2  # two bits less, so that it can be negated


# --- rows and heads ---------------------------------------------------------------------------------------------------


def _to_heads(x: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """From rows of this process [m, N h, D] to all rows [M, h, D] with this process's heads."""
    m, heads, width = x.shape
    n = group.size
    sent = x.reshape(m, n, heads // n, width).transpose(0, 1).reshape(n * m, heads // n, width)
    got = x.new_empty(sum(counts), heads // n, width)
    torch.distributed.all_to_all_single(got, sent, list(counts), [m] * n, group=group.processes)
    return got


def _to_rows(x: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """The inverse of `_to_heads`."""
    n, m = group.size, counts[group.rank]
    _, heads, width = x.shape
    got = x.new_empty(n * m, heads, width)
    torch.distributed.all_to_all_single(got, x.contiguous(), [m] * n, list(counts), group=group.processes)
    return got.view(n, m, heads, width).transpose(0, 1).reshape(m, n * heads, width)


class _Exchange(Function):
    """Rows for heads, or heads for rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: Sequence[int], group: Group, to_heads: bool) -> Tensor:
        ctx.settings = counts, group, to_heads
        return (_to_heads if to_heads else _to_rows)(x, counts, group)

    @staticmethod
    @first_order("an exchange between processes")
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        counts, group, to_heads = ctx.settings
        return (_to_rows if to_heads else _to_heads)(dy, counts, group), None, None, None


class _Sum(Function):
    """The sum of a tensor over the processes. Each computes the same from it, so a gradient is that of the own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.sum_(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    @first_order("a sum over processes")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


class _Everywhere(Function):
    """A tensor that all processes have, each of which uses it for its own rows: their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @first_order("a parameter in several processes")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum_(dy.clone(memory_format=torch.contiguous_format)), None


class _OwnRows(Function):
    """The rows of this process of a tensor that all have; its gradient is put together from all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: slice, group: Group) -> Tensor:
        ctx.settings, ctx.shape = (tokens, group), x.shape
        return x[tokens].clone()

    @staticmethod
    @first_order("the rows of a process")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        tokens, group = ctx.settings
        dx = dy.new_zeros(ctx.shape)
        dx[tokens] = dy
        return group.sum_(dx), None, None


# --- one batch --------------------------------------------------------------------------------------------------------


class Share:
    """What one process holds of a batch.

    blocks: of the whole batch; own: those of this process, whose documents may be parts of the batch's. tokens: where
    they lie in the batch.
    """

    def __init__(self, group: Group, blocks: Blocks) -> None:
        n = group.size
        if blocks.num_blocks < n:
            raise ValueError(
                f"sequence_group: a batch of {blocks.num_blocks} blocks cannot be divided among {n} processes; give "
                "longer sequences, a smaller block_size or fewer processes"
            )
        self.group, self.blocks = group, blocks
        # The sizes of blocks follow from the lengths of documents: nothing is read from the device.
        offsets = list(itertools.accumulate(_block_sizes(blocks), initial=0))
        self._block_starts = _cuts(offsets, n)
        self._starts = [offsets[b] for b in self._block_starts]
        first, last = self._starts[group.rank : group.rank + 2]
        self.tokens = slice(first, last)
        self.own_blocks = slice(*self._block_starts[group.rank : group.rank + 2])
        self.own = Blocks.from_lengths(_lengths_within(blocks.lengths, first, last), blocks.block_size, blocks.device)
        self._bounds = torch.tensor([self._block_starts, self._starts], dtype=torch.int32).to(blocks.device)
        self._last: tuple[Kept, Kept] | None = None

    @property
    def everything(self) -> PackedRows:
        """All rows of this process, and all of the batch."""
        whole = WholeRows(self.blocks.cu_seqlens, self.blocks.max_seqlen, counts=self._counts(self._starts))
        return PackedRows(self.own.cu_seqlens, self.own.max_seqlen, whole=whole)

    @staticmethod
    def _counts(starts: Sequence[int]) -> tuple[int, ...]:
        return tuple(b - a for a, b in itertools.pairwise(starts))

    # --- what all processes know ---

    def gather(self, values: Tensor) -> Tensor:
        """[nb, ...] of all blocks from those of this process, [nb_own, ...]."""
        whole = values.new_zeros(self.blocks.num_blocks, *values.shape[1:])
        whole[self.own_blocks] = values
        return self.group.sum_(whole)  # sums of one value and zeros

    def mean_over_heads(self, values: Tensor) -> Tensor:
        """The mean over the processes of what each found for its heads."""
        return self.group.sum_(values.contiguous()).div_(self.group.size)

    def largest_of_heads(self, values: Tensor) -> Tensor:
        """The largest of what each process found for its heads."""
        values = values.contiguous()
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self.group.processes)
        return values

    # --- what is this process's ---

    def take(self, x: Tensor) -> Tensor:
        """This process's rows of x [T, ...], in memory of their own."""
        if x.requires_grad and torch.is_grad_enabled():
            return _OwnRows.apply(x, self.tokens, self.group)
        return x[self.tokens].clone()

    def cut(self, tables: T) -> T:
        """This process's rows of tensors [T, ...] in tuples or by name; anything else as it is."""
        taken: Any = tables
        if isinstance(tables, Tensor):
            taken = self.take(tables)
        elif isinstance(tables, tuple):
            taken = tuple(self.cut(t) for t in tables)
        elif isinstance(tables, dict):
            taken = {name: self.cut(t) for name, t in tables.items()}
        return taken

    def kept(self, whole: Kept | None) -> Kept | None:
        """This process's part of a list. Waits for the device, once for every list that leaves something out."""
        if whole is None:
            return None
        if self._last is None or self._last[0] is not whole:
            self._last = whole, self._part(whole)
        return self._last[1]

    def _part(self, whole: Kept) -> Kept:
        if whole.is_everything:
            weights = whole.weights[self.own_blocks]
            return replace(Kept.everything(self.own), weights=weights, whole=whole, counts=self._counts(self._starts))
        whole.raise_on_fault()
        # The same tensors on the device hold ascending ids of blocks and of tokens.
        cuts = torch.stack(
            (torch.searchsorted(whole.blocks, self._bounds[0]), torch.searchsorted(whole.rows, self._bounds[1]))
        )
        blocks, rows = cuts.tolist()
        b, r = (slice(*starts[self.group.rank : self.group.rank + 2]) for starts in (blocks, rows))
        own = whole.rows[r] - self.tokens.start
        slots = whole.slots[self.own_blocks]
        return Kept(
            blocks=whole.blocks[b] - self.own_blocks.start,
            slots=torch.where(slots >= 0, slots - b.start, slots),
            row_offsets=whole.row_offsets[b.start : b.stop + 1] - r.start,
            cu_seqlens=torch.searchsorted(own, self.own.cu_seqlens, out_int32=True),
            rows=own,
            row_slots=whole.row_slots[r] - b.start,
            weights=whole.weights[b],
            num_blocks=b.stop - b.start,
            num_rows=r.stop - r.start,
            max_seqlen=self.own.max_seqlen,
            source=self.own,
            chosen_by=whole.chosen_by,
            whole=whole,
            counts=self._counts(rows),
        )

    # --- sums ---

    def sum(self, x: Tensor) -> Tensor:
        """Over the processes, differentiable."""
        return _Sum.apply(x, self.group)

    def everywhere(self, x: Tensor) -> Tensor:
        """A parameter outside of the layers, whose gradient is summed over the processes."""
        return _Everywhere.apply(x, self.group)


def _block_sizes(blocks: Blocks) -> list[int]:
    b = blocks.block_size
    return [min(b, n - first) for n in blocks.lengths for first in range(0, n, b)]


def _cuts(offsets: Sequence[int], parts: int) -> list[int]:
    """The first block of every part, and the number of blocks at the end: parts of about as many tokens, none empty."""
    total, last = offsets[-1], len(offsets) - 1
    cuts, block = [0], 0
    for part in range(1, parts):
        goal = total * part / parts
        while block < last and abs(offsets[block + 1] - goal) <= abs(offsets[block] - goal):
            block += 1
        block = min(max(block, cuts[-1] + 1), last - (parts - part))
        cuts.append(block)
    return [*cuts, last]


def _lengths_within(lengths: Sequence[int], first: int, last: int) -> list[int]:
    """Lengths of the parts of documents between two tokens."""
    starts = itertools.accumulate(lengths, initial=0)
    parts = (min(s + n, last) - max(s, first) for s, n in zip(starts, lengths, strict=False))
    return [n for n in parts if n > 0]


# --- attention --------------------------------------------------------------------------------------------------------


class SequenceAttention(Attention):
    """Attention of rows that are divided among processes: each computes its heads over all rows. places: of the whole
    batch."""

    def __init__(self, share: Share, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share = share

    def of_projected(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, choice: TileChoice | None = None
    ) -> tuple[Tensor, Tensor]:
        whole, options = _whole(rows), self.options(layer)
        q, k, v = self._by_heads(q, k, v, whole)
        out, lse = self.attend(q, k, v, whole, whole, options, tiles_of(choice, options, q, k))
        group, counts = self.share.group, whole.counts
        return _to_rows(out, counts, group), _to_rows(lse.t()[..., None], counts, group)[..., 0].t()

    def of_projected_with_gradient(
        self,
        layer: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rows: PackedRows,
        choice: TileChoice | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        reuse_out: bool = False,
    ) -> Tensor:
        whole, options, group = _whole(rows), self.options(layer), self.share.group
        q, k, v = self._by_heads(q, k, v, whole)
        tiles = tiles_of(choice, options, q, k)
        if out is not None and lse is not None:
            out = _to_heads(out, whole.counts, group)
            lse = _to_heads(lse.t()[..., None], whole.counts, group)[..., 0].t().contiguous()
        # Its output is exchanged, and the copy of it that the caller holds is not the one that is reused.
        y = self.attend_with_gradient(q, k, v, whole, whole, options, tiles, out, lse, reuse_out)
        return _Exchange.apply(y, whole.counts, group, False)

    def separable(self, layer: nn.Module) -> bool:
        return False

    def options(self, layer: nn.Module) -> AttentionOptions:
        """With the sinks of this process's heads."""
        options, group = super().options(layer), self.share.group
        return options if options.sinks is None else replace(options, sinks=options.sinks.chunk(group.size)[group.rank])

    def project(self, layer: nn.Module, h: Tensor, table_rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of this process's rows, with all heads."""
        if h.shape[0] > 0:
            return super().project(layer, h, table_rows)
        # Families may infer the number of heads from a number of rows: one row stands in, and is cut off again.
        row = torch.cat((h, h.new_zeros(1, h.shape[1])))
        place = torch.zeros(1, dtype=torch.int32, device=h.device)
        q, k, v = super().project(layer, row, place)
        return q[:0], k[:0], v[:0]

    def _by_heads(self, q: Tensor, k: Tensor, v: Tensor, whole: WholeRows) -> tuple[Tensor, Tensor, Tensor]:
        """This process's heads of q, k and v for all rows, in one exchange."""
        n, (m, _, width) = self.share.group.size, q.shape
        k, v = (_for_each(x, n) for x in (k, v))
        heads = [x.shape[1] // n for x in (q, k, v)]
        parts = [x.reshape(m, n, h, width) for x, h in zip((q, k, v), heads, strict=True)]
        got = _Exchange.apply(torch.cat(parts, 2).flatten(1, 2), whole.counts, self.share.group, True)
        return got.split(heads, 1)


def _whole(rows: PackedRows) -> WholeRows:
    assert rows.whole is not None
    return rows.whole


def _for_each(x: Tensor, processes: int) -> Tensor:
    """Keys or values [m, Hk, D] with at least one head for each process."""
    heads = x.shape[1]
    return x if heads % processes == 0 else x.repeat_interleave(processes // heads, 1)
