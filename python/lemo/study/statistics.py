"""Comparing ways of training: intervals over seeds and held-out items, in pairs, and the front of quality and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

CONFIDENCE = 0.95


def t_quantile(p: float, df: float) -> float:
    """Of Student's distribution, for p in (0.5, 1): its density integrated, and the integral inverted by halving."""
    factor = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)

    def below(x: float) -> float:
        # Substituted by x = sqrt(df) tan(u), the density is a power of the cosine: smooth, however heavy the tail.
        u = np.linspace(0.0, math.atan(x / math.sqrt(df)), 2001)
        y = np.cos(u) ** (df - 1)
        return 0.5 + factor * math.sqrt(df) * float(np.sum((y[1:] + y[:-1]) * np.diff(u)) / 2)

    low, high = 0.0, 1.0
    while below(high) < p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < p else (low, middle)
    return (low + high) / 2


def interval(differences: Sequence[Sequence[np.ndarray]], joint: bool) -> tuple[float, float | None]:
    """Mean of differences [seed][group] [item] and half the width of its interval; None with one seed.

    joint: item i of every group is of one document (questions about it), so that groups are not independent.
    """
    seeds, groups = len(differences), len(differences[0])
    by_seed = np.array([np.mean([g.mean() for g in of_seed]) for of_seed in differences])
    mean = float(by_seed.mean())
    if seeds < 2:
        return mean, None
    by_group = [np.mean([of_seed[g] for of_seed in differences], axis=0) for g in range(groups)]
    if joint:
        by_group = [np.mean(by_group, axis=0)]
    of_seeds = float(by_seed.var(ddof=1)) / seeds
    # One window of a domain has no spread: it adds none, and the interval is over the seeds alone.
    spread = [g for g in by_group if len(g) > 1]
    of_items = sum(float(g.var(ddof=1)) / len(g) for g in spread) / len(by_group) ** 2
    free = sum(len(g) - 1 for g in spread)
    total = of_seeds + of_items
    if total == 0.0:
        return mean, 0.0
    df = total**2 / (of_seeds**2 / (seeds - 1) + (of_items**2 / free if free else 0.0))
    return mean, t_quantile((1 + CONFIDENCE) / 2, df) * math.sqrt(total)


def paired_bootstrap(differences: np.ndarray, weights: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """Percentile interval of the weighted mean of differences [seed, item]: seeds and items are both drawn again, with
    replacement. weights [item]: tokens. The draws are the same in every call.

    With a handful of seeds it is too narrow (their spread is estimated from what is there); `interval` is not.
    """
    rng = np.random.default_rng(0)
    seeds, items = differences.shape
    # How often each is drawn, rather than which: products instead of loops.
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    of_items = rng.multinomial(items, np.full(items, 1 / items), size=draws) * weights
    means = np.einsum("ds,si,di->d", of_seeds, differences, of_items, optimize=True) / of_items.sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def percent(value: tuple[float, float | None]) -> dict[str, float | None]:
    """A difference of losses as a change of perplexity, in percent, with the interval's ends."""
    mean, half = value
    ends = (None, None) if half is None else (mean - half, mean + half)
    of = {"gap": mean, "low": ends[0], "high": ends[1]}
    return {name: None if v is None else round(100 * math.expm1(v), 3) for name, v in of.items()}


def verdict(against: Mapping[str, float | None]) -> str:
    """Of an interval of loss changes: better, worse, or equal if it holds 0; "one seed" and "diverged" have none."""
    low, high = against["low"], against["high"]
    if low is None or high is None:
        return "one seed"
    if math.isnan(low) or math.isnan(high):
        return "diverged"
    return "better" if high < 0 else "worse" if low > 0 else "equal"


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points (cost, loss) no other one beats, in order of cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front
