"""Thresholds per layer: the paper's Algorithm 1, with a target for the share of blocks that is kept.

Algorithm 1 starts from the mean score of the layer's blocks, T_l = mean(scores_l), and climbs the accuracy:
T_l += eta * G_l with G_l = (acc(T_l + eps) - acc(T_l - eps)) / (2 eps). Accuracy never falls when more is kept, so as
printed it lowers every threshold for ever. Here it climbs the Lagrangian of the problem "most accuracy at the wanted
share of kept blocks" instead,

    J_l(T) = acc_l(T) - price * kept_l(T),     price += rate * (mean over layers of kept_l - target),

where acc_l(T) is the share of the layer's exact informativeness that its kept blocks hold, and kept_l(T) the share of
blocks kept. Where it settles, a block at the threshold is worth the same in every layer: layers whose informativeness
sits in few blocks end with fewer of them. What the ascent leaves of the distance to the target is removed by one shift
common to all layers (in units of the layer's deviation), found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def search_thresholds(
    predicted: Sequence[Tensor],
    exact: Sequence[Tensor],
    forced: Sequence[Tensor],
    keep: float,
    *,
    rounds: int = 200,
    eps: float = 0.25,
    eta: float = 0.5,
    rate: float = 0.5,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Thresholds of all layers that keep the share ``keep`` of blocks on average, and the share each layer keeps.

    predicted, exact: per layer, scores float [N] of the same N blocks of held-out text; forced: per layer, bool [N],
    the blocks kept whatever they score. eps, eta: in deviations of the layer's predicted scores, as thresholds move
    on that scale; rate: of the price.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep}")
    p = torch.stack([s.double().cpu() for s in predicted])
    e = torch.stack([s.double().cpu() for s in exact])
    f = torch.stack([s.cpu() for s in forced])
    if not (p.isfinite().all() and e.isfinite().all()):
        raise FloatingPointError("predicted, exact: expected finite scores")
    mean, deviation = p.mean(1, keepdim=True), p.std(1, keepdim=True, correction=0).clamp_min(1e-12)
    z = (p - mean) / deviation
    value = e / e.sum(1, keepdim=True).clamp_min(1e-300)

    def kept(t: Tensor) -> Tensor:
        return ((z >= t[:, None]) | f).double()

    def objective(t: Tensor, price: float) -> Tensor:
        k = kept(t)
        return (k * value).sum(1) - price * k.mean(1)

    t = torch.zeros(len(p), dtype=torch.float64)  # the mean score, Algorithm 1's start
    price = 1.0  # what a block of average informativeness is worth
    for step in range(rounds):
        slope = (objective(t + eps, price) - objective(t - eps, price)) / (2 * eps)
        t = (t + eta * slope).clamp(float(z.min()) - 1, float(z.max()) + 1)
        price += rate * (1 - step / rounds) * float(kept(t).mean() - keep)

    low, high = float(z.min() - t.max()) - 1, float(z.max() - t.min()) + 1  # everything kept .. only what is forced
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(kept(t + middle).mean()) >= keep else (low, middle)
    # Of the two sides of the last jump, the nearer.
    shift = min((low, high), key=lambda s: abs(float(kept(t + s).mean()) - keep))
    shares = kept(t + shift).mean(1)
    thresholds = mean[:, 0] + (t + shift) * deviation[:, 0]
    return tuple(thresholds.tolist()), tuple(shares.tolist())
