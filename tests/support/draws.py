"""Seeded inputs, and gradients of the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support import oracle
from torch import Tensor


class Draw:
    """Seeded inputs, the same on every device."""

    def __init__(self, device: str, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.generator) * scale
        return x.to(dtype or self.dtype).to(self.device)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).to(self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)


def grads(outputs: Sequence[Tensor], directions: Sequence[Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Oracle gradients of sum(outputs . directions)."""
    total = sum((out * oracle.up(d)).sum() for out, d in zip(outputs, directions, strict=True))
    return torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)


def leaf(x: Tensor) -> Tensor:
    return oracle.up(x.detach()).clone().requires_grad_()
