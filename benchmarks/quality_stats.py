"""From the runs of a quality study to the rows of its results file, with intervals.

A row is compared with dense training at equal cost, and with the best of the rivals, in pairs: the same seed (data and
its order) and the same held-out windows or documents. Its effect is the mean difference over seeds, groups and items.
The interval is a t interval over seeds x documents: two variances add, that of the seeds' effects and that of the
documents' (each averaged over the seeds), with the degrees of freedom of Welch and Satterthwaite. With one seed there
is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Losses = Mapping[str, Mapping[str, Sequence[float]]]
CONFIDENCE = 0.95


# ---- intervals -------------------------------------------------------------------------------------------------------


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


def effect(
    mine: Mapping[int, Losses], other: Mapping[int, Losses], groups: Sequence[str], what: str, joint: bool
) -> tuple[float, float | None]:
    """Mean of `what` over seeds that both have, mine minus the other's, with half the interval's width."""
    seeds = sorted(set(mine) & set(other))
    if not seeds:
        raise ValueError("the two ways of training share no seed")
    differences = [
        [np.asarray(mine[s][g][what], float) - np.asarray(other[s][g][what], float) for g in groups] for s in seeds
    ]
    return interval(differences, joint)


def percent(value: tuple[float, float | None]) -> dict[str, float | None]:
    """A difference of losses as a change of perplexity, in percent, with the interval's ends."""
    mean, half = value
    ends = (None, None) if half is None else (mean - half, mean + half)
    of = {"gap": mean, "low": ends[0], "high": ends[1]}
    return {name: None if v is None else round(100 * math.expm1(v), 3) for name, v in of.items()}


def plain(value: tuple[float, float | None]) -> dict[str, float | None]:
    mean, half = value
    ends = (None, None) if half is None else (mean - half, mean + half)
    return {n: None if v is None else round(v, 5) for n, v in {"gap": mean, "low": ends[0], "high": ends[1]}.items()}


# ---- rows ------------------------------------------------------------------------------------------------------------


def measured_groups(setting: str, adapt: str, losses: Losses) -> list[str]:
    """The groups that a setting is about: in B the domain that is adapted to."""
    return [adapt] if setting == "B" else sorted(losses)


def compared(
    setting: str, adapt: str, mine: Mapping[int, Losses], other: Mapping[int, Losses]
) -> dict[str, dict[str, float | None]]:
    """What a row is, compared with another: perplexity in percent, and what else the setting asks."""
    names = sorted(next(iter(mine.values())))
    groups = measured_groups(setting, adapt, next(iter(mine.values())))
    joint = setting == "C"
    found = {"loss": percent(effect(mine, other, groups, "loss", joint))}
    if setting == "C":
        found["accuracy"] = plain(effect(mine, other, groups, "correct", joint))
    elsewhere = [n for n in names if n not in groups]
    if elsewhere:
        found["elsewhere"] = percent(effect(mine, other, elsewhere, "loss", joint))
    return found


def absolute(setting: str, adapt: str, mine: Mapping[int, Losses]) -> dict[str, Any]:
    """Means over seeds: of everything the setting is about, and by group."""
    groups = measured_groups(setting, adapt, next(iter(mine.values())))

    def mean(group: str, what: str) -> float:
        return float(np.mean([np.mean(losses[group][what]) for losses in mine.values()]))

    found: dict[str, Any] = {"mean_loss": round(float(np.mean([mean(g, "loss") for g in groups])), 5)}
    if setting == "C":
        found["mean_accuracy"] = round(float(np.mean([mean(g, "correct") for g in groups])), 4)
        found["accuracy_of"] = {g: round(mean(g, "correct"), 4) for g in groups}
    found["loss_of"] = {g: round(mean(g, "loss"), 5) for g in sorted(next(iter(mine.values())))}
    return found


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
