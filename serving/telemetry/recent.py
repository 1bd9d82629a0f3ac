"""Percentiles of the latest times to first token, which a histogram since the start cannot give."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections import deque
from collections.abc import Sequence

from chameleon_jax.request import Request
from chameleon_jax.serving.observers import Observer

NUM_REQUESTS = 1000


@dataclasses.dataclass(frozen=True)
class Percentiles:
    """Percentiles of times to first token, in seconds. None without any."""

    count: int
    p50: float | None
    p90: float | None
    p99: float | None


class RecentRequests(Observer):
    """Observer of the engine that keeps the last NUM_REQUESTS times to first token."""

    def __init__(self) -> None:
        self._ttft: deque[float] = deque(maxlen=NUM_REQUESTS)
        self._lock = threading.Lock()

    def first_token(self, request: Request) -> None:
        times = request.metrics
        assert times.first_token_time is not None
        with self._lock:
            self._ttft.append(times.first_token_time - times.arrival_time)

    def ttft(self) -> Percentiles:
        with self._lock:
            times = list(self._ttft)
        times.sort()
        return Percentiles(len(times), *(_nearest_rank(times, share) for share in (0.5, 0.9, 0.99)))


def _nearest_rank(ordered: Sequence[float], share: float) -> float | None:
    """Smallest value that at least `share` of the values do not exceed. Args: ordered: values, ascending."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
