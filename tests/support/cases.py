"""The one table of operation cases: shapes, inputs, how to run lemo on them and what the oracle says.

Every case has ``inputs(device, dtype)`` (seeded; rounded to dtype, so that lemo and oracle see the same numbers),
``run`` (lemo) and ``expect`` (oracle), which return results by name. All operation tests
read this table.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from lemo import ops
from support import oracle
from support.attention_cases import ATTENTION, CPU_ATTENTION
from support.draws import Draw, grads, leaf
from support.elementwise_cases import RELU, ROTARY, SWIGLU
from support.packings import PACKINGS
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
CASES = [*ROWS, *NORMS, *ROTARY, *SWIGLU, *RELU, *ATTENTION, *SCORES, *PREDICT, *LOSS, *TILE_SCORES]


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
