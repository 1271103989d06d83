"""The PyTorch compositions that lemo's operations replace, as a user would write them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def gather_norm(x: Tensor, rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.index_select(0, rows), (x.shape[1],), weight, eps)


def scatter_add_(x: Tensor, rows: Tensor, y: Tensor) -> Tensor:
    return x.index_add_(0, rows, y)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
    """Causal attention of one document, [M, H, D]; with rows, gathered to packed storage first."""
    if rows is not None:
        q, k, v = (t.index_select(0, rows) for t in (q, k, v))
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 2048) -> tuple[Tensor, Tensor]:
    """(loss, dhidden), chunk by chunk, gradients computed at once."""
    dhidden = torch.empty_like(hidden)
    total = torch.zeros((), device=hidden.device)
    for first in range(0, hidden.shape[0], rows):
        part = slice(first, first + rows)
        h = hidden[part].detach().requires_grad_()
        loss = F.cross_entropy(F.linear(h, weight).float(), targets[part], reduction="sum") / hidden.shape[0]
        (dhidden[part],) = torch.autograd.grad(loss, h)
        total += loss.detach()
    return total, dhidden


def block_scores(q: Tensor, k: Tensor, block: int, scale: float, rows: int = 1024) -> Tensor:
    """Column sums of block maxima for one document of whole blocks, a strip of query rows at a time."""
    tokens, heads, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1).transpose(0, 1)
    scores = torch.zeros(tokens // block, device=q.device)
    for first in range(0, tokens, rows):
        last = min(first + rows, tokens)
        s = torch.zeros(last - first, last, device=q.device)
        for h in range(heads):
            s += F.relu(q[first:last, h] @ k[h, :last].T)
        s = torch.tril(s, diagonal=first) * (scale / heads)
        scores[: last // block] += s.view((last - first) // block, block, last // block, block).amax((1, 3)).sum(0)
    return scores


def select(scores: Tensor, block: int, keep: float) -> Tensor:
    """Token rows of the highest blocks, ascending."""
    kept = torch.topk(scores, int(keep * scores.shape[0] + 0.5)).indices.sort().values
    return (kept[:, None] * block + torch.arange(block, device=scores.device)).flatten()


def predict(x: Tensor, networks: list[list[Tensor]], block: int, eps: float) -> Tensor:
    z = F.rms_norm(x, (x.shape[1],), None, eps)
    yq, yk = (
        F.linear(F.relu(F.linear(F.relu(F.linear(z, w1)), w2)).unflatten(0, (-1, block)).mean(1), w3)
        for w1, w2, w3 in networks
    )
    return torch.tril(yq.float() @ yk.float().T).sum(0)
