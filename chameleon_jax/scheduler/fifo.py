"""First come, first served.

A request whose adapter is loading is passed by those behind it; one that lacks memory is not. What is short is taken, in
this order, from free pages, from idle adapters, from the youngest running request, which is squashed: it waits again and
recomputes what it had, to the same output.
"""

from __future__ import annotations

import bisect
from collections import deque

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


class FifoScheduler:
    """See the module. `counters` are for metrics: requests squashed since the start."""

    def __init__(self, config: EngineConfig, page_tokens: int, pool: PagePool, cache: AdapterCache):
        self.num_squashes = 0
        self._config = config
        self._page_tokens = page_tokens
        self._pool = pool
        self._cache = cache
        self._waiting: deque[Request] = deque()
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

    def finish(self, request: Request, now: float) -> None:
        if request.state is RequestState.RUNNING:
            self._running.remove(request)
            self._give_back(request, now)
        elif request.state is RequestState.WAITING:
            self._waiting.remove(request)
        request.state = RequestState.FINISHED

    def plan(self, now: float) -> StepPlan:
        plan = StepPlan()
        blocked = self._admit(plan, now)
        if not blocked:
            self._prefetch(plan, now)
        self._plan_prefills(plan)
        self._plan_decodes(plan, now)
        return plan

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self._page_tokens)

    def _admit(self, plan: StepPlan, now: float) -> bool:
        """Moves requests from waiting to running. True where the first one that could run lacks memory."""
        still_waiting: list[Request] = []
        wanted = self._wanted()
        blocked = False
        while self._waiting and self._slots and not blocked:
            request = self._waiting.popleft()
            if request.num_in_flight or not self._adapter_ready(request, plan, wanted, now):
                still_waiting.append(request)
                blocked = len(still_waiting) > PREFETCH_DEPTH
                continue
            predicted = min(request.params.max_tokens, len(request.output_token_ids) + self._config.predicted_output_len)
            pages = self._pages_for(len(request.prompt_token_ids) + predicted)
            keep = {request.adapter} if request.adapter else set()
            if not self._cache.reserve(pages, now, keep=keep, wanted=wanted):
                still_waiting.append(request)
                blocked = True
                continue
            self._start(request, pages, now)
        self._waiting.extendleft(reversed(still_waiting))
        return blocked

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
        if request.metrics.first_scheduled_time is None:
            request.metrics.first_scheduled_time = now
        bisect.insort(self._running, request, key=lambda r: r.order)

    def _adapter_ready(self, request: Request, plan: StepPlan, wanted: set[str], now: float) -> bool:
        """Whether the request's adapter is in the pool; starts its load where it is not."""
        if request.adapter is None:
            return True
        entry = self._cache.entry(request.adapter)
        if request.metrics.adapter_was_resident is None:
            request.metrics.adapter_was_resident = entry.tier is AdapterTier.RESIDENT
        if entry.tier is AdapterTier.HOST and len(self._loading()) < MAX_LOADS:
            if self._cache.reserve(entry.info.num_pages, now, wanted=wanted):
                plan.loads.append((request.adapter, self._cache.begin_load(request.adapter)))
        return entry.tier is AdapterTier.RESIDENT

    def _prefetch(self, plan: StepPlan, now: float) -> None:
        """Loads what waiting requests want into pages that nobody uses or that only unwanted adapters hold."""
        wanted = self._wanted()
        for request in list(self._waiting)[:PREFETCH_DEPTH]:
            if len(self._loading()) >= MAX_LOADS:
                return
            if request.adapter is None:
                continue
            entry = self._cache.entry(request.adapter)
            if entry.tier is not AdapterTier.HOST:
                continue
            if self._cache.reserve(entry.info.num_pages, now, keep=wanted):
                plan.loads.append((request.adapter, self._cache.begin_load(request.adapter)))

    def _loading(self) -> list[str]:
        return [e.info.content_hash for e in self._cache.entries() if e.tier is AdapterTier.LOADING]

    def _wanted(self) -> set[str]:
        return {r.adapter for r in self._waiting if r.adapter is not None}

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
        while not self._cache.reserve(missing, now, wanted=self._wanted()):
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

    def _give_back(self, request: Request, now: float) -> None:
        self._pool.free_kv(request.request_id)
        request.pages = []
        self._slots.append(request.slot)
        request.slot = -1
        if request.adapter is not None:
            self._cache.release(request.adapter, now)
