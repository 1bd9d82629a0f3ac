"""The paper's scheduler: requests of similar size queue together, and every queue owns a share of the pool (section 4.2).

Small requests never wait behind large ones, since those run on their own quota; large ones are never starved, since theirs
cannot be taken away. What a queue that is empty does not use is lent to the others, smallest first.

**Starvation bound.** Let L be the most seconds in which everything that runs at some moment has ended, K the number of levels
and n the number of older requests in the system. A request starts at most (n + 1) ((K + 1) L + HEAD_TIMEOUT_S) seconds after
it came: its level is served in order of arrival, so n heads go before it, and a head waits
- at most L for its quota: nothing is lent while it waits, so what was lent or used comes back as the running ones end; if
  it is larger than the quota it may start when nothing is charged to its level;
- then at most HEAD_TIMEOUT_S for memory, or for room in a step, while others may take it (the paper sets no such limit);
- then at most K L: nobody starts before the head that has been waiting for that longest, so within L there is enough for
  it, and at most K heads, one a level, stand in that line.
Every refresh while it waits may add one L, since it moves charges between levels. Requests that are squashed because they
outgrew their prediction count again among the n each time they come back; the oldest request is never squashed, so each L sees
at least one through. `tests/chameleon_jax/scheduler/test_starvation.py` holds it to that.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection

from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler.admission import Batch, Verdict
from chameleon_jax.scheduler.clustering import cluster_bounds, distributions_differ, equal_bounds
from chameleon_jax.scheduler.level import Level, TrafficHistory
from chameleon_jax.scheduler.quotas import share_quotas
from chameleon_jax.scheduler.single_queue import MAX_OVERTAKEN, PagesOf

REFRESH_S = 300.0
"""The paper's T_refresh."""
FIRST_REFRESH = 100
"""Requests after which levels are formed for the first time."""
DRIFT_SAMPLE = 128
"""Arrivals that a drift test compares with those of the last refresh."""
HEAD_TIMEOUT_S = 0.25
"""Seconds that a head may wait for memory or for room in a step before nobody starts ahead of it."""
BYPASS_DEPTH = 16
"""Younger requests of a queue that are looked at when its head's adapter lacks memory."""
SQUASH_SHARE = 0.05
"""Of the requests that started, those that may be squashed because they passed another (paper, section 4.3)."""


class MultiLevelQueue:
    """See the module.

    Args:
        total: pages of the pool.
        pages_of: KV pages with which a request starts.
        adapter_pages_of: pages of its adapter.
        missing_pages_of: those of them that running requests do not hold already. They are what a request is charged: the
            paper charges everyone the whole adapter, which leaves memory unused where requests share adapters.
        slo: target for time to first token, seconds.
        equal_levels: four levels of equal width and quota.
        drift_test: refresh as soon as sizes differ from those of the last refresh.
    """

    def __init__(
        self,
        total: int,
        pages_of: PagesOf,
        adapter_pages_of: PagesOf,
        missing_pages_of: PagesOf,
        slo: float,
        *,
        equal_levels: bool = False,
        drift_test: bool = False,
    ):
        self.num_refreshes = self.num_scaled_quotas = self.num_bypasses = self.num_bypass_squashes = 0
        self.bounds: list[float] = []
        self.levels = [Level(total)]
        self._total = total
        self._pages_of = pages_of
        self._adapter_pages_of = adapter_pages_of
        self._missing_pages_of = missing_pages_of
        self._slo = slo
        self._equal_levels = equal_levels
        self._drift_test = drift_test
        self._history = TrafficHistory(REFRESH_S)
        self._refreshed_at: float | None = None
        self._refreshed_sizes: list[float] = []
        self._arrivals = 0
        self._num_started = 0
        self._charges: dict[str, list[tuple[int, int]]] = {}  # request id -> (level, pages)
        self._passing: dict[str, Request] = {}  # running requests that passed the head of their queue
        self._clock = Pace()

    # -- waiting --------------------------------------------------------------------------------------------------------

    def add(self, request: Request, now: float, new: bool = True) -> None:
        if new:
            self._arrivals += 1
            self._history.arrived(request, self._pages_of(request) + self._adapter_pages_of(request), now)
        self.levels[self._level_of(request)].waiting.add(request)

    def remove(self, request: Request) -> None:
        level = self.levels[self._level_of(request)]
        if level.waiting.at(0) is request:
            level.blocked_since = None
        level.waiting.remove(request)

    def upcoming(self, count: int) -> list[Request]:
        """The first of every level in turn, small ones first."""
        columns = [level.waiting.first(count) for level in self.levels]
        return [c[i] for i in range(count) for c in columns if i < len(c)][:count]

    def ended(self, request: Request, now: float) -> None:
        for level, pages in self._charges.pop(request.request_id, ()):
            self.levels[level].remaining += pages
        self._passing.pop(request.request_id, None)
        started = request.metrics.first_scheduled_time
        if started is not None and request.state is RequestState.FINISHED:
            self._history.ran(request, now - started, now)

    # -- admission ------------------------------------------------------------------------------------------------------

    def admit(self, batch: Batch, running: Collection[Request], now: float) -> None:
        self._clock.tick(now, bool(running))
        self._refresh_if_due(running, now)
        first = self._first_blocked()
        if first is not None and first.blocked_since is not None and now - first.blocked_since >= HEAD_TIMEOUT_S:
            if self._offer_head(first, batch, now) is not Verdict.STARTS:
                return
        lent = 0
        for level in self.levels:
            self._admit_level(level, batch, running, now)
            if not level.waiting:
                lent += max(level.remaining, 0)
        if lent > 0:
            self._lend(lent, batch, now)

    def victim(self, room: int) -> Request | None:
        """A request that passed a head which could start in its place: room and its pages are what the head needs."""
        for request in self._passing.values():
            head = self.levels[self._level_of(request)].waiting.at(0)
            if head is None or head.order > request.order or self.num_bypass_squashes >= SQUASH_SHARE * self._num_started:
                continue
            if room + len(request.pages) >= self._need(head) > room:
                self.num_bypass_squashes += 1
                return request
        return None

    def _first_blocked(self) -> Level | None:
        blocked = [level for level in self.levels if level.blocked_since is not None]
        return min(blocked, key=lambda level: level.blocked_since or 0.0, default=None)

    def _admit_level(self, level: Level, batch: Batch, running: Collection[Request], now: float) -> None:
        """Phase 1: the level's own quota, from the head on, until one does not fit."""
        passed = 0
        while (request := level.waiting.at(passed)) is not None and passed <= MAX_OVERTAKEN:
            need = self._need(request)
            if need > level.remaining and not level.idle:
                return
            verdict = batch.offer(request, self._pages_of(request))
            if verdict is Verdict.STARTS:
                self._started(request, [(level, need)])
            elif verdict is Verdict.WAITS:
                passed += 1
            else:
                if passed == 0:
                    level.blocked_since = level.blocked_since if level.blocked_since is not None else now
                if passed == 0 and verdict is Verdict.NO_ADAPTER_MEMORY:
                    self._bypass(level, request, batch, running)
                return

    def _offer_head(self, level: Level, batch: Batch, now: float) -> Verdict:
        request = level.waiting.at(0)
        if request is None:
            level.blocked_since = None
            return Verdict.STARTS
        verdict = batch.offer(request, self._pages_of(request))
        if verdict is Verdict.STARTS:
            self._started(request, [(level, self._need(request))])
        elif verdict is Verdict.WAITS:
            return Verdict.STARTS  # it has the memory that it waited for
        return verdict

    def _lend(self, lent: int, batch: Batch, now: float) -> None:
        """Phase 2: what levels without waiting requests have left goes to the others, small ones first."""
        donors = [level for level in self.levels if not level.waiting and level.remaining > 0]
        for level in self.levels:
            passed = 0
            while (request := level.waiting.at(passed)) is not None and passed <= MAX_OVERTAKEN:
                need = self._need(request)
                if need > lent:
                    break
                verdict = batch.offer(request, self._pages_of(request))
                if verdict is Verdict.WAITS:
                    passed += 1
                    continue
                if verdict is not Verdict.STARTS:
                    return
                shares, left = [], need
                for donor in donors:
                    if left and donor.remaining > 0:
                        shares.append((donor, min(left, donor.remaining)))
                        left -= shares[-1][1]
                lent -= need
                self._started(request, shares)

    def _bypass(self, level: Level, head: Request, batch: Batch, running: Collection[Request]) -> None:
        """Younger requests may pass a head whose adapter lacks memory if they will be gone before it can have it."""
        if self.num_bypass_squashes + len(self._passing) >= SQUASH_SHARE * self._num_started:
            return
        wait = self._predicted_wait(self._need(head) - batch.room(), running)
        for request in level.waiting.first(BYPASS_DEPTH + 1)[1:]:
            need = self._need(request)
            if need > level.remaining or wait <= self._clock.seconds(request.predicted_output_len):
                continue
            if batch.offer(request, self._pages_of(request)) is Verdict.STARTS:
                self._started(request, [(level, need)])
                self._passing[request.request_id] = request
                self.num_bypasses += 1
                return

    def _predicted_wait(self, missing: int, running: Collection[Request]) -> float:
        """Seconds until running requests that end as predicted have given back that many pages."""
        ends = sorted((max(r.predicted_output_len - len(r.output_token_ids), 0), len(r.pages)) for r in running)
        for tokens, pages in ends:
            missing -= pages
            if missing <= 0:
                return self._clock.seconds(tokens)
        return float("inf")

    def _started(self, request: Request, shares: list[tuple[Level, int]]) -> None:
        self.remove(request)
        request.queue = self._level_of(request)
        self._num_started += 1
        self._charges[request.request_id] = [(self.levels.index(level), pages) for level, pages in shares]
        for level, pages in shares:
            level.remaining -= pages

    def _need(self, request: Request) -> int:
        return self._pages_of(request) + self._missing_pages_of(request)

    # -- levels and quotas ----------------------------------------------------------------------------------------------

    def _level_of(self, request: Request) -> int:
        return bisect.bisect_left(self.bounds, request.size)

    def _refresh_if_due(self, running: Collection[Request], now: float) -> None:
        if self._refreshed_at is None:
            due = self._arrivals >= FIRST_REFRESH
        else:
            due = now - self._refreshed_at >= REFRESH_S or (self._drift_test and self._drifted())
        if due:
            self._refresh(running, now)

    def _drifted(self) -> bool:
        """Looked at once every DRIFT_SAMPLE arrivals."""
        if self._arrivals < DRIFT_SAMPLE:
            return False
        self._arrivals = 0
        return distributions_differ(self._refreshed_sizes, self._history.sizes(DRIFT_SAMPLE))

    def _refresh(self, running: Collection[Request], now: float) -> None:
        """Levels and quotas from the last REFRESH_S seconds; everybody moves to where their size belongs now."""
        self._refreshed_at, self._arrivals = now, 0
        self.num_refreshes += 1
        self._history.forget(now)
        sizes = self._history.sizes()
        self._refreshed_sizes = sizes
        waiting = [request for level in self.levels for request in level.waiting]
        blocked = {id(level.waiting.at(0)): level.blocked_since for level in self.levels}
        self.bounds = equal_bounds(sizes) if self._equal_levels else cluster_bounds(sizes)
        count = len(self.bounds) + 1
        if self._equal_levels:
            quotas = [self._total // count] * count
        else:
            quotas, scaled = share_quotas(self._history.loads(self.bounds, now, bisect.bisect_left), self._total, self._slo)
            self.num_scaled_quotas += scaled
        self.levels = [Level(quota) for quota in quotas]
        for request in waiting:
            self.levels[self._level_of(request)].waiting.add(request)
        for level in self.levels:
            level.blocked_since = blocked.get(id(level.waiting.at(0)))
        for request in running:
            if request.request_id in self._charges:
                home, pages = self._level_of(request), sum(p for _, p in self._charges[request.request_id])
                self._charges[request.request_id] = [(home, pages)]
                self.levels[home].remaining -= pages


class Pace:
    """Seconds between steps while something runs, averaged over the last ones."""

    WEIGHT = 0.02

    def __init__(self) -> None:
        self._step = 0.03
        self._last: float | None = None

    def tick(self, now: float, running: bool) -> None:
        if self._last is not None and running:
            self._step += self.WEIGHT * (now - self._last - self._step)
        self._last = now

    def seconds(self, tokens: int) -> float:
        """That many output tokens take."""
        return tokens * self._step
