"""How a layer attends: the one place where the engine calls the attention operators.

Layers hand over the norm's output and the rows they work on, and get the attention output of those rows back. What
happens in between is decided here, so that chunks of queries, tile lists, or keys that come from other processes need
no change in the layers: a subclass of `Attention` overrides `attend` and `attend_with_gradient`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lemo import ops
from lemo.engine.families.base import AttentionOptions, Family, Tables
from lemo.engine.linear import projection


@dataclass(frozen=True, eq=False)
class PackedRows:
    """M packed rows of D documents on one side of attention, that of the queries or that of the keys.

    cu_seqlens: int32 [D + 1], first row of every document, M at the end; max_seqlen: the longest document in rows, or
    an upper bound of it; table_rows: int32 [M], the token behind every row, which is its row in the rotary tables and
    its place for a window; None if they are all tokens in order.
    weights: float32 [K], by which gradients of keys are multiplied, by block slot; slots: int32 [M], the slot of every
    row. Both are None unless gradients are weighted. whole: the rows of all processes, if these are a part of a
    sequence that several share (`lemo.engine.sequence`).
    """

    cu_seqlens: Tensor
    max_seqlen: int
    table_rows: Tensor | None = None
    weights: Tensor | None = None
    slots: Tensor | None = None
    whole: WholeRows | None = None


@dataclass(frozen=True, eq=False)
class WholeRows(PackedRows):
    """Rows that are divided among processes, in the order of their ranks; counts: how many each has."""

    counts: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Tiles:
    """The key tiles that each query tile attends to (`lemo.engine.tiles`), as both passes read them.

    offsets int32 [S + 1], tiles int32 [L]: the key tiles of every query tile; transposed_offsets, transposed_tiles, of
    the same shapes: the query tiles of every key tile.
    """

    offsets: Tensor
    tiles: Tensor
    transposed_offsets: Tensor
    transposed_tiles: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.offsets, self.tiles, self.transposed_offsets, self.transposed_tiles


class TileChoice:
    """The tiles of one layer's attention: chosen once from its queries and keys, and the same ones whenever it runs
    again."""

    def __init__(self, choose: Callable[[Tensor, Tensor], Tiles | None]) -> None:
        self._choose: Callable[[Tensor, Tensor], Tiles | None] | None = choose
        self._tiles: Tiles | None = None

    def of(self, q: Tensor, k: Tensor) -> Tiles | None:
        """For q [M, Hq, D] and k [M, Hk, D]; None: every query sees all earlier keys."""
        if self._choose is not None:
            self._tiles, self._choose = self._choose(q.detach(), k.detach()), None
        return self._tiles


class Attention:
    """Causal attention within documents, for all layers of one step.

    places: int32 [T], place in its sequence of every token, if a document lacks some of the tokens between its own.
    longest: places of the longest document, if windows that it does not exceed are to be left out.
    """

    def __init__(
        self,
        family: Family,
        tables: Tables,
        deterministic: bool = False,
        places: Tensor | None = None,
        *,
        longest: int | None = None,
    ) -> None:
        self.family, self.tables, self.deterministic, self.places = family, tables, deterministic, places
        self.longest = longest

    # --- what layers call ---

    def forward(
        self, layer: nn.Module, h: Tensor, rows: PackedRows, choice: TileChoice | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output [M, Hq, D] and log-sum-exp float32 [Hq, M] of the norm's output h [M, d]. Without a graph.

        choice: of the tiles that are attended to; None: all of them.
        """
        q, k, v = self.project(layer, h, rows.table_rows)
        del h
        return self.of_projected(layer, q, k, v, rows, choice)

    def differentiable(
        self,
        layer: nn.Module,
        h: Tensor,
        rows: PackedRows,
        choice: TileChoice | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        reuse_out: bool = False,
    ) -> Tensor:
        """Output [M, Hq, D] of h [M, d] with its graph. out and lse: what `forward` gave, if it need not run again.
        reuse_out: the backward pass may write into the output's memory."""
        q, k, v = self.project(layer, h, rows.table_rows)
        return self.of_projected_with_gradient(layer, q, k, v, rows, choice, out, lse, reuse_out)

    def project(self, layer: nn.Module, h: Tensor, table_rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [M, Hq, D], k and v [M, Hk, D] of h [M, d]; table_rows: the tokens of these rows, as in `PackedRows`."""
        return self.family.queries_keys_values(layer, h, self.tables, table_rows)

    def of_projected(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, rows: PackedRows, choice: TileChoice | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, of what `project` gave."""
        options = self.options(layer)
        return self.attend(q, k, v, rows, rows, options, tiles_of(choice, options, q, k))

    # One argument more than usual: those of `differentiable`, with q, k and v in place of h.
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
        """As `differentiable`, of what `project` gave."""
        options = self.options(layer)
        tiles = tiles_of(choice, options, q, k)
        return self.attend_with_gradient(q, k, v, rows, rows, options, tiles, out, lse, reuse_out)

    def separable(self, layer: nn.Module) -> bool:
        """Whether the backward pass may go through attention and through the projections before it one after the
        other, and through the latter in pieces of rows: nothing but these projections is between the norm and attention
        then, and their graph does not depend on their values."""
        specs = map(projection, self.family.attention_modules(layer))
        return all(spec is not None and spec.magnitude is None for spec in specs)

    def queries_keys(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's q [T, Hq, D] and k [T, Hk, D] for the residual stream x [T, d], position embedding applied."""
        n = self.family.norms(layer)[0]
        h, _ = ops.gather_norm(x, None, None, *n.operands, n.kind, n.eps)
        return self.family.queries_keys_values(layer, h, self.tables, None)[:2]

    def options(self, layer: nn.Module) -> AttentionOptions:
        """Those of the layer, without a window if no document of this step exceeds it."""
        options = self.family.attention_options(layer)
        return options if self.longest is None else options.within(self.longest)

    # --- what decides how they are computed ---

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: PackedRows,
        keys: PackedRows,
        options: AttentionOptions,
        tiles: Tiles | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(out [M, Hq, D], lse float32 [Hq, M]) of q [M, Hq, D] over k and v [Mk, Hk, D].

        keys: `queries` itself, or rows of the same D documents, each aligned with its queries at the end. options: of
        the layer, sinks for these Hq heads. tiles: only if the keys are those of the queries, and without a window.
        """
        others = _key_rows(queries, keys) | self._options(options, queries, keys)
        if options.sinks is not None:
            others["sinks"] = options.sinks.detach().float()
        lists = (None, None) if tiles is None else (tiles.offsets, tiles.tiles)
        where = (queries.cu_seqlens, None, queries.max_seqlen, options.scale)
        return ops.attention_forward(q, k, v, *where, *lists, **others)

    def attend_with_gradient(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        queries: PackedRows,
        keys: PackedRows,
        options: AttentionOptions,
        tiles: Tiles | None,
        out: Tensor | None,
        lse: Tensor | None,
        reuse_out: bool = False,
    ) -> Tensor:
        """As `attend`, differentiable in q, k, v and sinks; given out and lse are not computed again."""
        others = _key_rows(queries, keys) | self._options(options, queries, keys)
        if keys is not queries:
            others["row_slots_k"] = keys.slots
        return ops.attention(
            q,
            k,
            v,
            queries.cu_seqlens,
            queries.max_seqlen,
            scale=options.scale,
            key_weights=keys.weights,
            row_slots=queries.slots,
            out=out,
            lse=lse,
            deterministic=self.deterministic,
            tile_lists=None if tiles is None else tiles.tensors,
            sinks=options.sinks,
            reuse_out=reuse_out,
            **others,
        )

    def _options(self, options: AttentionOptions, queries: PackedRows, keys: PackedRows) -> dict[str, Any]:
        """Soft-cap and window of the operators, with the places of both sides."""
        given: dict[str, Any] = {"softcap": options.softcap} if options.softcap else {}
        if options.window is None:
            return given
        places = self._places(queries)
        given |= {"window": options.window, "places": places}
        if keys is not queries:
            places_k = self._places(keys)
            if places is None or places_k is None:
                raise ValueError(
                    "table_rows: expected the tokens of queries and of keys with a window and keys of separate rows, "
                    "got None: how far a key lies from a query is not known"
                )
            given["places_k"] = places_k
        return given

    def _places(self, rows: PackedRows) -> Tensor | None:
        """int32 [M]; None: rows lie at their places."""
        if self.places is None or rows.table_rows is None:
            return rows.table_rows if self.places is None else self.places
        return self.places.index_select(0, rows.table_rows)


def tiles_of(choice: TileChoice | None, options: AttentionOptions, q: Tensor, k: Tensor) -> Tiles | None:
    """A layer with a window computes all of it: there is little to leave out."""
    return None if choice is None or options.window is not None else choice.of(q, k)


def _key_rows(queries: PackedRows, keys: PackedRows) -> dict[str, Any]:
    """What the operators need to know of keys that have separate rows; nothing if they have those of the queries."""
    return {} if keys is queries else {"cu_seqlens_k": keys.cu_seqlens, "max_seqlen_k": keys.max_seqlen}
