"""Adapters loaded ahead of need: for waiting requests, and for requests that are expected.

Uses are expected after Shahrad et al. (ATC 2020), who predict the next use from a histogram of the gaps between uses. The last
64 gaps of each adapter are few enough to be kept as they are, sorted.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.request import Request
from chameleon_jax.scheduler.admission import MAX_LOADS
from chameleon_jax.scheduler.plan import StepPlan
from chameleon_jax.scheduler.stats import SchedulerCounters

PREFETCH_DEPTH = 32
"""Waiting requests whose adapters are loaded ahead of their turn."""
LONGEST_GAP_S = 240.0
"""Longer gaps between uses of an adapter are not predicted."""
HEAD, TAIL = 0.05, 0.95
"""Quantiles of the gaps between which the next use is expected."""
LEAST_GAPS = 4
"""Gaps below which nothing is predicted."""


class Prefetcher:
    """Loads adapters for waiting requests and, if asked to, for expected ones.

    Args:
        cache: the adapters, and their pool.
        wanted: content hashes of waiting requests' adapters, kept up to date by the owner.
        counters: `prefetches` and `cancelled_loads` are counted here.
        predicts: load adapters that are likely to be used soon, too.
    """

    def __init__(self, cache: AdapterCache, wanted: Mapping[str, int], counters: SchedulerCounters, predicts: bool):
        self._cache = cache
        self._wanted = wanted
        self._counters = counters
        self._for_waiting: set[str] = set()  # adapters that load for a waiting request
        self._predictor = UsePredictor() if predicts else None

    def record_use(self, request: Request, now: float) -> None:
        """Learn from the arrival of a request."""
        if request.adapter is not None and self._predictor is not None:
            self._predictor.record_use(request.adapter, now)

    def forget(self, content_hash: str) -> None:
        """Drop the use history of an adapter."""
        if self._predictor is not None:
            self._predictor.forget(content_hash)

    def begin(self, adapter: str, plan: StepPlan) -> None:
        """Start to load an adapter that a waiting request needs."""
        plan.loads.append((adapter, self._cache.begin_load(adapter)))
        self._for_waiting.add(adapter)

    def cancel_unwanted(self, plan: StepPlan) -> None:
        """Give up loads begun for waiting requests that are gone."""
        for adapter in list(self._for_waiting):
            entry = self._cache.entry(adapter) if adapter in self._cache else None
            if entry is None or entry.tier is not AdapterTier.LOADING:
                self._for_waiting.discard(adapter)
            elif adapter not in self._wanted and not entry.references:
                self._for_waiting.discard(adapter)
                plan.cancels.append(adapter)
                self._cache.fail_load(adapter)
                self._counters.cancelled_loads += 1

    def load_ahead(
        self, plan: StepPlan, upcoming: Iterable[Request], num_running: int, now: float, most_loads: int = MAX_LOADS
    ) -> None:
        """Start to load adapters into free pages, or into pages of adapters that are needed later.

        One page for every running request stays free, since an adapter that is loading cannot be evicted when they grow.

        Args:
            plan: the step, which takes the loads.
            upcoming: waiting requests in the order in which they will likely start.
            num_running: running requests.
            now: seconds of the loop's clock.
            most_loads: loads under way at once.
        """
        sooner: set[str] = set()
        for request in upcoming:
            if self._cache.num_loading >= most_loads:
                return
            adapter = request.adapter
            if adapter is None or adapter in sooner:
                continue
            entry = self._cache.entry(adapter)
            if entry.tier is AdapterTier.HOST:
                if not self._cache.reserve(entry.info.num_pages + num_running, now, keep=sooner, wanted=self._wanted):
                    return
                self.begin(adapter, plan)
                self._counters.prefetches += 1
            sooner.add(adapter)
        if self._predictor is not None and not self._cache.num_loading:
            self._load_predicted(self._predictor, plan, num_running, now)

    def _load_predicted(self, predictor: UsePredictor, plan: StepPlan, num_running: int, now: float) -> None:
        """Load expected adapters into free pages only: a guess evicts nothing."""
        absent = (e.info.content_hash for e in self._cache.entries() if e.tier is AdapterTier.HOST and not e.removed)
        for adapter in predictor.candidates(absent, now):
            pages = self._cache.entry(adapter).info.num_pages
            if self._cache.num_loading >= MAX_LOADS or not self._cache.pool.can_allocate(pages + num_running):
                return
            plan.loads.append((adapter, self._cache.begin_load(adapter)))
            self._counters.prefetches += 1


class UsePredictor:
    """Expected uses of adapters, learnt from their uses so far.

    Args:
        horizon: seconds ahead. Candidates are computed at most once in that time.
    """

    def __init__(self, horizon: float = 1.0):
        self._horizon = horizon
        self._histories: dict[str, UseHistory] = {}
        self._next = 0.0

    def record_use(self, content_hash: str, now: float) -> None:
        """Learn that a request asked for the adapter."""
        history = self._histories.get(content_hash)
        if history is None:
            self._histories[content_hash] = UseHistory(now)
        else:
            history.record_use(now)

    def candidates(self, absent: Iterable[str], now: float, least: float = 0.05) -> list[str]:
        """Choose adapters likely to be used within the horizon, the likeliest first.

        Args:
            absent: content hashes of adapters outside the pool, to choose from.
            now: seconds of the loop's clock.
            least: chance below which an adapter is left out.

        Returns:
            Content hashes; none until a horizon has passed since the last answer.
        """
        if now < self._next:
            return []
        self._next = now + self._horizon
        chances = [(h.chance(now, self._horizon), name) for name in absent if (h := self._histories.get(name)) is not None]
        return [name for chance, name in sorted(chances, reverse=True) if chance >= least]

    def forget(self, content_hash: str) -> None:
        """Drop the adapter's history, if it has one."""
        self._histories.pop(content_hash, None)


class UseHistory:
    """The last `LIMIT` gaps between uses of one adapter, sorted."""

    LIMIT = 64

    def __init__(self, now: float):
        self.last = now
        self._gaps: list[float] = []
        self._recent: list[float] = []

    def record_use(self, now: float) -> None:
        """Add the gap since the last use."""
        gap, self.last = now - self.last, now
        if gap > LONGEST_GAP_S:
            return
        if len(self._recent) == self.LIMIT:
            del self._gaps[bisect.bisect_left(self._gaps, self._recent.pop(0))]
        self._recent.append(gap)
        bisect.insort(self._gaps, gap)

    def chance(self, now: float, horizon: float) -> float:
        """Share of the gaps not yet over that end within the next `horizon` seconds.

        0 outside the window from the HEAD to the TAIL quantile, and while there are fewer than LEAST_GAPS gaps.
        """
        count = len(self._gaps)
        if count < LEAST_GAPS:
            return 0.0
        idle = now - self.last
        if idle + horizon < self._gaps[int(HEAD * (count - 1))] or idle > self._gaps[int(TAIL * (count - 1))]:
            return 0.0
        left = bisect.bisect_left(self._gaps, idle)
        return (bisect.bisect_left(self._gaps, idle + horizon) - left) / max(count - left, 1)
