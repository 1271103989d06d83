"""Thresholds per layer: the paper's Algorithm 1, with a target for the share of blocks that is kept.

Algorithm 1 starts from the mean score of the layer's blocks, T_l = mean(scores_l), and climbs the accuracy:
T_l += eta * G_l with G_l = (acc(T_l + eps) - acc(T_l - eps)) / (2 eps). Accuracy never falls when more is kept, so as
printed it lowers every threshold forever. Here it climbs the Lagrangian of the problem "most accuracy at the wanted
share of kept blocks" instead,

    J_l(T) = acc_l(T) - price * kept_l(T),     price += rate * (mean over layers of kept_l - target),

where acc_l(T) is the share of the layer's exact informativeness that its kept blocks hold (forced blocks apart) and
kept_l(T) the share of blocks kept. Where it settles, a block at the threshold is worth the same in every layer: layers
with their informativeness in few blocks end with fewer of them. What the ascent leaves of the distance to the target is
removed by one shift common to all layers, found by bisection. Thresholds move on the scale of ranks (the share of the
layer's blocks that score less), which outliers cannot stretch; the result is in units of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def search_thresholds(
    predicted: Sequence[Tensor],
    exact: Sequence[Tensor],
    forced: Sequence[Tensor],
    keep: float,
    *,
    rounds: int = 200,
    eps: float = 0.05,
    eta: float = 0.1,
    rate: float = 0.5,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Thresholds of all layers that keep the share ``keep`` of blocks on average, and the share each layer keeps.

    predicted, exact: per layer, scores float [N] of the same N blocks of held-out text; forced: per layer, bool [N],
    the blocks kept whatever they score. eps, eta: in shares of the layer's blocks, as thresholds move on
    the scale of ranks; rate: of the price.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep}")
    p = torch.stack([s.double().cpu() for s in predicted])
    e = torch.stack([s.double().cpu() for s in exact])
    f = torch.stack([s.cpu() for s in forced])
    if not (p.isfinite().all() and e.isfinite().all()):
        raise FloatingPointError("predicted, exact: expected finite scores")
    blocks = p.shape[1]
    ordered, order = p.sort(dim=1, stable=True)
    rank = torch.empty_like(p).scatter_(1, order, torch.arange(blocks, dtype=p.dtype).expand_as(p) / blocks)
    # Forced blocks are always kept and excluded here; the first may hold most of the informativeness (attention sinks).
    value = e * ~f
    value = value / value.sum(1, keepdim=True).clamp_min(1e-300)

    def kept(t: Tensor) -> Tensor:
        return ((rank >= t[:, None]) | f).double()

    def objective(t: Tensor, price: float) -> Tensor:
        k = kept(t)
        return (k * value).sum(1) - price * k.mean(1)

    t = (p < p.mean(1, keepdim=True)).double().mean(1)  # the mean score, Algorithm 1's start
    price = 1.0  # what a block of average informativeness is worth
    for step in range(rounds):
        slope = (objective(t + eps, price) - objective(t - eps, price)) / (2 * eps)
        t = (t + eta * slope).clamp(0.0, 1.0)
        price += rate * (1 - step / rounds) * float(kept(t).mean() - keep)

    t = _shifted_to(t, kept, keep)
    thresholds = _in_units_of_scores(t, ordered)
    shares = ((p >= thresholds[:, None]) | f).double().mean(1)
    return tuple(thresholds.tolist()), tuple(shares.tolist())


def _shifted_to(t: Tensor, kept: Callable[[Tensor], Tensor], keep: float) -> Tensor:
    """Thresholds (ranks) [L] shifted by what all layers have in common, so that they keep the share `keep`."""

    def shifted(by: float) -> Tensor:
        return (t + by).clamp(0.0, 1.0)

    low, high = -1.0, 1.0  # everything kept .. only what is forced
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(kept(shifted(middle)).mean()) >= keep else (low, middle)
    # Of the two sides of the last jump, the nearer.
    return shifted(min((low, high), key=lambda by: abs(float(kept(shifted(by)).mean()) - keep)))


def _in_units_of_scores(t: Tensor, ordered: Tensor) -> Tensor:
    """Ranks [L] as scores, given each layer's scores in ascending order [L, N]."""
    blocks = ordered.shape[1]
    # Between the last block left out and the first one kept, so that rounding of scores decides nothing.
    first = (t * blocks).ceil().long()
    above = ordered.gather(1, first.clamp(max=blocks - 1)[:, None])[:, 0]
    below = ordered.gather(1, (first - 1).clamp(min=0)[:, None])[:, 0]
    beyond = ordered[:, -1] + (ordered[:, -1].abs() + 1) * 1e-3
    thresholds = torch.where(first >= blocks, beyond, (above + below) / 2)
    return torch.where(first == 0, ordered[:, 0], thresholds)
