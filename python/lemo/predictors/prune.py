"""Elastic size (paper section 4.3): hidden units that ReLU leaves at zero most often are removed during training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lemo.predictors.network import PredictorNetwork

_MIN_UNITS = 8  # the kernels' granularity: fewer would be padded back to this


class Activity:
    """How often every hidden unit of a network fires: the share of tokens for which it is above zero, per side and
    hidden layer, averaged over what was observed since the last ``reset``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums: dict[tuple[str, int], Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def observe(self, side: str, first: Tensor, second: Tensor) -> None:
        """first [T, r], second [T, s]: hidden activations of side "q" or "k"."""
        for layer, a in ((1, first), (2, second)):
            share = (a > 0).float().mean(0)
            before = self.sums.get((side, layer))
            self.sums[side, layer] = share if before is None else before + share
        self.count += side == "q"

    def share(self, side: str, layer: int) -> Tensor:
        """float32 [units]"""
        return self.sums[side, layer] / max(self.count, 1)


def choose_units(
    activities: Sequence[Activity], remove: float, multiple: int = 1
) -> list[dict[tuple[str, int], Tensor]]:
    """Units that stay in every network when the share ``remove`` of all networks' units that fire least goes.

    One ranking over all layers of the model: a layer that needs few units ends smaller. Every hidden layer keeps at
    least 8 units; multiple: the numbers of units are rounded to multiples of it (the last pruning, before export pads
    them up). Returns sorted unit indices by (side, hidden layer).
    """
    if not 0.0 <= remove < 1.0:
        raise ValueError(f"remove: expected a share in [0, 1), got {remove}")
    everything = torch.cat([a.share(*key) for a in activities for key in a.sums])
    count = int(remove * everything.numel())
    bound = everything.sort().values[count - 1].item() if count else -1.0
    chosen = []
    for a in activities:
        kept: dict[tuple[str, int], Tensor] = {}
        for key in a.sums:
            share = a.share(*key)
            units = int((share > bound).sum())
            units = min(share.numel(), max(round(units / multiple) * multiple, _MIN_UNITS))
            kept[key] = share.argsort(descending=True, stable=True)[:units].sort().values
        chosen.append(kept)
    return chosen


@torch.no_grad()
def prune(network: PredictorNetwork, optimizer: torch.optim.Optimizer, kept: dict[tuple[str, int], Tensor]) -> None:
    """Keeps the given hidden units, in place. The optimizer's state of what stays is carried along."""
    for side in "qk":
        first, second = kept[side, 1], kept[side, 2]
        cuts = {f"w{side}1": (first, None), f"w{side}2": (second, first), f"w{side}3": (None, second)}
        for name, (rows, columns) in cuts.items():
            old: nn.Parameter = getattr(network, name)
            new = nn.Parameter(_cut(old.detach(), rows, columns))
            setattr(network, name, new)
            state = optimizer.state.pop(old, None)
            if state is not None:
                optimizer.state[new] = {
                    key: _cut(value, rows, columns) if isinstance(value, Tensor) and value.shape == old.shape else value
                    for key, value in state.items()
                }
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]


def _cut(w: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    w = w if rows is None else w[rows]
    return (w if columns is None else w[:, columns]).clone()
