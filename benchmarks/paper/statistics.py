"""Means with their intervals, changes between paired runs, and the load at which a limit is reached."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy import stats

K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean and its 95 % interval, with NaN bounds for a single value."""

    value: float
    low: float
    high: float


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean over seeds with Student's t interval."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2:
        return Estimate(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5)
    return Estimate(mean, mean - half, mean + half)


def change(values: Sequence[float] | np.ndarray, base: Sequence[float] | np.ndarray) -> Estimate:
    """Percent by which `values` differ from `base`, paired by seed.

    It is the geometric mean of the ratios, which spread over orders of magnitude past a knee.
    """
    logs = estimate(np.log(np.asarray(values)) - np.log(np.asarray(base)))
    return Estimate(*(100 * (math.exp(min(x, 99.0)) - 1) for x in (logs.value, logs.low, logs.high)))


Search = Generator[float, float, float]
"""Generator that yields loads, is sent their measurements, and returns the load at which the limit is reached."""


def search_knee(
    start: float, limit: float, tolerance: float, factor: float = 1.5, bounds: tuple[float, float] = (0.25, 512)
) -> Search:
    """Bracket the knee from `start` on in steps of `factor`, then bisect to a relative width of `tolerance`.

    Returns:
        The load within the bracket where a line through the logarithms crosses the limit; NaN where even the lowest load is
        above it, infinity where the highest is not.
    """
    low = high = start
    at_low = at_high = yield start
    while at_low > limit:
        if low <= bounds[0]:
            return math.nan
        high, at_high = low, at_low
        low = max(low / factor, bounds[0])
        at_low = yield low
    while at_high <= limit:
        if high >= bounds[1]:
            return math.inf
        low, at_low = high, at_high
        high = min(high * factor, bounds[1])
        at_high = yield high
    while high / low > 1 + tolerance:
        middle = math.sqrt(low * high)
        measured = yield middle
        if measured > limit:
            high, at_high = middle, measured
        else:
            low, at_low = middle, measured
    part = math.log(limit / at_low) / math.log(at_high / at_low)
    return low * (high / low) ** part


def find_knees(searches: Mapping[K, Search], measure: Callable[[dict[K, float]], Mapping[K, float]]) -> dict[K, float]:
    """Drive several searches in step, so that the loads of a round can be measured side by side."""
    knees: dict[K, float] = {}
    loads = {key: next(search) for key, search in searches.items()}
    while loads:
        measured = measure(loads)
        following: dict[K, float] = {}
        for key in loads:
            try:
                following[key] = searches[key].send(measured[key])
            except StopIteration as stop:
                knees[key] = stop.value
        loads = following
    return {key: knees[key] for key in searches}
