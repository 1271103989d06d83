"""Closed forms for the last matrices: where training starts, and where it resumes after pruning.

Without such a start, a few hundred steps on a few dozen documents learn position less well than the rule "keep the
earliest blocks" knows it, and that rule alone is hard to beat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.engine.layout import Blocks
from lemo.predictors.network import PredictorNetwork, visible_queries

_RIDGE = 1e-3  # of the mean diagonal of the normal equations
_REST = 0.1  # size of the other features relative to the solved one: room to learn, little noise before that


@torch.no_grad()
def fit_outputs(network: PredictorNetwork, pooled: dict[str, Tensor], exact: Tensor, blocks: Blocks) -> None:
    """Sets the first row of W3 by ridge regression on the pooled activations of both sides, in place.

    Predicted scores are I(n) = (sum of yq_m over the count_n blocks m >= n) . yk_n. With the first feature of every
    query near 1, the first feature of a key has to be exact(n) / count_n, and its errors weigh count_n in I(n).

    pooled: by side, p [nb, s]; exact: scores [nb] in the units of the predictions. A document's
    first block, always kept and often an outlier (attention sinks), does not count.
    """
    count = visible_queries(blocks)
    choice = torch.ones_like(count)
    choice[blocks.documents[:-1].long()] = 0
    targets = {"q": torch.ones_like(count), "k": exact / count}
    for side, target in targets.items():
        weight = count * choice if side == "k" else torch.ones_like(count)
        row = _solve(pooled[side], target[:, None], weight)[0]
        w3 = getattr(network, f"w{side}3")
        w3.mul_(_REST * row.norm() / w3.norm(dim=1).mean())
        w3[0] = row


@torch.no_grad()
def refit_outputs(
    network: PredictorNetwork, pooled: dict[str, Tensor], vectors: dict[str, Tensor], blocks: Blocks
) -> None:
    """Sets W3 so that block vectors are, as nearly as the hidden units that stay allow, what they were, in place.

    pooled: by side, p [nb, s] of the pruned network; vectors: by side, y [nb, c] before pruning.
    """
    count = visible_queries(blocks)
    for side, target in vectors.items():
        weight = count if side == "k" else torch.ones_like(count)
        getattr(network, f"w{side}3").copy_(_solve(pooled[side], target, weight))


def _solve(p: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Ridge regression: W [c, s] with weight * (p W^T - target) least in square. p [nb, s], target [nb, c]."""
    weight = weight.double()[:, None]
    p = p.double() * weight
    normal = p.T @ p
    normal.diagonal().add_(_RIDGE * normal.diagonal().mean() + 1e-12)
    return torch.linalg.solve(normal, p.T @ (target.double() * weight)).T.float()
