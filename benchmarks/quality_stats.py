"""From the runs of a quality study to the rows of its results file, with intervals.

A row is compared with dense training at equal cost, and with the best of the rivals, in pairs: the same seed (data and
its order) and the same held-out windows or documents. Its effect is the mean difference over seeds, groups and items.
The interval is a t interval over seeds x documents: two variances add, that of the seeds' effects and that of the
documents' (each averaged over the seeds), with the degrees of freedom of Welch and Satterthwaite. With one seed there
is no interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lemo.study.statistics import interval, pareto, percent, t_quantile, verdict

__all__ = ["absolute", "compared", "effect", "interval", "pareto", "percent", "plain", "t_quantile", "verdict"]

Losses = Mapping[str, Mapping[str, Sequence[float]]]


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


def plain(value: tuple[float, float | None]) -> dict[str, float | None]:
    mean, half = value
    ends = (None, None) if half is None else (mean - half, mean + half)
    return {n: None if v is None else round(v, 5) for n, v in {"gap": mean, "low": ends[0], "high": ends[1]}.items()}


# ---- rows ------------------------------------------------------------------------------------------------------------


def losses_of(row: Mapping[str, Any]) -> dict[int, Losses]:
    """What the final runs of a results file's row measured, by seed: `compared` makes the intervals of it again."""
    return {int(seed): losses for seed, losses in row["losses"].items()}


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
