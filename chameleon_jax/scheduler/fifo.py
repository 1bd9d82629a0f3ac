"""First come, first served.

A request whose adapter is loading is passed by those behind it; one that lacks memory, for its tokens or its adapter, is
not: else the small ones behind it would take every page that becomes free. What is short is taken, in
this order, from free pages, from idle adapters, from the youngest running request, which is squashed: it waits again and
recomputes what it had, to the same output.
"""

from __future__ import annotations

import bisect
import enum
import itertools
from collections import Counter, deque

from chameleon_jax.adapter_cache import AdapterCache
from chameleon_jax.adapters import AdapterTier
from chameleon_jax.config import EngineConfig
from chameleon_jax.page_pool import PagePool
from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler.plan import PrefillChunk, StepPlan

PREFILL_TILE = 32
"""Chunks start at multiples of the device's prefill tile from the first uncomputed token."""
MAX_LOADS = 4
"""Adapter transfers under way at once."""
PREFETCH_DEPTH = 32
"""Waiting requests whose adapters are loaded ahead."""


class _Readiness(enum.Enum):
    """Of a waiting request's adapter."""

    READY = enum.auto()
    LOADING = enum.auto()
    NO_MEMORY = enum.auto()


class FifoScheduler:
    """See the module. `counters` are for metrics: requests squashed since the start."""

    def __init__(self, config: EngineConfig, page_tokens: int, pool: PagePool, cache: AdapterCache):
        self.num_squashes = 0
        self._config = config
        self._page_tokens = page_tokens
        self._pool = pool
        self._cache = cache
        self._waiting: deque[Request] = deque()
        self._wanted: Counter[str] = Counter()  # adapters of waiting requests
        self._running: list[Request] = []  # in order of arrival
        self._slots = list(range(config.max_num_seqs - 1, -1, -1))

    @property
    def waiting(self) -> deque[Request]:
        return self._waiting

    @property
    def running(self) -> list[Request]:
        return self._running

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        self._waiting.append(request)
        self._want(request, 1)

    def finish(self, request: Request, now: float) -> None:
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            self._give_back(request, now)
        elif request.state is RequestState.WAITING:
            self._waiting.remove(request)
            self._want(request, -1)
        request.state = RequestState.FINISHED

    def plan(self, now: float) -> StepPlan:
        plan = StepPlan()
        blocked = self._admit(plan, now)
        self._plan_prefills(plan)
        self._plan_decodes(plan, now)
        if not blocked:
            self._prefetch(plan, now)
        return plan

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)

    def _admit(self, plan: StepPlan, now: float) -> bool:
        """Moves requests from waiting to running. True where the first one that could run lacks memory."""
        passed: list[Request] = []
        try:
            while self._waiting and self._slots and len(passed) <= PREFETCH_DEPTH:
                request = self._waiting[0]
                readiness = _Readiness.LOADING if request.num_in_flight else self._readiness(request, plan, now)
                if readiness is _Readiness.NO_MEMORY:
                    return True
                if readiness is _Readiness.LOADING:
                    passed.append(self._waiting.popleft())
                    continue
                predicted = min(request.params.max_tokens, len(request.output_token_ids) + self._config.predicted_output_len)
                pages = self._pages_for(len(request.prompt_token_ids) + predicted)
                keep = {request.adapter} if request.adapter else set()
                if not self._cache.reserve(pages, now, keep=keep, wanted=self._wanted):
                    return True
                self._start(request, pages, now)
                self._waiting.popleft()
            return False
        finally:
            self._waiting.extendleft(reversed(passed))

    def _start(self, request: Request, pages: int, now: float) -> None:
        if request.adapter is not None:
            self._cache.acquire(request.adapter, now)
            if request.metrics.first_scheduled_time is None:
                hit = request.metrics.adapter_was_resident
                self._cache.counters.hits += bool(hit)
                self._cache.counters.misses += not hit
        request.pages = list(self._pool.extend_kv(request.request_id, pages))
        request.slot = self._slots.pop()
        request.num_computed, request.num_to_prefill = 0, request.num_known
        request.state = RequestState.RUNNING
        self._want(request, -1)
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = now
        bisect.insort(self._running, request, key=lambda r: r.order)

    def _readiness(self, request: Request, plan: StepPlan, now: float) -> _Readiness:
        """Whether the request's adapter is in the pool; starts its load where it is not."""
        if request.adapter is None:
            return _Readiness.READY
        entry = self._cache.entry(request.adapter)
        if request.metrics.adapter_was_resident is None:
            request.metrics.adapter_was_resident = entry.tier is AdapterTier.RESIDENT
        if entry.tier is AdapterTier.HOST and self._cache.num_loading < MAX_LOADS:
            if not self._cache.reserve(entry.info.num_pages, now, wanted=self._wanted):
                return _Readiness.NO_MEMORY
            plan.loads.append((request.adapter, self._cache.begin_load(request.adapter)))
        return _Readiness.READY if entry.tier is AdapterTier.RESIDENT else _Readiness.LOADING

    def _prefetch(self, plan: StepPlan, now: float) -> None:
        """Loads what waiting requests want into pages that nobody uses or that only unwanted adapters hold.

        A page for every running request is left, since what is loading cannot be evicted when they grow.
        """
        for request in itertools.islice(self._waiting, PREFETCH_DEPTH):
            if self._cache.num_loading >= MAX_LOADS:
                return
            if request.adapter is None:
                continue
            entry = self._cache.entry(request.adapter)
            if entry.tier is not AdapterTier.HOST:
                continue
            if self._cache.reserve(entry.info.num_pages + len(self._running), now, keep=self._wanted):
                plan.loads.append((request.adapter, self._cache.begin_load(request.adapter)))

    def _want(self, request: Request, by: int) -> None:
        """A request began (1) or ceased (-1) to wait."""
        if request.adapter is not None:
            self._wanted[request.adapter] += by
            if not self._wanted[request.adapter]:
                del self._wanted[request.adapter]

    def _plan_prefills(self, plan: StepPlan) -> None:
        budget = self._config.max_num_batched_tokens // PREFILL_TILE
        for request in self._running:
            left = request.num_to_prefill - request.num_computed
            if left <= 0:
                continue
            if not budget:
                break
            tokens = min(left, budget * PREFILL_TILE)
            budget -= -(-tokens // PREFILL_TILE)
            plan.prefills.append(PrefillChunk(request, request.num_computed, tokens, samples=tokens == left))
        for chunk in plan.prefills:
            chunk.request.num_computed += chunk.num_tokens
            chunk.request.num_in_flight += chunk.samples
        plan.prefills.sort(key=lambda chunk: (chunk.request.adapter or "", chunk.request.order))

    def _plan_decodes(self, plan: StepPlan, now: float) -> None:
        prefilled = {id(chunk.request) for chunk in plan.prefills}
        for request in list(self._running):
            if request.state is not RequestState.RUNNING or id(request) in prefilled:
                continue
            if request.num_computed < request.num_to_prefill or request.num_outputs >= request.params.max_tokens:
                continue
            if self._grow(request, plan, now):
                plan.decodes.append(request)
        for request in plan.decodes:
            request.num_computed += 1
            request.num_in_flight += 1
        plan.decodes.sort(key=lambda r: (r.adapter or "", r.order))

    def _grow(self, request: Request, plan: StepPlan, now: float) -> bool:
        """Makes room for the request's next token; False where it has to wait or was squashed itself."""
        missing = self._pages_for(request.num_computed + 1) - len(request.pages)
        if missing <= 0:
            return True
        while not self._cache.reserve(missing, now, wanted=self._wanted):
            victim = self._running[-1]
            if victim is request and len(self._running) == 1:
                return False  # only a load under way can hold the pages it lacks; it will end
            self._squash(victim, plan, now)
            if victim is request:
                return False
        request.pages.extend(self._pool.extend_kv(request.request_id, missing))
        return True

    def _squash(self, request: Request, plan: StepPlan, now: float) -> None:
        """RUNNING -> WAITING, ahead of all that arrived later. What this plan booked for it is taken back."""
        for chunk in [c for c in plan.prefills if c.request is request]:
            plan.prefills.remove(chunk)
            request.num_in_flight -= chunk.samples
        if request in plan.decodes:
            plan.decodes.remove(request)
        self._running.remove(request)
        self._give_back(request, now)
        request.state = RequestState.WAITING
        request.num_computed = 0
        request.metrics.num_squashes += 1
        self.num_squashes += 1
        bisect.insort(self._waiting, request, key=lambda r: r.order)
        self._want(request, 1)

    def _give_back(self, request: Request, now: float) -> None:
        self._pool.free_kv(request.request_id)
        request.pages = []
        self._slots.append(request.slot)
        request.slot = -1
        if request.adapter is not None:
            self._cache.release(request.adapter, now)
