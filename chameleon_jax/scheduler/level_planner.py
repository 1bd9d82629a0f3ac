"""Bounds and quotas of the multi-level scheduler, formed anew from recent traffic (paper, section 4.2)."""

from __future__ import annotations

import bisect
import dataclasses
from collections import deque

from chameleon_jax.request import Request
from chameleon_jax.scheduler.clustering import cluster_bounds, distributions_differ, equal_bounds
from chameleon_jax.scheduler.quotas import LevelLoad, share_quotas
from chameleon_jax.scheduler.stats import SchedulerCounters

REFRESH_S = 300.0
"""The paper's T_refresh."""
FIRST_REFRESH = 100
"""Arrivals after which levels are formed for the first time."""
DRIFT_SAMPLE = 128
"""Arrivals that a drift test compares with as many before the last refresh."""


@dataclasses.dataclass(eq=False)
class LevelPlanner:
    """Forms levels from the traffic of the last REFRESH_S seconds.

    Attributes:
        total: pages of the pool.
        slo: target for time to first token, seconds.
        counters: `quota_refreshes` and `scaled_quotas` are counted here.
        equal_levels: four levels of equal width and quota.
        drift_test: refresh as soon as sizes differ from the sizes at the last refresh.
        history: traffic from which levels are formed.
    """

    total: int
    slo: float
    counters: SchedulerCounters
    equal_levels: bool = False
    drift_test: bool = False
    history: TrafficHistory = dataclasses.field(default_factory=lambda: TrafficHistory(REFRESH_S))
    _refreshed_at: float | None = None
    _refreshed_sizes: list[float] = dataclasses.field(default_factory=list)
    _arrivals: int = 0  # since the last refresh or drift test

    def record_arrival(self, request: Request, pages: int, now: float) -> None:
        """Learn from a new request that needs so many pages, its adapter's among them."""
        self._arrivals += 1
        self.history.record_arrival(request, pages, now)

    def is_due(self, now: float) -> bool:
        """Whether levels should be formed anew."""
        if self._refreshed_at is None:
            return self._arrivals >= FIRST_REFRESH
        return now - self._refreshed_at >= REFRESH_S or (self.drift_test and self._has_drifted())

    def refresh(self, now: float) -> tuple[list[float], list[int]]:
        """Return the sizes at which levels part, ascending, and each level's quota in pages."""
        self._refreshed_at, self._arrivals = now, 0
        self.counters.quota_refreshes += 1
        self.history.forget_old(now)
        sizes = self._refreshed_sizes = self.history.sizes()
        if self.equal_levels:
            bounds = equal_bounds(sizes)
            count = len(bounds) + 1
            return bounds, [self.total // count] * count
        bounds = cluster_bounds(sizes)
        quotas, scaled = share_quotas(self.history.loads(bounds, now), self.total, self.slo)
        self.counters.scaled_quotas += scaled
        return bounds, quotas

    def _has_drifted(self) -> bool:
        """Test for drift, once every DRIFT_SAMPLE arrivals."""
        if self._arrivals < DRIFT_SAMPLE:
            return False
        self._arrivals = 0
        return distributions_differ(self._refreshed_sizes, self.history.sizes(DRIFT_SAMPLE))


class TrafficHistory:
    """Arrivals and finished requests of the last `window` seconds, at most `limit` of each."""

    def __init__(self, window: float, limit: int = 8192):
        self._window = window
        self._arrivals: deque[tuple[float, float, int]] = deque(maxlen=limit)  # (time, size, pages)
        self._runs: deque[tuple[float, float, float]] = deque(maxlen=limit)  # (time, size, seconds)

    def record_arrival(self, request: Request, pages: int, now: float) -> None:
        """Add a new request that needs so many pages."""
        self._arrivals.append((now, request.size, pages))

    def record_run(self, request: Request, seconds: float, now: float) -> None:
        """Add a request that finished after so many seconds."""
        self._runs.append((now, request.size, seconds))

    def sizes(self, last: int = 0) -> list[float]:
        """Sizes of the `last` arrivals, or of all (0), oldest first."""
        return [size for _, size, _ in self._arrivals][-last:]

    def forget_old(self, now: float) -> None:
        """Drop everything older than the window."""
        for events in (self._arrivals, self._runs):
            while events and events[0][0] < now - self._window:
                events.popleft()

    def loads(self, bounds: list[float], now: float) -> list[LevelLoad]:
        """Load of each level that `bounds` part.

        A level without a finished request is assumed to run as long as the mean request.
        """
        count = len(bounds) + 1
        pages: list[list[int]] = [[] for _ in range(count)]
        seconds: list[list[float]] = [[] for _ in range(count)]
        for _, size, needed in self._arrivals:
            pages[bisect.bisect_left(bounds, size)].append(needed)
        for _, size, duration in self._runs:
            seconds[bisect.bisect_left(bounds, size)].append(duration)
        runs = [s for level in seconds for s in level]
        mean = sum(runs) / len(runs) if runs else 1.0
        span = max(now - self._arrivals[0][0], 1.0) if self._arrivals else 1.0
        return [
            LevelLoad(max(p, default=1), sum(p) / max(len(p), 1), sum(s) / len(s) if s else mean, len(p) / span)
            for p, s in zip(pages, seconds)
        ]
