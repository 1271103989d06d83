"""The predictor of one layer as a torch module: the arithmetic of ``lemo.ops.predict``, differentiable.

Two networks without biases, one for queries and one for keys (paper section 4.3, eq. 3). With z the residual row scaled
to unit root mean square (RMS) or unit deviation (LAYER), per token t and block n:

    a_t = relu(W2 relu(W1 z_t));  p_n = mean or maximum of a_t over the block;  y_n = W3 p_n
    predicted block score I(m, n) = yq_m . yk_n;  informativeness I(n) = sum of I(m, n) over m >= n of the document
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lemo.engine.families.base import NormKind
from lemo.engine.layout import Blocks

WEIGHT_NAMES = ("wq1", "wq2", "wq3", "wk1", "wk2", "wk3")
Pool = Literal["mean", "max"]
NORMS: tuple[NormKind, ...] = get_args(NormKind)
POOLS: tuple[Pool, ...] = get_args(Pool)
ALIGNMENT = 8  # the CUDA kernels want every hidden and output size to be a multiple of this


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """The matrices of one layer: wq1 [rq, d], wq2 [sq, rq], wq3 [c, sq] and wk1 [rk, d], wk2 [sk, rk], wk3 [c, sk]."""

    wq1: Tensor
    wq2: Tensor
    wq3: Tensor
    wk1: Tensor
    wk2: Tensor
    wk3: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.wq1, self.wq2, self.wq3, self.wk1, self.wk2, self.wk3))

    @property
    def num_parameters(self) -> int:
        return sum(w.numel() for w in self)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerWeights:
        return LayerWeights(*(w.to(device=device, dtype=dtype).contiguous() for w in self))


class PredictorNetwork(nn.Module):
    """Trainable predictor of one layer.

    hidden_size: width d of the residual stream; rank: hidden units r of both hidden layers before pruning; features:
    length c of the block vectors; norm ("rms", "layer"), pool ("mean", "max"), eps, normalize: as for
    ``lemo.ops.predict``.
    generator: source of the initial weights (CPU), so that a run can be repeated.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        features: int,
        *,
        norm: NormKind = "rms",
        pool: Pool = "mean",
        eps: float = 1e-5,
        normalize: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("rank", rank), ("features", features)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        for name, choice, known in (("norm", norm, NORMS), ("pool", pool, POOLS)):
            if choice not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {choice!r}")
        self.norm, self.pool, self.eps, self.normalize = norm, pool, eps, normalize

        def weight(rows: int, columns: int, variance: float) -> nn.Parameter:
            return nn.Parameter(
                torch.randn(rows, columns, generator=generator, dtype=torch.float32) * (variance / columns) ** 0.5
            )

        for side in "qk":  # He initialization through the two ReLUs; block scores start near unit size
            self.register_parameter(f"w{side}1", weight(rank, hidden_size, 2.0))
            self.register_parameter(f"w{side}2", weight(rank, rank, 2.0))
            self.register_parameter(f"w{side}3", weight(features, rank, features**-0.5))

    def weights(self, side: str) -> tuple[Tensor, Tensor, Tensor]:
        """W1, W2, W3 of side "q" or "k" as the kernels take them (for "layer" the mean is folded into W1)."""
        w1, w2, w3 = (getattr(self, f"w{side}{i}") for i in (1, 2, 3))
        if self.norm == "layer":
            w1 = w1 - w1.mean(1, keepdim=True)
        return w1, w2, w3

    def apply_norm(self, x: Tensor) -> Tensor:
        """z [T, d] float32 of residual rows x [T, d]."""
        x = x.float()
        if self.norm == "rms":
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x * torch.rsqrt(x.var(-1, correction=0, keepdim=True) + self.eps)

    def hidden(self, z: Tensor, side: str) -> tuple[Tensor, Tensor]:
        """Both hidden activations [T, r] and [T, s], after their ReLU."""
        w1, w2, _ = self.weights(side)
        h = torch.relu(F.linear(z, w1))
        return h, torch.relu(F.linear(h, w2))

    def forward(self, x: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
        """Query and key vectors [nb, c] float32 of every block, from residual rows x [T, d]."""
        z = self.apply_norm(x)
        queries, keys = (self.pooled(self.hidden(z, side)[1], blocks, side) for side in "qk")
        return queries, keys

    def pooled(self, second: Tensor, blocks: Blocks, side: str) -> Tensor:
        """Block vectors y [nb, c] from the second hidden activation [T, s]."""
        return F.linear(self.pool_block(second, blocks), self.weights(side)[2])

    def pool_block(self, second: Tensor, blocks: Blocks) -> Tensor:
        """p [nb, s] from the second hidden activation [T, s]."""
        return _pool(second, blocks, self.pool)

    def scores(self, x: Tensor, blocks: Blocks) -> Tensor:
        """Predicted informativeness [nb] float32 of every block."""
        queries, keys = self(x, blocks)
        return informativeness(queries, keys, blocks, self.normalize)

    @torch.no_grad()
    def export(self) -> LayerWeights:
        """A float32 CPU copy of the weights, hidden and output sizes padded with zeros to multiples of 8."""
        padded = []
        for side in "qk":
            for i, w in enumerate(self.weights(side)):
                columns = w.shape[1] if i == 0 else -(-w.shape[1] // ALIGNMENT) * ALIGNMENT
                rows = -(-w.shape[0] // ALIGNMENT) * ALIGNMENT
                full = torch.zeros(rows, columns, dtype=torch.float32)
                full[: w.shape[0], : w.shape[1]] = w
                padded.append(full)
        return LayerWeights(*padded)


def _pool(a: Tensor, blocks: Blocks, pool: Pool) -> Tensor:
    """[nb, s] from token rows [T, s]."""
    nb, b = blocks.num_blocks, blocks.block_size
    sizes = None
    if blocks.num_tokens == nb * b:
        a = a.view(nb, b, -1)
    else:  # short blocks: pad with zeros, which neither a sum nor the maximum of ReLU outputs can see
        first = blocks.offsets[:-1].long()
        sizes = blocks.offsets[1:].long() - first
        inside = torch.arange(b, device=a.device)
        index = (first[:, None] + inside).clamp(max=blocks.num_tokens - 1)
        a = a[index] * (inside < sizes[:, None])[..., None]
    if pool == "max":
        return a.amax(1)
    return a.mean(1) if sizes is None else a.sum(1) / sizes[:, None]


def visible_queries(blocks: Blocks) -> Tensor:
    """float32 [nb]: number of blocks of the same document at or after each block, itself included."""
    block = torch.arange(blocks.num_blocks, device=blocks.device)
    ends = blocks.documents[1:].long()
    return (ends[torch.bucketize(block, ends, right=True)] - block).float()


def informativeness(queries: Tensor, keys: Tensor, blocks: Blocks, normalize: bool) -> Tensor:
    """Column sums [nb] of the predicted block map by a suffix sum of ``queries`` per document: no map is formed."""
    count = visible_queries(blocks)
    suffix = queries.flip(0).cumsum(0).flip(0)
    after = F.pad(suffix, (0, 0, 0, 1))[torch.arange(blocks.num_blocks, device=blocks.device) + count.long()]
    scores = ((suffix - after) * keys).sum(-1)
    return scores / count if normalize else scores
