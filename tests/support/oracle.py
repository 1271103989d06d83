"""What every operation means, in double precision and without cleverness: the reference of all operation tests.

Plain torch, differentiable where it makes sense, quadratic memory. Arguments as in ``lemo.ops``; layouts as Python
lists: ``documents`` is a list of documents, each a list of (first, last) token ranges, one per block (see ``ranges``).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

MASK = 2**64 - 1
_precision = torch.float64


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Computes in another dtype inside: the plain torch computation whose error is the yardstick on CUDA."""
    global _precision
    before, _precision = _precision, dtype
    try:
        yield
    finally:
        _precision = before


def up(x: Tensor) -> Tensor:
    return x.to(_precision)


def ranges(lengths: list[int], block_size: int) -> list[list[tuple[int, int]]]:
    """Token ranges [first, last) of the blocks of every document."""
    documents, first = [], 0
    for n in lengths:
        documents.append([(a, min(a + block_size, first + n)) for a in range(first, first + n, block_size)])
        first += n
    return documents


# --- rows -----------------------------------------------------------------------------------------------------------


def gather(x: Tensor, rows: Tensor, weights: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
    out = up(x)[rows.clamp(min=0).long()] * (rows >= 0)[:, None]
    return out if weights is None else out * up(weights)[slots.clamp(min=0).long()][:, None]


def scatter_add(x: Tensor, rows: Tensor, y: Tensor, base: Tensor | None = None) -> Tensor:
    """The new x."""
    out = up(x).clone()
    named = rows >= 0
    rows = rows[named].long()
    out[rows] = (out[rows] if base is None else up(base[named])) + up(y[named])
    return out


def gather_norm(
    x: Tensor,
    rows: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(y, s)"""
    s = up(x) if rows is None else gather(x, rows)
    if residual is not None:
        s = s + up(residual)
    y = s - s.mean(-1, keepdim=True) if norm == "layer" else s
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * up(weight)
    return y if bias is None else y + up(bias), s


# --- elementwise ----------------------------------------------------------------------------------------------------


def rotary(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None) -> Tensor:
    """The pairs (j, j + D / 2) as complex numbers, turned; zeros for padding."""
    half = x.shape[-1] // 2
    if rows is not None:
        named = (rows >= 0)[:, None]
        cos, sin = (table[rows.clamp(min=0).long()] * named for table in (cos, sin))
    c, s = up(cos)[:, None, :half], up(sin)[:, None, :half]
    a, b = up(x)[..., :half], up(x)[..., half:]
    return torch.cat((c * a - s * b, c * b + s * a), dim=-1)


def swiglu(gate: Tensor, up_: Tensor) -> Tensor:
    return up(gate) * torch.sigmoid(up(gate)) * up(up_)


# --- blocks ---------------------------------------------------------------------------------------------------------


def block_scores(
    q: Tensor,
    k: Tensor,
    documents: list[list[tuple[int, int]]],
    scale: float,
    normalize: bool,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(scores, map)"""
    heads = q.shape[1]
    q, k = up(q), up(k).repeat_interleave(heads // k.shape[1], dim=1)
    tokens = torch.arange(q.shape[0], device=q.device)
    seen = (tokens[:, None] >= tokens[None, :]) & (tokens[None, :] > tokens[:, None] - (window or len(tokens)))
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    s = (softcap * torch.tanh(s / softcap) if softcap else s).clamp(min=0).mean(0).where(seen, 0.0)
    blocks = sum(len(document) for document in documents)
    block_map = torch.zeros(blocks, blocks, dtype=_precision, device=q.device)
    first = 0
    for document in documents:
        for m, (i0, i1) in enumerate(document):
            for n, (j0, j1) in enumerate(document[: m + 1]):
                block_map[first + m, first + n] = s[i0:i1, j0:j1].max()
        first += len(document)
    if not (window and normalize):
        return _column_sums(block_map, documents, normalize), block_map
    terms = [
        sum(bool(seen[i0:i1, j0:j1].any()) for i0, i1 in document) for document in documents for j0, j1 in document
    ]
    return _column_sums(block_map, documents, False) / torch.tensor(terms, device=q.device), block_map


def _column_sums(block_map: Tensor, documents: list[list[tuple[int, int]]], normalize: bool) -> Tensor:
    scores = torch.zeros(block_map.shape[0], dtype=_precision, device=block_map.device)
    first = 0
    for document in documents:
        last = first + len(document)
        for n in range(first, last):
            scores[n] = block_map[n:last, n].sum() / ((last - n) if normalize else 1)
        first = last
    return scores


def predict(
    x: Tensor,
    queries: list[Tensor],
    keys: list[Tensor],
    documents: list[list[tuple[int, int]]],
    norm: str,
    pool: str,
    eps: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, yq, yk); queries and keys are the three matrices of each network."""
    x = up(x)
    power = x.square().mean(-1, keepdim=True) if norm == "rms" else x.var(-1, keepdim=True, correction=0)
    z = x / torch.sqrt(power + eps)

    def network(w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        a = torch.relu(torch.relu(z @ up(w1).T) @ up(w2).T)
        pooled = [a[i:j].mean(0) if pool == "mean" else a[i:j].amax(0) for document in documents for i, j in document]
        return torch.stack(pooled) @ up(w3).T

    yq, yk = network(*queries), network(*keys)
    return _column_sums(yq @ yk.T, documents, normalize), yq, yk


def hash_uniform(seed: int, index: int) -> float:
    """splitmix64 of (seed, index) in (0, 1)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    z ^= z >> 31
    return ((z >> 11) + 0.5) * 2.0**-53


def select(
    scores: Tensor,
    documents: list[list[tuple[int, int]]],
    mode: str,
    keep: float = 1.0,
    threshold: float = 0.0,
    always_first: int = 0,
    always_last: int = 0,
    seed: int = 0,
) -> tuple[list[int], list[float]]:
    """(kept block ids ascending, their weights)"""
    values = scores.tolist()  # float32 values, exactly
    keep = torch.tensor(keep, dtype=torch.float32).item()
    threshold = torch.tensor(threshold, dtype=torch.float32).item()
    kept: list[int] = []
    weights: dict[int, float] = {}
    first = 0
    for document in documents:
        n = len(document)
        ids = range(first, first + n)
        forced = {b for b in ids if b - first < always_first or first + n - b <= always_last}
        k = min(n, max(math.floor(keep * n + 0.5), len(forced), 1))
        if mode == "threshold":
            chosen = {b for b in ids if values[b] >= threshold} | forced
        elif mode == "budget":
            order = sorted(ids, key=lambda b: (b not in forced, -values[b], b))
            chosen = set(order[:k])
        elif mode == "poisson":
            chosen = {b for b in ids if hash_uniform(seed, b) < values[b]} | forced
            weights.update({b: 1 / values[b] for b in chosen - forced})
        else:
            certain = {b for b in ids if b in forced or values[b] >= 0.999}

            def rank(b: int) -> float:
                u, p = hash_uniform(seed, b), values[b]
                return (u / (1 - u)) / (p / (1 - p))

            order = sorted(ids, key=lambda b: (b not in forced, b not in certain, 0.0 if b in certain else rank(b), b))
            chosen = set(order[:k])
        kept += sorted(chosen)
        first += n
    return kept, [weights.get(b, 1.0) for b in kept]


def layout_of(kept: list[int], documents: list[list[tuple[int, int]]]) -> dict[str, list[int]]:
    """Rows, row slots, offsets, slots, cumulative lengths and the longest document of a kept list."""
    slots = [-1] * sum(len(document) for document in documents)
    rows: list[int] = []
    row_slots: list[int] = []
    offsets, cu_seqlens = [0], [0]
    block = 0
    for document in documents:
        for first, last in document:
            if block in kept:
                slots[block] = len(offsets) - 1
                row_slots += [slots[block]] * (last - first)
                rows += range(first, last)
                offsets.append(len(rows))
            block += 1
        cu_seqlens.append(len(rows))
    longest = max(b - a for a, b in itertools.pairwise(cu_seqlens))
    return {
        "slots": slots,
        "rows": rows,
        "row_slots": row_slots,
        "row_offsets": offsets,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": [longest],
    }


# --- attention ------------------------------------------------------------------------------------------------------


TILE = 128  # packed rows that one tile list speaks of
TileLists = list[list[int]]  # by slot: the earlier key tiles that a query tile sees, besides itself


def visible(
    cu_seqlens: list[int],
    device: torch.device | None = None,
    lists: TileLists | None = None,
    cu_seqlens_k: list[int] | None = None,
) -> Tensor:
    """bool [M, M], or [M, Mk] with separate keys: packed row i sees packed row j."""
    if cu_seqlens_k is not None:
        seen = torch.zeros(cu_seqlens[-1], cu_seqlens_k[-1], dtype=torch.bool)
        pairs = zip(itertools.pairwise(cu_seqlens), itertools.pairwise(cu_seqlens_k), strict=True)
        for (a, b), (c, d) in pairs:
            for i in range(b - a):
                seen[a + i, c : max(c, d - (b - a) + i + 1)] = True
        return seen.to(device)
    seen = torch.zeros(cu_seqlens[-1], cu_seqlens[-1], dtype=torch.bool)
    for d, (a, b) in enumerate(itertools.pairwise(cu_seqlens)):
        seen[a:b, a:b] = lists is None
        for tile in range(math.ceil((b - a) / TILE) if lists is not None else 0):
            first, last = a + tile * TILE, min(a + (tile + 1) * TILE, b)
            for other in [*lists[a // TILE + d + tile], tile]:
                seen[first:last, a + other * TILE : min(a + (other + 1) * TILE, b)] = True
    return torch.tril(seen).to(device)


@dataclass(frozen=True)
class Options:
    """What a model's attention may have. places: of packed rows [M] and of packed key rows [Mk], with a window."""

    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None  # [Hq]
    places: Tensor | None = None
    places_k: Tensor | None = None

    def capped(self, s: Tensor) -> Tensor:
        return self.softcap * torch.tanh(s / self.softcap) if self.softcap else s

    def near(self, seen: Tensor) -> Tensor:
        """`seen` bool [M, Mk], within the window."""
        if not self.window:
            return seen
        return seen & (self.places_k[None, :] > self.places[:, None] - self.window)


PLAIN = Options()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: list[int],
    scale: float,
    lists: TileLists | None = None,
    cu_seqlens_k: list[int] | None = None,
    options: Options = PLAIN,
) -> tuple[Tensor, Tensor]:
    """(out [M, Hq, D], lse [Hq, M]) of packed rows; 0 and -inf in rows that see nothing."""
    group = q.shape[1] // k.shape[1]
    q = up(q)
    k, v = (up(t).repeat_interleave(group, dim=1) for t in (k, v))
    s = options.capped(torch.einsum("ihd,jhd->hij", q, k) * scale)
    seen = options.near(visible(cu_seqlens, q.device, lists, cu_seqlens_k))
    s = s.masked_fill(~seen, -math.inf)
    if options.sinks is not None:  # a key that all see, with the value 0
        s = torch.cat((s, up(options.sinks)[:, None, None].expand(-1, s.shape[1], 1)), -1)
        v = torch.cat((v, torch.zeros_like(v[:1] if v.shape[0] else q[:1])))
        seen = torch.cat((seen, torch.ones_like(seen[:, :1] if seen.shape[1] else q[:, 0, :1].bool())), 1)
    p = torch.softmax(s.masked_fill(~seen.any(1, keepdim=True), 0.0), -1) * seen
    return torch.einsum("hij,jhd->ihd", p, v), torch.logsumexp(s, -1)


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: list[int],
    scale: float,
    key_weights: Tensor | None = None,
    row_slots: Tensor | None = None,
    lists: TileLists | None = None,
    cu_seqlens_k: list[int] | None = None,
    row_slots_k: Tensor | None = None,
    options: Options = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of packed rows by the header's formulas, with a given output and LSE."""
    hk = k.shape[1]
    group = q.shape[1] // hk
    dout, q, out, lse = (up(t) for t in (dout, q, out, lse))
    k, v = (up(t).repeat_interleave(group, dim=1) for t in (k, v))
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    p = torch.exp(options.capped(s) - lse[:, :, None])
    p = torch.where(options.near(visible(cu_seqlens, q.device, lists, cu_seqlens_k)), p, 0.0)
    ds = p * (torch.einsum("ihd,jhd->hij", dout, v) - (dout * out).sum(-1).T[:, :, None])
    w = torch.ones_like(p[0])
    if key_weights is not None:
        slots = row_slots.long()
        key_slots = slots if cu_seqlens_k is None else row_slots_k.long()
        w = up(key_weights)[key_slots][None, :].expand_as(w)
        w = torch.where(slots[:, None] == key_slots[None, :], 1.0, w)
    dv = torch.einsum("hij,ihd->jhd", w * p, dout)
    if options.softcap:
        ds = ds * (1 - torch.tanh(s / options.softcap).square())
    dq = scale * torch.einsum("hij,jhd->ihd", w * ds, k)
    dk = scale * torch.einsum("hij,ihd->jhd", w * ds, q)
    return dq, dk.unflatten(1, (hk, group)).sum(2), dv.unflatten(1, (hk, group)).sum(2)


def sink_gradient(dout: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """dsinks [Hq] by the header's formula, of packed rows."""
    return -(torch.exp(up(sinks)[:, None] - up(lse)) * (up(dout) * up(out)).sum(-1).T).sum(1)


# --- tiles ----------------------------------------------------------------------------------------------------------


def tiles_of(cu_seqlens: list[int]) -> list[tuple[int, int, int, int]]:
    """(slot, tile within its document, first packed row, packed row behind the last) of every tile."""
    return [
        (a // TILE + d + i, i, a + i * TILE, min(a + (i + 1) * TILE, b))
        for d, (a, b) in enumerate(itertools.pairwise(cu_seqlens))
        for i in range(math.ceil((b - a) / TILE))
    ]


def tile_scores(
    q: Tensor, k: Tensor, cu_seqlens: list[int], scale: float, probes: int, slots: int, width: int
) -> tuple[Tensor, Tensor]:
    """(scores, peaks), each [slots, width], of packed rows."""
    s = torch.einsum("ihd,jhd->hij", up(q), up(k).repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * scale
    p = torch.softmax(s.masked_fill(~visible(cu_seqlens, q.device), -math.inf), -1)
    tiles = tiles_of(cu_seqlens)
    scores, peaks = torch.zeros(2, slots, width, dtype=p.dtype, device=p.device)
    for slot, tile, first, last in tiles:
        rows = [first + (2 * r + 1) * (last - first) // (2 * probes) for r in range(probes)]
        mass = p[:, rows].mean(1)
        for other, n, start, end in tiles:
            if other - n == slot - tile:  # of the same document
                heads = mass[:, start:end].sum(1)
                scores[slot, n], peaks[slot, n] = heads.mean(), heads.amax()
    return scores, peaks


def select_tiles(
    scores: Tensor, masses: Tensor, cu_seqlens: list[int], rule: tuple[int, float, float, int, int]
) -> tuple[TileLists, list[float]]:
    """(lists, covered), both by slot, from scores and masses of all slots; rule: keys, density, mass, first, local."""
    keys, density, mass, first, local = rule
    density, mass = (torch.tensor(x, dtype=torch.float32).item() for x in (density, mass))
    lists: TileLists = [[] for _ in range(scores.shape[0])]
    covered = [0.0] * scores.shape[0]
    for slot, m, _, _ in tiles_of(cu_seqlens):
        values = [-math.inf if math.isnan(x) else x for x in scores[slot, : m + 1].tolist()]
        held = [0.0 if math.isnan(x) else x for x in masses[slot, : m + 1].tolist()]
        units = [math.floor(min(max(x, 0.0), 1.0) * 2**40) for x in held]
        limit = min(math.ceil(keys / TILE), math.floor(density * (m + 1) + 0.5))
        chosen = [n for n in range(m + 1) if n == m or n < first or m - n <= local]
        for n in sorted({*range(m)} - {*chosen}, key=lambda n: (-values[n], -n)):
            if len(chosen) >= limit or (mass < 1 and Fraction(sum(units[c] for c in chosen), 2**40) >= Fraction(mass)):
                break
            chosen.append(n)
        lists[slot] = sorted(set(chosen) - {m})
        covered[slot] = sum(units[c] for c in chosen) / 2**40
    return lists, covered


def transpose_lists(lists: TileLists, cu_seqlens: list[int]) -> TileLists:
    transposed: TileLists = [[] for _ in lists]
    for slot, m, _, _ in tiles_of(cu_seqlens):
        for n in lists[slot]:
            transposed[slot - m + n].append(m)
    return transposed


# --- loss -----------------------------------------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    ignore_index: int = -100,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss, a scalar."""
    hidden = up(hidden)
    z = hidden @ up(weight).T
    if lora_a is not None:
        z = z + lora_scale * (hidden @ up(lora_a).T) @ up(lora_b).T
    if bias is not None:
        z = z + up(bias)
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    valid = targets != ignore_index
    chosen = z.gather(1, torch.where(valid, targets, 0)[:, None])[:, 0]
    total = ((torch.logsumexp(z, -1) - chosen) * valid).sum()
    return total / valid.sum().clamp(min=1) if reduction == "mean" else total
