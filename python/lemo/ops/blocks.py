"""Scores of token blocks, exact and predicted, and the choice among them (paper sections 4.1 and 4.2).

T tokens in nb blocks of D documents: ``block_offsets`` int32 [nb + 1] (first token of every block) and ``documents``
int32 [D + 1] (first block of every document), as in ``lemo.engine.layout.Blocks``. No operation here is differentiable,
and no output requires a gradient.
Errors: ValueError naming the argument, what was expected and what was given; nothing is written then.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lemo._native import constant
from lemo.ops._operator import Norm, Pool, SelectMode, Size, Uint64, need, operator


class SelectInfo(NamedTuple):
    """What ``select_blocks`` reports in ``info``."""

    kept_blocks: int
    kept_rows: int
    longest_document: int  # in packed rows
    fault: int  # 0, 1 + the first block with an unusable score, or -1 if nothing is kept

    @classmethod
    def read(cls, info: Tensor) -> SelectInfo:
        """Waits for the device if ``info`` lies on one."""
        numbers = info.tolist()
        return cls(*(numbers[constant(f"LEMO_INFO_{name.upper()}")] for name in cls._fields))


@operator(
    "kept slots row_offsets cu_seqlens rows row_slots weights info",
    calls="select",
    renamed={"block_offsets": "offsets"},
    derivative="none",
)
def select_blocks(
    scores: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    num_tokens: Size,
    mode: SelectMode,
    keep: float,
    threshold: float,
    always_first: int,
    always_last: int,
    seed: Uint64,
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
    need("block_offsets", block_offsets, "nb+1")
    need("documents", documents, "D+1")
    nb = block_offsets.shape[0] - 1
    sizes = (nb, nb, nb + 1, documents.shape[0], num_tokens, num_tokens)
    lists = (block_offsets.new_empty(size, dtype=torch.int32) for size in sizes)
    weights = block_offsets.new_empty(nb, dtype=torch.float32)
    return *lists, weights, block_offsets.new_empty(len(SelectInfo._fields), dtype=torch.int32)


@operator("scores map", calls="scores", renamed={"block_offsets": "offsets"}, derivative="none")
def block_scores(
    q: Tensor,
    k: Tensor,
    block_offsets: Tensor,
    documents: Tensor,
    block_size: int,
    scale: float,
    normalize: bool = False,
    want_map: bool = False,
    *,
    window: Size = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Exact informativeness of blocks (paper eq. 2): (scores float32 [nb], map float32 [nb, nb] or None).

    q [T, Hq, D], k [T, Hk, D] with position embedding. S_ij = mean over heads of max(scale q_i.k_j, 0) for j <= i of
    the same document; map[m, n] = max of S over queries in m and keys in n; scores[n] = sum over m >= n of map[m, n],
    divided by the number of such m with ``normalize``. Memory is linear in T unless the map is wanted.

    window w > 0 (CPU only): S_ij is 0 also if j <= i - w, and ``normalize`` counts the m that the window lets see n.
    softcap c > 0 (CPU only): scale q_i.k_j becomes c tanh(scale q_i.k_j / c).
    """
    need("block_offsets", block_offsets, "nb+1")
    nb = block_offsets.shape[0] - 1
    block_map = q.new_empty(nb, nb, dtype=torch.float32) if want_map else None
    return q.new_empty(nb, dtype=torch.float32), block_map


@operator("scores queries keys", renamed={"block_offsets": "offsets"}, derivative="none")
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
    norm: Norm = "rms",
    pool: Pool = "mean",
    eps: float = 1e-6,
    normalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted informativeness from the residual stream (paper eq. 3): float32 (scores [nb], queries, keys [nb, c]).

    x [T, d]; w*1 [r, d], w*2 [s, r], w*3 [c, s] in the dtype of x (on CUDA r, s and c are multiples of 8).
    z = x / sqrt(mean(x^2) + eps) ("rms"; "layer": the variance about the mean, the mean is NOT subtracted: fold that
    into w1); a = relu(w2 relu(w1 z)) per token; pooled over the block ("mean" or "max"); y = w3 pooled. scores[n] = sum
    over blocks m >= n of the document of queries[m] . keys[n], divided by the number of such m with ``normalize``.
    """
    need("block_offsets", block_offsets, "nb+1")
    need("wq3", wq3, "c s")
    nb, c = block_offsets.shape[0] - 1, wq3.shape[0]
    new = x.new_empty
    return new(nb, dtype=torch.float32), new(nb, c, dtype=torch.float32), new(nb, c, dtype=torch.float32)
