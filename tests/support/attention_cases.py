"""The cases of attention: what tests of its operators, derivatives and devices read."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from lemo import ops
from support import oracle
from support.draws import Draw, grads, leaf
from support.packings import ATTENTION_PACKINGS, PACKINGS, SPLIT_PACKINGS, Packing
from support.pairs import pairs
from torch import Tensor

Inputs = dict[str, Tensor]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Attention:
    """Attention over kept rows, forward and backward.

    storage: "packed" rows; "rows": original offsets, where rows that are not named hold NaN; "strided": packed views of
    one fused [M, Hq + 2 Hk, D] tensor. given: output and LSE come from attention over everything, keys carry weights
    (mode `backward`). magnitude: of queries and keys; its square is that of the scores. lists: about half of the
    earlier tiles are seen. A packing of SPLIT_PACKINGS gives queries and keys separate rows. window, softcap, sinks: as
    the operator has them.
    """

    packing: str
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    storage: str = "packed"
    given: bool = False
    magnitude: float = 1.0
    lists: bool = False
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @property
    def split(self) -> bool:
        return self.packing in SPLIT_PACKINGS

    @property
    def layout(self) -> Packing:
        """Of the queries."""
        return SPLIT_PACKINGS[self.packing][0] if self.split else (PACKINGS | ATTENTION_PACKINGS)[self.packing]

    @property
    def keys(self) -> Packing:
        return SPLIT_PACKINGS[self.packing][1] if self.split else self.layout

    def places(self, device: str) -> tuple[Tensor, Tensor]:
        """Of all tokens, queries and keys: those of a document are aligned at its end."""
        places: tuple[list[Tensor], list[Tensor]] = ([], [])
        for nq, nk in zip(self.layout.lengths, self.keys.lengths, strict=True):
            places[0].append(torch.arange(nk - nq, nk) + 1000)
            places[1].append(torch.arange(nk) + 1000)
        queries, keys = (torch.cat(side).int().to(device) for side in places)
        return queries, keys

    def options(self, t: Inputs, everything: bool = False) -> oracle.Options:
        """For the packed rows, or for all tokens."""
        device = t["q"].device.type
        queries, keys = self.places(device)
        if not everything:
            queries, keys = (
                places[side.tensor("rows", device).long()]
                for places, side in ((queries, self.layout), (keys, self.keys))
            )
        return oracle.Options(self.window, self.softcap, t.get("sinks"), queries, keys)

    def inputs(self, device: str, dtype: torch.dtype) -> Inputs:
        draw, p, keys = Draw(device, dtype, 2), self.layout, self.keys
        tensors = {
            "q": draw.normal(p.tokens, self.heads, self.dim, scale=self.magnitude),
            "k": draw.normal(keys.tokens, self.kv_heads, self.dim, scale=self.magnitude),
            "v": draw.normal(keys.tokens, self.kv_heads, self.dim),
            "dout": draw.normal(p.tokens, self.heads, self.dim),
        }
        if self.sinks:
            tensors["sinks"] = draw.normal(self.heads, dtype=torch.float32)
        if self.given:
            starts_k = keys.starts if self.split else None
            args = (p.starts, self.dim**-0.5, None, starts_k, self.options(tensors, everything=True))
            out, lse = oracle.attention(tensors["q"], tensors["k"], tensors["v"], *args)
            tensors["out"] = out.to(dtype)
            tensors["lse"] = lse[:, p.tensor("rows", device).long()].float().contiguous()
            tensors["key_weights"] = draw.uniform(max(len(p.kept), len(keys.kept), 1), low=1.0, high=3.0)
            tensors["row_slots"] = p.tensor("row_slots", device)
            if self.split:
                tensors["row_slots_k"] = keys.tensor("row_slots", device)
        for name in ("q", "k", "v", "dout", "out"):
            if name not in tensors:
                continue
            rows = (keys if name in "kv" else p).tensor("rows", device).long()
            if self.storage != "rows":
                tensors[name] = tensors[name][rows]
            else:
                named = torch.zeros(tensors[name].shape[0], dtype=torch.bool, device=device)
                named[rows] = True
                tensors[name][~named] = float("nan")
        if self.storage == "strided":
            for names in ("q", "kv") if self.split else ("qkv",):
                parts = [tensors[n] for n in names] + ([tensors["dout"]] if names == "q" else [])
                views = torch.cat(parts, dim=1).split([t.shape[1] for t in parts], dim=1)
                tensors |= dict(zip(names, views, strict=False))
        tensors["cu_seqlens"] = p.tensor("cu_seqlens", device)
        if self.storage == "rows":
            tensors["rows"] = p.tensor("rows", device)
        if self.split:
            tensors["cu_seqlens_k"] = keys.tensor("cu_seqlens", device)
            if self.storage == "rows":
                tensors["rows_k"] = keys.tensor("rows", device)
        if self.window and (self.split or self.storage != "rows"):  # else they are the storage rows
            for name, side, places in zip(("places", "places_k"), (p, keys), self.places(device), strict=True):
                if name == "places" or self.split:
                    tensors[name] = places[side.tensor("rows", device).long()]
        if self.lists:
            lengths = [len(tiles) for tiles in self.tile_lists]
            offsets = [0, *itertools.accumulate(lengths)]
            tensors["tile_offsets"] = torch.tensor(offsets, dtype=torch.int32, device=device)
            tensors["tiles"] = torch.tensor([*itertools.chain(*self.tile_lists)], dtype=torch.int32, device=device)
        return tensors

    @functools.cached_property
    def tile_lists(self) -> oracle.TileLists:
        """By slot; slots that no tile has are empty."""
        cu = self.layout.layout["cu_seqlens"]
        lists: oracle.TileLists = [[] for _ in range(cu[-1] // oracle.TILE + len(cu) - 1)]
        for d, (a, b) in enumerate(itertools.pairwise(cu)):
            for tile in range(-(-(b - a) // oracle.TILE)):
                slot = a // oracle.TILE + d + tile
                lists[slot] = [t for t in range(tile) if oracle.hash_uniform(slot, t) < 0.5]
        return lists

    @property
    def max_seqlen(self) -> int:
        return self.layout.layout["max_seqlen"][0]

    def key_rows(self, t: Inputs) -> dict[str, Any]:
        """Keyword arguments of the forward pass: of keys with separate rows, and options."""
        given = {n: t[n] for n in ("sinks", "places", "places_k") if n in t}
        given |= {n: value for n in ("window", "softcap") if (value := getattr(self, n))}
        if not self.split:
            return given
        names = ("cu_seqlens_k", "rows_k")
        return given | {n: t.get(n) for n in names} | {"max_seqlen_k": self.keys.layout["max_seqlen"][0]}

    def run(self, t: Inputs, deterministic: bool = False) -> Results:
        scale, rows, cu = self.dim**-0.5, t.get("rows"), t["cu_seqlens"]
        results = {}
        out, lse = t.get("out"), t.get("lse")
        lists = (t["tile_offsets"], t["tiles"]) if self.lists else ()
        keys = self.key_rows(t)
        if out is None:
            out, lse = ops.attention_forward(t["q"], t["k"], t["v"], cu, rows, self.max_seqlen, scale, *lists, **keys)
            results = {"out": out, "lse": lse}
        transposed = ops.transpose_tile_lists(*lists, cu) if lists else ()
        dq, dk, dv, dsinks = ops.attention_backward(
            t["dout"],
            t["q"],
            t["k"],
            t["v"],
            out,
            lse,
            cu,
            rows,
            t.get("key_weights"),
            t.get("row_slots"),
            self.max_seqlen,
            scale,
            deterministic,
            *transposed,
            **keys | ({"row_slots_k": t.get("row_slots_k")} if self.split else {}),
            **({"want_dsinks": True} if self.sinks else {}),
        )
        return results | {"dq": dq, "dk": dk, "dv": dv} | ({} if dsinks is None else {"dsinks": dsinks})

    def expect(self, t: Inputs) -> Results:
        scale, rows, cu = self.dim**-0.5, t.get("rows"), t["cu_seqlens"].tolist()
        lists, options = self.tile_lists if self.lists else None, self.options(t)
        rows_k = t.get("rows_k") if self.split else rows
        cu_k = t["cu_seqlens_k"].tolist() if self.split else None
        side = {"k": rows_k, "v": rows_k, "dk": rows_k, "dv": rows_k}
        packed = {
            n: t[n] if side.get(n, rows) is None else t[n][side.get(n, rows).long()] for n in ("q", "k", "v", "dout")
        }
        if self.given:
            out = t["out"] if rows is None else t["out"][rows.long()]
            dq, dk, dv = oracle.attention_backward(
                packed["dout"],
                packed["q"],
                packed["k"],
                packed["v"],
                out,
                t["lse"],
                cu,
                scale,
                t["key_weights"],
                t["row_slots"],
                lists,
                cu_k,
                t.get("row_slots_k"),
                options,
            )
            results = {"dq": dq, "dk": dk, "dv": dv}
            if self.sinks:
                results["dsinks"] = oracle.sink_gradient(packed["dout"], out, t["lse"], t["sinks"])
        else:
            q, k, v = leaf(packed["q"]), leaf(packed["k"]), leaf(packed["v"])
            sinks = [leaf(t["sinks"])] if self.sinks else []
            options = dataclasses.replace(options, sinks=sinks[0] if sinks else None)
            out, lse = oracle.attention(q, k, v, cu, scale, lists, cu_k, options)
            dq, dk, dv, *dsinks = grads([out], [packed["dout"]], q, k, v, *sinks)
            results = {"out": out.detach(), "lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}
            results |= dict(zip(["dsinks"], dsinks, strict=False))
        if rows is None:
            return results
        spread = {}
        for name in results.keys() - {"lse", "dsinks"}:
            whole, named = t["k" if name in side else "q"], side.get(name, rows)
            spread[name] = results[name].new_zeros(whole.shape[0], *results[name].shape[1:])
            spread[name][named.long()] = results[name]
        return results | spread


DIMS = (64, 80, 96, 128)
RATIOS = ((2, 2), (8, 2), (4, 1))
STORED = (("packed", False), ("rows", False), ("rows", True), ("strided", False))  # storage, given
ATTENTION = [
    *(Attention(p, storage=s) for p, s in zip(PACKINGS, ("packed", "rows", "strided") * 4, strict=False)),
    *(Attention("documents", 4, 1, dim, s) for dim in (64, 80, 96, 128) for s in ("rows", "strided")),
    *(Attention("ragged", hq, hk, 64) for hq, hk in ((1, 1), (4, 4), (8, 1), (6, 2))),
    *(Attention("long", 4, 2, dim, "rows") for dim in (64, 80, 96, 128)),
    *(Attention("long", 4, 2, dim, "packed", given=True) for dim in (64, 80, 96, 128)),
    Attention("documents", storage="rows", given=True),
    Attention("block_128", storage="strided", given=True),
    Attention("keep_all", given=True),
    Attention("keep_none", given=True),
    # Every head_dim x ratio of heads x storage, over blocks of 64 and 128 and documents of which one keeps nothing.
    *(
        Attention(p, hq, hk, dim, storage, given)
        for p in ("gap_64", "gap_128")
        for dim in DIMS
        for hq, hk in RATIOS
        for storage, given in STORED
    ),
    *(
        Attention(p, 4, 1, dim, storage)
        for p in ("block_64", "ragged_64", "ragged_128", "all_64")
        for dim in DIMS
        for storage in ("packed", "rows")
    ),
    *(Attention("gap_64", 4, 1, dim, "rows", given, magnitude=8.0) for dim in DIMS for given in (False, True)),
    *(Attention(p, 4, 1, dim, "packed", lists=True) for p in ("gap_128", "ragged_128") for dim in DIMS),
    *(Attention("gap_128", 4, 2, dim, "rows", given, lists=True) for dim in DIMS for given in (False, True)),
    # Ratios of heads that leave a thread block of the Hopper kernel with fewer parts than it has room for.
    *(Attention("gap_128", hq, hk, 64, "rows", lists=True) for hq, hk in ((2, 2), (6, 2), (8, 1))),
    # Queries and keys of different sizes.
    *(
        Attention(p, 4, 2, dim, storage)
        for p, storages in zip(SPLIT_PACKINGS, itertools.cycle((("packed", "rows"), ("strided", "rows"))), strict=False)
        for dim in DIMS
        for storage in storages
    ),
    *(
        Attention(p, 4, 1, dim, storage, given=True)
        for p in ("chunks", "last_chunk", "equal_after_all")
        for dim in DIMS
        for storage in ("packed", "rows")
    ),
    *(Attention("chunks", hq, hk, 64) for hq, hk in ((2, 2), (6, 2), (8, 1))),
    *(Attention("more_queries", hq, hk, 64) for hq, hk in ((2, 2), (8, 1))),
]
# CUDA has separate kernels for these. The CPU has one, for which pairs are enough over blocks of 128: over blocks of 64
# it runs all of them.
ON_CUDA_ALONE = {Attention("gap_128", *r, d, *s) for d in DIMS for r in RATIOS for s in STORED} - {
    Attention("gap_128", *r, d, *s) for d, r, s in pairs(DIMS, RATIOS, STORED)
}
# What the kernels with options have to prove, which on the CPU a few cases do (CPU_ATTENTION): windows that end within
# and between tiles, soft-caps that bend scores, sinks; and head_dim 256, which runs the same kernels.
CUDA_ATTENTION = [
    *(
        Attention(p, 4, 2, dim, storage, window=w)
        for p, storage in (("documents", "packed"), ("gap_128", "rows"), ("ragged_128", "strided"), ("long", "rows"))
        for dim in (*DIMS, 256)
        for w in (2, 97, 200)
    ),
    *(Attention(p, 4, 2, dim, window=100) for p in SPLIT_PACKINGS for dim in (*DIMS, 256)),
    *(Attention("chunks", 4, 1, dim, "rows", True, window=200) for dim in (*DIMS, 256)),
    *(Attention("gap_64", 4, 2, dim, "rows", g, 4.0, softcap=5.0) for dim in (*DIMS, 256) for g in (False, True)),
    *(Attention("gap_128", 4, 2, dim, "rows", softcap=2.0, lists=True) for dim in (*DIMS, 256)),
    *(Attention("gap_64", 8, 2, dim, "rows", g, sinks=True) for dim in (*DIMS, 256) for g in (False, True)),
    *(Attention("gap_128", 4, 2, dim, "rows", g, window=150, softcap=3.0, sinks=True) for dim in DIMS for g in (0, 1)),
    *(Attention("gap_128", 4, 2, dim, "rows", g, window=150, sinks=True) for dim in DIMS for g in (False, True)),
    # Windows of one tile and sinks, as in gpt-oss; sinks alone; and at every alignment of queries with keys.
    *(Attention(p, 8, 1, 64, "rows", window=128, sinks=True) for p in ("long", "ragged_128", "gap_64")),
    *(Attention("gap_128", hq, hk, 64, "rows", window=128, sinks=True) for hq, hk in ((2, 2), (6, 2), (16, 2))),
    *(Attention(p, hq, hk, 64, sinks=True) for p in ("ragged_128", "all_64") for hq, hk in ((1, 1), (8, 1))),
    *(Attention(p, 4, 2, dim, window=60, sinks=True) for p in SPLIT_PACKINGS for dim in (64, 128)),
    *(Attention("ragged_128", 4, 2, dim, "rows", magnitude=8.0, window=200) for dim in DIMS),
    *(Attention("documents", 4, 2, 256, s, g) for s, g in (("packed", False), ("rows", True))),
    *(Attention("gap_128", 4, 2, 256, "rows", g, lists=True) for g in (False, True)),
    # The soft-caps and the head_dim that Hopper's kernels compute with a window that may hide nothing.
    *(Attention(p, 4, 2, dim, softcap=4.0, window=w) for p in SPLIT_PACKINGS for dim in (128, 256) for w in (0, 60)),
    *(Attention(p, 4, 2, 256, sinks=True) for p in SPLIT_PACKINGS),
    *(Attention(p, 4, 1, 256, s) for p in ("ragged_64", "ragged_128", "long", "all_64") for s in ("packed", "rows")),
    *(Attention("long", 8, 1, dim, "strided", magnitude=4.0, softcap=50.0) for dim in (128, 256)),
    Attention("gap_64", 4, 1, 256, "rows", magnitude=8.0),
    Attention("more_queries", 4, 2, 64, sinks=True),
    Attention("keep_none", sinks=True, window=5),
]
# Also sizes of heads that the kernels on CUDA do not have.
CPU_ATTENTION = [
    *(Attention("documents", 4, 2, dim, "rows", given) for dim in (160, 192, 256) for given in (False, True)),
    *(Attention(p, 4, 2, 32, "packed", window=w) for p in ("documents", "gap_64", "ragged_128") for w in (2, 40, 130)),
    *(Attention("gap_128", 4, 2, 32, s, g, window=97) for s in ("rows", "strided") for g in (False, True)),
    *(Attention(p, 4, 2, 32, window=64) for p in SPLIT_PACKINGS),
    *(Attention(p, 4, 1, 32, "rows", True, window=200) for p in ("chunks", "kept_of_both")),
    *(Attention("gap_64", 4, 2, 64, "rows", given, 4.0, softcap=5.0) for given in (False, True)),
    Attention("gap_128", 4, 2, 64, "rows", True, lists=True, softcap=1.0, sinks=True),
    *(Attention("gap_64", 8, 2, 32, "rows", given, sinks=True) for given in (False, True)),
    Attention("more_queries", 4, 2, 32, sinks=True),
    Attention("keep_none", sinks=True, window=5),
    *(Attention("gap_128", 4, 2, 256, "rows", g, window=150, softcap=3.0, sinks=True) for g in (False, True)),
    Attention("chunks", 4, 2, 32, "rows", True, window=150, softcap=3.0, sinks=True),
]
