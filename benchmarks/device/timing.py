"""Wall time of device work: many dispatches, one wait, the median of some repeats."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

TARGET_SECONDS = 0.12
"""What a repeat should last: the wait at its end and the clock are then below a percent."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Of one call.

    Attributes:
        seconds: median over repeats.
        spread: how far they lie apart, as a share of it.
        host: seconds until a call returned that found the device idle: what the host does. Calls cannot follow one another
            faster.
    """

    seconds: float
    spread: float
    host: float

    @property
    def ms(self) -> float:
        return self.seconds * 1e3

    @property
    def host_ms(self) -> float:
        return self.host * 1e3

    @property
    def host_bound(self) -> bool:
        return self.host > 0.8 * self.seconds


def time_calls(run: Callable[[], Any], *, calls: int | None = None, repeats: int = 3) -> Timing:
    """Seconds a call of `run`, which dispatches work and returns what is ready when it was done.

    The device works through the calls of a repeat back to back. A first repeat is thrown away.

    Args:
        calls: of a repeat; None: as many as take TARGET_SECONDS, 2 to 50.
    """
    jax.block_until_ready(run())
    if calls is None:
        once = _repeat(run, 2)
        calls = max(2, min(50, round(TARGET_SECONDS / once)))
    _repeat(run, calls)
    samples = [_repeat(run, calls) for _ in range(repeats)]
    median = statistics.median(samples)
    return Timing(median, (max(samples) - min(samples)) / median, statistics.median(_dispatch(run) for _ in range(5)))


def best_of(run: Callable[[], Any], *, calls: int = 5, repeats: int = 5) -> float:
    """Seconds a call of the fastest repeat: for ceilings."""
    jax.block_until_ready(run())
    return min(_repeat(run, calls) for _ in range(repeats))


def _repeat(run: Callable[[], Any], calls: int) -> float:
    result = None
    begin = time.perf_counter()
    for _ in range(calls):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / calls


def _dispatch(run: Callable[[], Any]) -> float:
    """Seconds that a call takes to return."""
    begin = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begin
    jax.block_until_ready(result)
    return seconds
