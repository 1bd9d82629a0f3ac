"""Wall time of device work: many dispatches, one wait, the median of some repeats."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.device import predictions
from benchmarks.machine import Row

TARGET_SECONDS = 0.12
"""Length of a repeat; the wait at its end and the clock are then below a percent."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one call.

    Attributes:
        seconds: Median over repeats.
        spread: Range of the repeats, as a share of the median.
        host: Seconds until a call returned that found the device idle, which is the host's work. Calls cannot follow one
            another faster.
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
    """Time calls of `run`, which dispatches work and returns arrays that are ready when the work is done.

    The device works through the calls of a repeat back to back, and a first repeat is thrown away. With `calls` None a repeat
    has as many as last TARGET_SECONDS, 2 to 50."""
    jax.block_until_ready(run())
    if calls is None:
        once = _repeat(run, 2)
        calls = max(2, min(50, round(TARGET_SECONDS / once)))
    _repeat(run, calls)
    samples = [_repeat(run, calls) for _ in range(repeats)]
    median = statistics.median(samples)
    return Timing(median, (max(samples) - min(samples)) / median, statistics.median(_dispatch(run) for _ in range(5)))


def best_of(run: Callable[[], Any], *, calls: int = 5, repeats: int = 5) -> float:
    """Seconds a call of the fastest repeat, for ceilings."""
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
    """Seconds until a call returns."""
    begin = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - begin
    jax.block_until_ready(result)
    return seconds


def columns(step: Timing, device: Timing, floor: float, predicted_ms: float | None) -> Row:
    """Columns of a step's row, beside its floor in seconds and its prediction.

    `step` is timed as serving runs it, `device` without the host's part, which may be longer.
    """
    predicted = predictions.beside(predicted_ms, step.ms)
    return {
        "floor ms": round(floor * 1e3, 3),
        "predicted ms": predicted["predicted ms"],
        "ms": round(step.ms, 3),
        "% of floor": round(100 * floor / step.seconds, 1),
        "% of predicted": predicted["% of predicted"],
        "spread %": round(100 * step.spread, 1),
        "device ms": round(device.ms, 3),
        "host ms": round(step.host_ms, 3),
    }
