"""What a step costs compared with the dense one, by counting products. No time is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lemo.engine.config import Mode, Recompute
from lemo.engine.families.base import OF_ATTENTION, ModelShape

# The backward pass of attention has five products of pairs, the forward pass two.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class PassShares:
    """What one pass computed.

    By layer: recompute (or one for all); kept, mlp_kept, shares of the tokens; density, shares of the pairs of tiles
    among them (empty: all pairs). again: how many layers, the first ones, run forward once more in the backward pass.
    """

    mode: Mode
    recompute: Recompute | Sequence[Recompute]
    kept: Sequence[float]
    mlp_kept: Sequence[float]
    density: Sequence[float] = ()
    again: int = 0


def cost_ratio(shape: ModelShape, lengths: Sequence[int], shares: PassShares) -> float:
    """Multiply-adds of a forward and backward pass with frozen weights, over those of the dense one with the same
    recomputation.

    lengths: tokens of every document. Counted are the projections, the pairs of attention and the head; adapters,
    norms and selection, which are small, are not. Kept tokens are taken to be spread evenly over documents, and the
    loss to be over as many as the layer with the most kept.
    """
    layers = len(shares.kept)
    every = PassShares("dense", shares.recompute, (1.0,) * layers, (1.0,) * layers, again=shares.again)
    return _cost(shape, lengths, shares) / _cost(shape, lengths, every)


def _cost(shape: ModelShape, lengths: Sequence[int], shares: PassShares) -> float:
    tokens, pairs = sum(lengths), sum(n * (n + 1) / 2 for n in lengths)
    per_pair = 2 * shape.heads * shape.head_dim
    exact = shares.mode == "backward"
    head = 1.0 if exact else max(*shares.kept, *shares.mlp_kept)
    total = 2.0 * tokens * head * shape.hidden * shape.vocab
    density = shares.density or (1.0,) * len(shares.kept)
    same = isinstance(shares.recompute, str)
    for i, (kept, mlp_kept, dense) in enumerate(zip(shares.kept, shares.mlp_kept, density, strict=True)):
        recompute = shares.recompute if same else shares.recompute[i]
        repeats = 0 if recompute == "none" else 1
        repeats_attention = 1 if recompute == "full" and not exact else 0
        attention, mlp = _products_of_a_row(shape.at(i))
        rows = tokens * (attention * kept + mlp * mlp_kept)
        some = pairs * kept**2 * dense * per_pair
        forward = tokens * (attention + mlp) + pairs * per_pair if exact else rows + some
        total += (
            (2 if i < shares.again else 1) * forward
            + (1 + repeats) * rows
            + (_ATTENTION_BACKWARD + repeats_attention) * some
        )
    return total


def _products_of_a_row(shape: ModelShape) -> tuple[int, int]:
    """Multiply-adds of the projections of attention and of the MLP, or of the router and the experts of a row."""
    sizes = {name: a * b for name, (a, b) in shape.projections.items()}
    attention = sum(size for name, size in sizes.items() if name in OF_ATTENTION)
    mlp = sum(sizes.values()) - attention
    if shape.experts is not None:
        mlp += shape.hidden * (shape.experts.count + 3 * shape.experts.per_token * shape.experts.ffn)
    return attention, mlp
