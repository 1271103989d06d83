"""The one table of operation cases: shapes, inputs, how to run lemo on them and what the oracle says.

Every case has ``inputs(device, dtype)`` (seeded; rounded to dtype, so that lemo and oracle see the same numbers),
``run`` (lemo) and ``expect`` (oracle), which return results by name. All operation tests
read this table.
"""

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
from support.elementwise_cases import ROTARY, SWIGLU
from support.packings import ATTENTION_PACKINGS, PACKINGS, SPLIT_PACKINGS, Packing
from support.tile_cases import TILE_SCORES
from torch import Tensor

Inputs = dict[str, Tensor]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """gather and scatter_add."""

    packing: str
    d: int
    weighted: bool = False
    base: bool = False
    padding: int = 0

    def inputs(self, device: str, dtype: torch.dtype) -> Inputs:
        draw, p = Draw(device, dtype), PACKINGS[self.packing]
        pad = torch.full((self.padding,), -1, dtype=torch.int32, device=device)
        rows = torch.cat([p.tensor("rows", device), pad])
        m = rows.shape[0]
        tensors = {"x": draw.normal(p.tokens, self.d), "rows": rows, "y": draw.normal(m, self.d)}
        if self.weighted:
            tensors["weights"] = draw.uniform(max(len(p.kept), 1), low=1.0, high=4.0)
            tensors["slots"] = torch.cat([p.tensor("row_slots", device), pad])
        if self.base:
            tensors["base"] = draw.normal(m, self.d)
        return tensors

    def run(self, t: Inputs) -> Results:
        x = t["x"].clone()
        ops.scatter_add_(x, t["rows"], t["y"], t.get("base"))
        return {"gather": ops.gather(t["x"], t["rows"], t.get("weights"), t.get("slots")), "scatter": x}

    def expect(self, t: Inputs) -> Results:
        return {
            "gather": oracle.gather(t["x"], t["rows"], t.get("weights"), t.get("slots")),
            "scatter": oracle.scatter_add(t["x"], t["rows"], t["y"], t.get("base")),
        }


@dataclass(frozen=True)
class Norm:
    """gather_norm and its backward pass, out of place and accumulating."""

    packing: str
    d: int
    norm: str = "rms"
    rows: bool = True
    residual: bool = False
    weight: str = "same"  # "none" | "same" (dtype of x) | "float32"
    bias: bool = False
    extra: bool = False
    eps: float = 1e-5

    def inputs(self, device: str, dtype: torch.dtype) -> Inputs:
        draw, p = Draw(device, dtype, 1), PACKINGS[self.packing]
        rows = p.tensor("rows", device)
        m = rows.shape[0] if self.rows else p.tokens
        small = torch.float32 if self.weight == "float32" else dtype
        tensors = {
            "x": draw.normal(p.tokens, self.d),
            "dy": draw.normal(m, self.d),
            "dx": draw.normal(p.tokens, self.d),
        }
        if self.rows:
            tensors["rows"] = rows
        if self.residual:
            tensors["residual"] = draw.normal(m, self.d)
        if self.weight != "none":
            tensors["weight"] = draw.normal(self.d, dtype=small) + 1
        if self.bias:
            tensors["bias"] = draw.normal(self.d, dtype=small)
        if self.extra:
            tensors["extra"] = draw.normal(m, self.d)
        return tensors

    def run(self, t: Inputs) -> Results:
        weight, bias, extra, rows = t.get("weight"), t.get("bias"), t.get("extra"), t.get("rows")
        y, s = ops.gather_norm(t["x"], rows, t.get("residual"), weight, bias, self.norm, self.eps)
        wants = (weight is not None, bias is not None)
        ds, dweight, dbias = ops.gather_norm_backward(t["dy"], s, weight, extra, self.norm, self.eps, *wants)
        dx = t["dx"].clone()
        ops.gather_norm_backward_(dx, rows, t["dy"], s, weight, extra, self.norm, self.eps, True)
        results = {"y": y, "s": s, "ds": ds, "dx": dx, "dweight": dweight, "dbias": dbias}
        return {name: r for name, r in results.items() if r is not None}

    def expect(self, t: Inputs) -> Results:
        weight, bias = (None if t.get(n) is None else leaf(t[n]) for n in ("weight", "bias"))
        _, s = oracle.gather_norm(t["x"], t.get("rows"), t.get("residual"), None, None, self.norm, self.eps)
        # The backward pass starts from s as the forward pass stored it.
        s_in = leaf(s.to(t["x"].dtype))
        wanted = [w for w in (weight, bias) if w is not None]
        y, _ = oracle.gather_norm(s_in, None, None, weight, bias, self.norm, self.eps)
        ds, *others = grads([y], [t["dy"]], s_in, *wanted)
        if self.extra:
            ds = ds + oracle.up(t["extra"])
        rows = t.get("rows", torch.arange(s.shape[0], device=s.device))
        results = {"y": y.detach(), "s": s, "ds": ds, "dx": oracle.scatter_add(t["dx"], rows, ds)}
        names = [n for n, w in (("dweight", weight), ("dbias", bias)) if w is not None]
        return results | dict(zip(names, others, strict=True))


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


@dataclass(frozen=True)
class Scores:
    packing: str
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    normalize: bool = False
    window: int = 0
    softcap: float = 0.0

    def inputs(self, device: str, dtype: torch.dtype) -> Inputs:
        draw, p = Draw(device, dtype, 3), PACKINGS[self.packing]
        fused = draw.normal(p.tokens, self.heads + self.kv_heads, self.dim)
        return dict(zip("qk", fused.split([self.heads, self.kv_heads], dim=1), strict=True))

    def run(self, t: Inputs) -> Results:
        b = PACKINGS[self.packing].blocks(t["q"].device.type)
        arguments = (t["q"], t["k"], b.offsets, b.documents, b.block_size, self.dim**-0.5, self.normalize)
        options = {"window": self.window, "softcap": self.softcap}
        scores, block_map = ops.block_scores(*arguments, want_map=True, **options)
        alone, _ = ops.block_scores(*arguments, **options)
        assert block_map is not None
        return {"scores": scores, "map": block_map, "scores_alone": alone}

    def expect(self, t: Inputs) -> Results:
        documents = PACKINGS[self.packing].documents
        options = (self.dim**-0.5, self.normalize, self.window, self.softcap)
        scores, block_map = oracle.block_scores(t["q"], t["k"], documents, *options)
        return {"scores": scores, "map": block_map, "scores_alone": scores}


@dataclass(frozen=True)
class Predict:
    packing: str
    d: int = 64
    ranks: tuple[int, int, int] = (16, 8, 8)
    norm: str = "rms"
    pool: str = "mean"
    normalize: bool = False
    stacked: bool = False  # wq1 and wk1 in one matrix: a separate path on CUDA

    def inputs(self, device: str, dtype: torch.dtype) -> Inputs:
        draw = Draw(device, dtype, 4)
        r, s, c = self.ranks
        tensors = {"x": draw.normal(PACKINGS[self.packing].tokens, self.d)}
        # Sizes of the two networks differ except for the last, as after pruning.
        for name, (rank, inner) in {"q": (r, s), "k": (r + 8, s + 8)}.items():
            for i, (rows, columns) in enumerate(((rank, self.d), (inner, rank), (c, inner)), start=1):
                tensors[f"w{name}{i}"] = draw.normal(rows, columns, scale=columns**-0.5)
        if self.stacked:
            both = torch.cat((tensors["wq1"], tensors["wk1"]))
            tensors["wq1"], tensors["wk1"] = both.split((r, r + 8))
        return tensors

    def run(self, t: Inputs) -> Results:
        b = PACKINGS[self.packing].blocks(t["x"].device.type)
        weights = [t[f"w{name}{i}"] for name in "qk" for i in (1, 2, 3)]
        layout = (b.offsets, b.documents, b.block_size)
        scores, queries, keys = ops.predict(t["x"], *weights, *layout, self.norm, self.pool, 1e-5, self.normalize)
        return {"scores": scores, "queries": queries, "keys": keys}

    def expect(self, t: Inputs) -> Results:
        networks = [[t[f"w{name}{i}"] for i in (1, 2, 3)] for name in "qk"]
        documents = PACKINGS[self.packing].documents
        scores, queries, keys = oracle.predict(t["x"], *networks, documents, self.norm, self.pool, 1e-5, self.normalize)
        return {"scores": scores, "queries": queries, "keys": keys}


@dataclass(frozen=True)
class Loss:
    n: int
    d: int
    vocab: int
    bias: bool = False
    rank: int = 0
    softcap: float = 0.0
    ignored: str = "some"  # "none" | "some" | "all"
    reduction: str = "mean"
    segment: int = 0
    dweight: bool = False
    ignore_index: int = -100

    def inputs(self, device: str, dtype: torch.dtype) -> Inputs:
        draw = Draw(device, dtype, 6)
        tensors = {
            "hidden": draw.normal(self.n, self.d),
            "weight": draw.normal(self.vocab, self.d, scale=2 * self.d**-0.5),
            "targets": draw.integers(self.vocab, self.n),
        }
        if self.ignored != "none":
            every = 3 if self.ignored == "some" else 1
            tensors["targets"][::every] = self.ignore_index
        if self.bias:
            tensors["bias"] = draw.normal(self.vocab)
        if self.rank:
            tensors["lora_a"] = draw.normal(self.rank, self.d, scale=self.d**-0.5)
            tensors["lora_b"] = draw.normal(self.vocab, self.rank)
        return tensors

    def run(self, t: Inputs) -> Results:
        loss, valid, *found = ops.linear_cross_entropy(
            t["hidden"],
            t["weight"],
            t.get("bias"),
            t.get("lora_a"),
            t.get("lora_b"),
            0.5,
            t["targets"],
            self.ignore_index,
            self.softcap,
            self.reduction,
            self.segment,
            want_dhidden=True,
            want_dweight=self.dweight,
            want_dbias=self.bias and self.dweight,
            want_dlora=self.rank > 0,
        )
        assert valid.item() == (t["targets"] != self.ignore_index).sum().item()
        names = ("dhidden", "dweight", "dbias", "dlora_a", "dlora_b")
        return {"loss": loss[0]} | {n: g for n, g in zip(names, found, strict=True) if g is not None}

    def expect(self, t: Inputs) -> Results:
        names = ["hidden"]
        names += ["weight"] if self.dweight else []
        names += ["bias"] if self.bias and self.dweight else []
        names += ["lora_a", "lora_b"] if self.rank else []
        leaves = {n: leaf(t[n]) for n in names}
        a = t | leaves
        loss = oracle.linear_cross_entropy(
            a["hidden"],
            a["weight"],
            t["targets"],
            a.get("bias"),
            a.get("lora_a"),
            a.get("lora_b"),
            0.5,
            self.ignore_index,
            self.softcap,
            self.reduction,
        )
        found = grads([loss], [torch.ones_like(loss)], *leaves.values())
        return {"loss": loss.detach()} | {f"d{n}": g for n, g in zip(names, found, strict=True)}


ROWS = [
    *(Rows(p, 64) for p in PACKINGS),
    Rows("documents", 40, weighted=True),
    Rows("batch", 256, weighted=True, base=True),
    Rows("long", 4096, base=True),
    Rows("ragged", 8, padding=7),
    Rows("keep_none", 64, weighted=True, padding=3),
    Rows("documents", 128, weighted=True, base=True, padding=5),
]
NORMS = [
    *(Norm(p, 64) for p in PACKINGS),
    Norm("documents", 64, rows=False),
    Norm("documents", 768, "layer", rows=False, bias=True),
    Norm("documents", 200, "layer", residual=True, bias=True, extra=True),
    Norm("batch", 1024, residual=True, extra=True, weight="float32"),
    Norm("batch", 72, "layer", weight="none"),
    Norm("ragged", 8, weight="none", rows=False, residual=True),
    Norm("long", 4096, extra=True),
    Norm("long", 1000, "layer", weight="float32", bias=True),
]
DIMS = (64, 80, 96, 128)
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
        for hq, hk in ((2, 2), (8, 2), (4, 1))
        for storage in ("packed", "rows", "strided")
        for given in ((False, True) if storage == "rows" else (False,))
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
# What the kernels on CUDA do not have yet.
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
CPU_SCORES = [
    *(Scores(p, 4, 2, 32, normalize, window=w) for p in PACKINGS for normalize, w in ((False, 40), (True, 17))),
    Scores("documents", 4, 2, 32, softcap=2.0),
    Scores("long", 4, 2, 32, True, window=1, softcap=2.0),
    Scores("long", 4, 2, 32, True, window=2**40),
]
SCORES = [
    *(Scores(p) for p in PACKINGS),
    *(Scores("documents", 4, 1, dim, normalize=True) for dim in (64, 80, 96, 128)),
    Scores("long", 8, 8),
    Scores("block_128", 6, 2, 80, normalize=True),
]
PREDICT = [
    *(Predict(p) for p in PACKINGS),
    Predict("documents", 200, (24, 16, 8), "layer", "max"),
    Predict("documents", 64, (8, 8, 16), "rms", "max", normalize=True),
    Predict("long", 512, (64, 32, 32), "layer", normalize=True),
    Predict("block_128", 256, (128, 64, 64)),
    Predict("documents", 128, (32, 16, 16), "rms", "max", stacked=True),
]
LOSS = [
    Loss(1, 16, 32, ignored="none"),
    Loss(50, 64, 257, ignored="none"),
    Loss(130, 64, 1000, bias=True, dweight=True, segment=48),
    Loss(130, 64, 1000, softcap=5.0, reduction="sum", segment=130),
    Loss(70, 96, 520, rank=8, bias=True, softcap=30.0, dweight=True, segment=16),
    Loss(70, 96, 520, rank=4, reduction="sum"),
    Loss(33, 32, 64, ignored="all", dweight=True),
    Loss(33, 32, 64, ignored="all", reduction="sum"),
    Loss(64, 48, 100, ignore_index=0, dweight=True),
]
CPU_CASES = [*CPU_ATTENTION, *CPU_SCORES]
CASES = [*ROWS, *NORMS, *ROTARY, *SWIGLU, *ATTENTION, *SCORES, *PREDICT, *LOSS, *TILE_SCORES]


def name_of(case: object) -> str:
    """A test id: the class and the fields that are not at their default."""
    fields = dataclasses.fields(case)
    shown = [(f.name, getattr(case, f.name)) for f in fields if getattr(case, f.name) != f.default]
    return "-".join([type(case).__name__, *(str(v) if isinstance(v, str) else f"{n}={v}" for n, v in shown)])


# --- selection: its results are exact ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Select:
    """kept lists must agree exactly. scores: "random", "ties", "probabilities" or "nothing" (never drawn)."""

    packing: str
    mode: str
    keep: float = 0.5
    threshold: float = 0.0
    first: int = 0
    last: int = 0
    scores: str = "random"
    seed: int = 0

    def inputs(self, device: str) -> Tensor:
        draw = Draw(device, torch.float32, 7 + self.seed % 100)
        n = sum(len(document) for document in PACKINGS[self.packing].documents)
        if self.scores == "probabilities":
            p = draw.uniform(n, low=0.05, high=0.9)
            p[::5] = 1.0
            return p
        if self.scores == "nothing":
            return draw.uniform(n, low=1e-9, high=1e-8)
        return draw.integers(3, n).float() if self.scores == "ties" else draw.normal(n)


SELECT = [
    *(Select(p, "budget", first=1) for p in PACKINGS),
    *(Select(p, "threshold", threshold=0.2, first=1, last=1) for p in PACKINGS),
    *(Select(p, "sample", scores="probabilities", seed=3) for p in PACKINGS),
    *(Select("long", "budget", keep=keep, scores="ties") for keep in (0.01, 0.25, 0.3, 0.7, 1.0)),
    *(Select("documents", "sample", keep=0.4, first=1, last=2, scores="probabilities", seed=s) for s in range(4)),
    Select("documents", "sample", seed=2**64 - 1, scores="probabilities"),
    *(Select(p, "poisson", first=1, scores="probabilities", seed=3) for p in PACKINGS),
    *(Select("documents", "poisson", last=2, scores="probabilities", seed=s) for s in range(3)),
    Select("one_block", "poisson", scores="nothing"),
    Select("documents", "threshold", threshold=-1e30),
    Select("documents", "threshold", threshold=1.0, scores="ties"),
    Select("batch", "budget", keep=0.34, first=2, last=2),
    Select("one_block", "budget", first=3, last=3),
]
