"""Combinations of a test's parameters, without those that only repeat what others show."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairs(*values: Sequence[Any], of: int = 2) -> list[tuple[Any, ...]]:
    """Few of the combinations, in which any two parameters meet with all of their values (of=3: any three).

    Most faults of combinations need two parameters. Full products are for parameters whose code is entangled.
    """

    def parts(combination: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(combination), of))

    every = list(itertools.product(*(range(len(v)) for v in values)))
    missing = set().union(*(parts(c) for c in every))
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda c: len(parts(c) & missing)))
        missing -= parts(chosen[-1])
    return [tuple(v[i] for v, i in zip(values, c, strict=True)) for c in sorted(chosen)]
