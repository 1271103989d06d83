"""Statistics of the rows that the MLPs of a step computed, for families with an auxiliary loss (a router's balance)."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo.engine.records import SavedList


class RowStatistics:
    """Sums over rows, by layer; see `Family.auxiliary_loss`. Empty for families without statistics.

    total: float32 [L, S], all of them, with the graph that leads through the layers; dtotal: its gradient, in the
    backward pass.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self.total: Tensor | None = None
        self.dtotal: Tensor | None = None

    def __bool__(self) -> bool:
        return bool(self._sums)

    def add(self, layer: int, statistics: Tensor) -> None:
        """Statistics [M, S] of some of a layer's rows."""
        part = statistics.detach().sum(0, dtype=torch.float32)
        self._sums[layer] = part if layer not in self._sums else self._sums[layer] + part

    def sums(self, layers: int) -> Tensor:
        """float32 [layers, S]; zeros for layers whose MLP computed no row."""
        nothing = torch.zeros_like(next(iter(self._sums.values())))
        return torch.stack([self._sums.get(i, nothing) for i in range(layers)])

    def gradient(self, layer: int, saved: SavedList, chunk: slice) -> Tensor | None:
        """Gradient [m, S] of the statistics of m rows, weighted as everything else that the layer makes of a row."""
        if self.dtotal is None:
            return None
        d = self.dtotal[layer].expand(chunk.stop - chunk.start, -1)
        if saved.weights is None or saved.slots is None:
            return d
        return d * saved.weights.index_select(0, saved.slots[chunk].clamp(min=0))[:, None]
