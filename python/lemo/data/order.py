"""Orders that depend on a seed alone: the same on every machine and with every version of numpy."""

from __future__ import annotations

import numpy as np


def draws(seed: int, stream: int, first: int, count: int) -> np.ndarray:
    """uint64 [count]: numbers first, first + 1, ... of (seed, stream), by splitmix64."""
    with np.errstate(over="ignore"):
        golden = np.uint64(0x9E3779B97F4A7C15)
        start = np.uint64((seed * 0xD1342543DE82EF95 + stream * 0x2545F4914F6CDD1D) % 2**64)
        z = start + np.arange(first + 1, first + 1 + count, dtype=np.uint64) * golden
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permutation(seed: int, stream: int, count: int) -> np.ndarray:
    """A fixed permutation of 0..count-1 for each (seed, stream). int64 [count]."""
    return np.argsort(draws(seed, stream, 0, count), kind="stable")
