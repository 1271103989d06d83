"""Scores of token blocks, exact and predicted, and the choice among them (paper sections 4.1 and 4.2).

T tokens in nb blocks of D documents: ``block_offsets`` int32 [nb + 1] (first token of every block) and ``documents``
int32 [D + 1] (first block of every document), as in ``lemo.engine.layout.Blocks``. No operation here is differentiable,
and no output requires a gradient.
Errors: ValueError naming the argument, what was expected and what was given; nothing is written then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lemo._native import call
from lemo.ops._schema import MODES, NORMS, POOLS, choice, define, need


def _select_out(
    scores: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    num_tokens: int,
    mode: str,
    keep: float,
    threshold: float,
    always_first: int,
    always_last: int,
    seed: int,
) -> tuple[Tensor, ...]:
    need("block_offsets", block_offsets, "nb+1")
    need("documents", documents, "D+1")
    nb = block_offsets.shape[0] - 1

    def integers(n: int) -> Tensor:
        return block_offsets.new_empty(n, dtype=torch.int32)

    weights = block_offsets.new_empty(nb, dtype=torch.float32)
    return (
        integers(nb),
        integers(nb),
        integers(nb + 1),
        integers(documents.shape[0]),
        integers(num_tokens),
        integers(num_tokens),
        weights,
        integers(4),
    )


def _select(
    scores: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    num_tokens: int,
    mode: str,
    keep: float,
    threshold: float,
    always_first: int,
    always_last: int,
    seed: int,
) -> tuple[Tensor, ...]:
    number = choice("mode", mode, MODES)
    outputs = _select_out(
        scores, block_offsets, documents, block_size, num_tokens, mode, keep, threshold, always_first, always_last, seed
    )
    names = ("kept", "slots", "row_offsets", "cu_seqlens", "rows", "row_slots", "weights", "info")
    arguments = {
        "scores": scores,
        "offsets": block_offsets,
        "documents": documents,
        "block_size": block_size,
        "mode": number,
        "keep": keep,
        "threshold": threshold,
        "always_first": always_first,
        "always_last": always_last,
        "seed": seed % 2**64,
        **dict(zip(names, outputs, strict=True)),
    }
    call("select", scores.device, arguments)
    return outputs


def _scores_out(
    q: Tensor,
    k: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    scale: float,
    normalize: bool,
    want_map: bool,
) -> tuple[Tensor, Tensor]:
    need("block_offsets", block_offsets, "nb+1")
    nb = block_offsets.shape[0] - 1
    size = (nb, nb) if want_map else (0, 0)
    return q.new_empty(nb, dtype=torch.float32), q.new_empty(size, dtype=torch.float32)


def _scores(
    q: Tensor,
    k: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    scale: float,
    normalize: bool,
    want_map: bool,
) -> tuple[Tensor, Tensor]:
    scores, block_map = _scores_out(q, k, block_offsets, documents, block_size, scale, normalize, want_map)
    arguments = {
        "q": q,
        "k": k,
        "offsets": block_offsets,
        "documents": documents,
        "block_size": block_size,
        "scale": scale,
        "normalize": normalize,
        "scores": scores,
        "map": block_map if want_map else None,
    }
    call("scores", q.device, arguments)
    return scores, block_map


def _predict_out(
    x: Tensor,
    wq1: Tensor,
    wq2: Tensor,
    wq3: Tensor,
    wk1: Tensor,
    wk2: Tensor,
    wk3: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    norm: str,
    pool: str,
    eps: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    need("block_offsets", block_offsets, "nb+1")
    need("wq3", wq3, "c s")
    nb, c = block_offsets.shape[0] - 1, wq3.shape[0]
    new = x.new_empty
    return new(nb, dtype=torch.float32), new(nb, c, dtype=torch.float32), new(nb, c, dtype=torch.float32)


def _predict(
    x: Tensor,
    wq1: Tensor,
    wq2: Tensor,
    wq3: Tensor,
    wk1: Tensor,
    wk2: Tensor,
    wk3: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    norm: str,
    pool: str,
    eps: float,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _predict_out(
        x, wq1, wq2, wq3, wk1, wk2, wk3, block_offsets, documents, block_size, norm, pool, eps, normalize
    )
    arguments = {
        "x": x,
        "wq1": wq1,
        "wq2": wq2,
        "wq3": wq3,
        "wk1": wk1,
        "wk2": wk2,
        "wk3": wk3,
        "offsets": block_offsets,
        "documents": documents,
        "block_size": block_size,
        "norm": choice("norm", norm, NORMS),
        "pool": choice("pool", pool, POOLS),
        "eps": eps,
        "normalize": normalize,
        **dict(zip(("scores", "queries", "keys"), outputs, strict=True)),
    }
    call("predict", x.device, arguments)
    return outputs


define(
    "select_blocks(Tensor scores, Tensor block_offsets, Tensor documents, int block_size, SymInt num_tokens, str mode, "
    "float keep, float threshold, int always_first, int always_last, int seed) -> (Tensor kept, Tensor slots, "
    "Tensor row_offsets, Tensor cu_seqlens, Tensor rows, Tensor row_slots, Tensor weights, Tensor info)",
    _select,
    _select_out,
    derivative="none",
)
define(
    "block_scores(Tensor q, Tensor k, Tensor block_offsets, Tensor documents, int block_size, float scale, "
    "bool normalize, bool want_map) -> (Tensor scores, Tensor map)",
    _scores,
    _scores_out,
    derivative="none",
)
define(
    "predict(Tensor x, Tensor wq1, Tensor wq2, Tensor wq3, Tensor wk1, Tensor wk2, Tensor wk3, Tensor block_offsets, "
    "Tensor documents, int block_size, str norm, str pool, float eps, bool normalize) -> (Tensor scores, "
    "Tensor queries, Tensor keys)",
    _predict,
    _predict_out,
    derivative="none",
)


def select_blocks(
    scores: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    num_tokens: int,
    mode: str,
    keep: float,
    threshold: float,
    always_first: int,
    always_last: int,
    seed: int,
) -> tuple[Tensor, ...]:
    """Chooses blocks; the list stays on the device, in buffers of capacity nb and T (cut by ``engine.layout.select``).

    scores float32 [nb] (modes "sample" and "poisson": probabilities in (0, 1]). mode "threshold" keeps scores >=
    threshold; "budget" the min(n, max(floor(keep n + 1/2), forced, 1)) highest of the n blocks of each document, ties
    to the lower block; "sample" as many by Pareto sampling; "poisson" every block with its own probability,
    independently of the others, possibly none. The first ``always_first`` and last ``always_last`` blocks of a document
    are forced.

    Returns, with K kept blocks and M kept tokens: kept int32 [nb] (ascending, -1 from K on), slots int32 [nb] (position
    in kept or -1), row_offsets int32 [nb + 1] (M from K on), cu_seqlens int32 [D + 1], rows int32 [T] and row_slots
    int32 [T] (-1 from M on), weights float32 [nb] ("poisson": 1/p, else 1; 0 from K on), info int32 [4] = (K, M,
    longest document in packed rows, fault). A fault (1 + first block whose score is not finite, or -1: nothing kept) is
    a FloatingPointError on the CPU and only this number, with K = M = 0, on CUDA.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed: expected an integer in [0, 2**64), got {seed}")
    signed = seed if seed < 2**63 else seed - 2**64  # a schema's int has 64 bits and a sign
    return torch.ops.lemo.select_blocks(
        scores,
        block_offsets,
        documents,
        block_size,
        num_tokens,
        mode,
        keep,
        threshold,
        always_first,
        always_last,
        signed,
    )


def block_scores(
    q: Tensor,
    k: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    scale: float,
    normalize: bool = False,
    want_map: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Exact informativeness of blocks (paper eq. 2): (scores float32 [nb], map float32 [nb, nb] or None).

    q [T, Hq, D], k [T, Hk, D] with position embedding. S_ij = mean over heads of max(scale q_i.k_j, 0) for j <= i of
    the same document; map[m, n] = max of S over queries in m and keys in n; scores[n] = sum over m >= n of map[m, n],
    divided by the number of such m with ``normalize``. Memory is linear in T unless the map is wanted.
    """
    scores, block_map = torch.ops.lemo.block_scores(
        q, k, block_offsets, documents, block_size, scale, normalize, want_map
    )
    return scores, block_map if want_map else None


def predict(
    x: Tensor,
    wq1: Tensor,
    wq2: Tensor,
    wq3: Tensor,
    wk1: Tensor,
    wk2: Tensor,
    wk3: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    norm: str = "rms",
    pool: str = "mean",
    eps: float = 1e-6,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted informativeness from the residual stream (paper eq. 3): float32 (scores [nb], queries, keys [nb, c]).

    x [T, d]; w*1 [r, d], w*2 [s, r], w*3 [c, s] in the dtype of x (on CUDA r, s and c are multiples of 8).
    z = x / sqrt(mean(x^2) + eps) ("rms"; "layer": the variance about the mean, the mean is NOT subtracted: fold that
    into w1); a = relu(w2 relu(w1 z)) per token; pooled over the block ("mean" or "max"); y = w3 pooled. scores[n] = sum
    over blocks m >= n of the document of queries[m] . keys[n], divided by the number of such m with ``normalize``.
    """
    return torch.ops.lemo.predict(
        x, wq1, wq2, wq3, wk1, wk2, wk3, block_offsets, documents, block_size, norm, pool, eps, normalize
    )
