"""The paper's scheduler: requests of similar size queue together, and every queue owns a share of the pool (section 4.2).

Small requests never wait behind large ones, since those run on their own quota. Large ones never starve, since their quota
cannot be taken away. The quota that an empty queue does not use is lent to the others, smallest first.

**Starvation bound.** Let L be the longest time in which everything that runs at some moment has ended, K the number of levels
and n the number of older requests in the system. A request starts at most (n + 1) ((K + 1) L + HEAD_TIMEOUT_S) seconds after
it arrived. Its level is served in order of arrival, so n heads go before it, and a head waits

- at most L for its quota. Nothing is lent while it waits, so everything lent or used comes back as the running requests end.
  A head larger than the quota may start when no request is charged to its level;
- then at most HEAD_TIMEOUT_S for memory, or for room in a step, while others may take it (the paper sets no such limit);
- then at most K L. No request starts before the head that has waited for memory longest, so within L there is enough for it,
  and at most K heads, one a level, stand in that line.

Every refresh during the wait may add one L, since it moves charges between levels. A request that is preempted because it
outgrew its prediction counts again among the n each time it comes back. The oldest request of the highest class is never
preempted, so each L sees at least one through. `tests/chameleon_jax/scheduler/test_starvation.py` checks the bound.

**Classes.** A level serves its highest class first, and the levels whose heads are of a higher class have the first choice of
room. At most MAX_PASSES requests pass the one that is first in line (see `request_queue`), so with several classes the bound is
MAX_PASSES + 1 times as long.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection

from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler.admission import AdmissionBatch, Verdict
from chameleon_jax.scheduler.level import Level
from chameleon_jax.scheduler.level_planner import LevelPlanner
from chameleon_jax.scheduler.queue_policy import MAX_OVERTAKEN
from chameleon_jax.scheduler.request_size import PageNeeds
from chameleon_jax.scheduler.stats import QueueStats

HEAD_TIMEOUT_S = 0.25
"""Seconds that a head may wait for memory or for room in a step before no request may start ahead of it."""
BYPASS_DEPTH = 16
"""Younger requests of a queue considered for a bypass when its head's adapter lacks memory."""
SQUASH_SHARE = 0.05
"""Largest share of the started requests that may be squashed because they bypassed another (paper, section 4.3)."""


class MultiLevelQueue:
    """The queues, their quotas, and the running requests charged to them; see the module.

    A request is charged its KV pages and the adapter pages that no running request holds already. The paper charges the whole
    adapter to every request, which leaves memory unused where requests share adapters.

    Attributes:
        bounds: sizes at which levels part, ascending.
        levels: one more than there are bounds, smallest requests first.

    Args:
        needs: pages that requests take.
        planner: forms the levels; bypasses and squashes are counted in its counters too.
    """

    def __init__(self, needs: PageNeeds, planner: LevelPlanner):
        self.bounds: list[float] = []
        self.levels = [Level(planner.total)]
        self._needs = needs
        self._counters = planner.counters
        self._planner = planner
        self._num_started = 0
        self._charges: dict[str, list[tuple[Level, int]]] = {}  # request id -> pages charged to levels
        self._bypassers: dict[str, Request] = {}  # running requests that passed the head of their queue
        self._pace = StepPace()

    # -- waiting --------------------------------------------------------------------------------------------------------

    def add(self, request: Request, now: float, new: bool = True) -> None:
        if new:
            self._planner.record_arrival(request, self._needs.kv(request) + self._needs.adapter(request), now)
        self._level_of(request).waiting.add(request)

    def remove(self, request: Request, starts: bool = False) -> None:
        level = self._level_of(request)
        if level.waiting.at(0) is request:
            level.blocked_since = None
        level.waiting.remove(request, starts=starts)

    def upcoming(self, count: int) -> list[Request]:
        """List the first requests of every level in turn, small ones first."""
        columns = [level.waiting.first(count) for level in self.levels]
        return [c[i] for i in range(count) for c in columns if i < len(c)][:count]

    def queues(self) -> tuple[QueueStats, ...]:
        return tuple(QueueStats(str(i), len(v.waiting), v.quota, v.remaining) for i, v in enumerate(self.levels))

    def release(self, request: Request, now: float) -> None:
        for level, pages in self._charges.pop(request.request_id, ()):
            level.remaining += pages
        self._bypassers.pop(request.request_id, None)
        started = request.metrics.first_scheduled_time
        if started is not None and request.state is RequestState.FINISHED:
            self._planner.history.record_run(request, now - started, now)

    # -- admission ------------------------------------------------------------------------------------------------------

    def admit(self, batch: AdmissionBatch, running: Collection[Request], now: float) -> None:
        self._pace.observe_step(now, bool(running))
        if self._planner.is_due(now):
            self._form_levels(running, now)
        if not self._admit_overdue_head(batch, now):
            return
        unused = 0
        for level in sorted(self.levels, key=_head_priority):
            self._admit_level(level, batch, running, now)
            if not level.waiting:
                unused += max(level.remaining, 0)
        if unused > 0:
            self._lend(unused, batch)

    def _admit_overdue_head(self, batch: AdmissionBatch, now: float) -> bool:
        """Offer the head that has waited for memory longest, if it is over its time; False where no other may start."""
        blocked = [(level.blocked_since, i) for i, level in enumerate(self.levels) if level.blocked_since is not None]
        since, index = min(blocked, default=(now, 0))
        if now - since < HEAD_TIMEOUT_S:
            return True
        level = self.levels[index]
        request = level.waiting.at(0)
        if request is None:
            level.blocked_since = None
            return True
        verdict = batch.try_admit(request, self._needs.kv(request))
        if verdict is Verdict.STARTS:
            self._start(request, [(level, self._pages(request))])
        return verdict in (Verdict.STARTS, Verdict.WAITS)  # the latter has the memory that it waited for

    def _admit_level(self, level: Level, batch: AdmissionBatch, running: Collection[Request], now: float) -> None:
        """Phase 1: start requests on the level's own quota, from the head on, until one does not fit."""
        passed = 0
        while (request := level.waiting.at(passed)) is not None and passed <= MAX_OVERTAKEN:
            pages = self._pages(request)
            if pages > level.remaining and not level.idle:
                return
            verdict = batch.try_admit(request, self._needs.kv(request))
            if verdict is Verdict.STARTS:
                self._start(request, [(level, pages)])
            elif verdict is Verdict.WAITS:
                passed += 1
            else:
                if passed == 0 and level.blocked_since is None:
                    level.blocked_since = now
                if passed == 0 and verdict is Verdict.NO_ADAPTER_MEMORY:
                    self._bypass(level, request, batch, running)
                return

    def _lend(self, unused: int, batch: AdmissionBatch) -> None:
        """Phase 2: lend quota of levels without waiting requests, `unused` pages in all, to the others, small ones first."""
        donors = [level for level in self.levels if not level.waiting and level.remaining > 0]
        for level in sorted(self.levels, key=_head_priority):
            passed = 0
            while (request := level.waiting.at(passed)) is not None and passed <= MAX_OVERTAKEN:
                pages = self._pages(request)
                if pages > unused:
                    break
                verdict = batch.try_admit(request, self._needs.kv(request))
                if verdict is Verdict.WAITS:
                    passed += 1
                elif verdict is Verdict.STARTS:
                    unused -= pages
                    self._start(request, _borrow(donors, pages))
                else:
                    return

    def _start(self, request: Request, charges: list[tuple[Level, int]]) -> None:
        self.remove(request, starts=True)
        request.queue = self._index_of(request)
        self._num_started += 1
        self._charges[request.request_id] = charges
        for level, pages in charges:
            level.remaining -= pages

    def _pages(self, request: Request) -> int:
        """Pages that a request is charged."""
        return self._needs.kv(request) + self._needs.missing_adapter(request)

    # -- bypassing ------------------------------------------------------------------------------------------------------

    def _bypass(self, level: Level, head: Request, batch: AdmissionBatch, running: Collection[Request]) -> None:
        """Start a younger request ahead of a head whose adapter lacks memory, if it will end before the head can start."""
        if self._counters.bypass_squashes + len(self._bypassers) >= SQUASH_SHARE * self._num_started:
            return
        wait = self._predict_wait(self._pages(head) - batch.room(), running)
        for request in level.waiting.first(BYPASS_DEPTH + 1)[1:]:
            pages = self._pages(request)
            if pages > level.remaining or wait <= self._pace.seconds(request.predicted_output_len):
                continue
            if batch.try_admit(request, self._needs.kv(request)) is Verdict.STARTS:
                self._start(request, [(level, pages)])
                self._bypassers[request.request_id] = request
                self._counters.bypasses += 1
                return

    def _predict_wait(self, missing: int, running: Collection[Request]) -> float:
        """Predict the seconds until running requests have ended that hold `missing` pages."""
        ends = sorted((max(r.predicted_output_len - len(r.output_token_ids), 0), len(r.pages)) for r in running)
        for tokens, pages in ends:
            missing -= pages
            if missing <= 0:
                return self._pace.seconds(tokens)
        return float("inf")

    def victim(self, room: int) -> Request | None:
        """Choose a bypasser whose pages, with `room`, are just enough for a head that is older or of a higher class."""
        for request in self._bypassers.values():
            head = self._level_of(request).waiting.at(0)
            if head is None or (head.order > request.order and head.priority >= request.priority):
                continue
            if self._counters.bypass_squashes >= SQUASH_SHARE * self._num_started:
                continue
            if room + len(request.pages) >= self._pages(head) > room:
                self._counters.bypass_squashes += 1
                return request
        return None

    # -- levels ---------------------------------------------------------------------------------------------------------

    def _index_of(self, request: Request) -> int:
        return bisect.bisect_left(self.bounds, request.size)

    def _level_of(self, request: Request) -> Level:
        return self.levels[self._index_of(request)]

    def _form_levels(self, running: Collection[Request], now: float) -> None:
        """Replace levels and quotas; waiting requests and charges move to the level of each request's size."""
        waiting = [request for level in self.levels for request in level.waiting]
        blocked = {id(level.waiting.at(0)): level.blocked_since for level in self.levels}
        self.bounds, quotas = self._planner.refresh(now)
        num_passes = max(level.waiting.num_passes for level in self.levels)
        self.levels = [Level(quota) for quota in quotas]
        for request in waiting:
            self._level_of(request).waiting.add(request)
        for level in self.levels:
            level.waiting.num_passes = num_passes
            level.blocked_since = blocked.get(id(level.waiting.at(0)))
        for request in running:
            if request.request_id in self._charges:
                level, pages = self._level_of(request), sum(p for _, p in self._charges[request.request_id])
                self._charges[request.request_id] = [(level, pages)]
                level.remaining -= pages


def _head_priority(level: Level) -> int:
    head = level.waiting.at(0)
    return 0 if head is None else head.priority


def _borrow(donors: list[Level], pages: int) -> list[tuple[Level, int]]:
    """Split pages among donors, the first ones first."""
    shares = []
    for donor in donors:
        if pages and donor.remaining > 0:
            shares.append((donor, min(pages, donor.remaining)))
            pages -= shares[-1][1]
    return shares


class StepPace:
    """Mean seconds between steps while requests run, the last ones counting most."""

    WEIGHT = 0.02

    def __init__(self) -> None:
        self._step_s = 0.03
        self._last: float | None = None

    def observe_step(self, now: float, running: bool) -> None:
        """Learn from the time since the last call, if requests were running."""
        if self._last is not None and running:
            self._step_s += self.WEIGHT * (now - self._last - self._step_s)
        self._last = now

    def seconds(self, tokens: int) -> float:
        """Seconds that so many output tokens of one request take."""
        return tokens * self._step_s
