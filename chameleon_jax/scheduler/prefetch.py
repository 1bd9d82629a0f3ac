"""Adapters that are loaded ahead of need."""

from __future__ import annotations

from collections.abc import Mapping

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.request import Request
from chameleon_jax.scheduler.admission import MAX_LOADS, QueuePolicy
from chameleon_jax.scheduler.likely_adapters import UsePredictor
from chameleon_jax.scheduler.plan import StepPlan

PREFETCH_DEPTH = 32
"""Waiting requests whose adapters are loaded ahead."""


class Prefetcher:
    """Loads for waiting requests, and where `predicts` for those that are expected.

    Args:
        wanted: adapters of waiting requests, kept up by the scheduler.

    Attributes:
        num_begun: loads begun ahead of a request's turn.
        num_cancelled: loads given up because nobody wanted them any more.
    """

    def __init__(self, pool: PagePool, cache: AdapterCache, wanted: Mapping[str, int], predicts: bool):
        self.num_begun = self.num_cancelled = 0
        self._pool = pool
        self._cache = cache
        self._wanted = wanted
        self._for_waiting: set[str] = set()  # adapters that load for a waiting request
        self._predictor = UsePredictor() if predicts else None

    def used(self, request: Request, now: float) -> None:
        """A request asked for its adapter."""
        if request.adapter is not None and self._predictor is not None:
            self._predictor.used(request.adapter, now)

    def forget(self, content_hash: str) -> None:
        if self._predictor is not None:
            self._predictor.forget(content_hash)

    def begin(self, adapter: str, plan: StepPlan) -> None:
        """Loads an adapter that a waiting request needs."""
        plan.loads.append((adapter, self._cache.begin_load(adapter)))
        self._for_waiting.add(adapter)

    def cancel(self, plan: StepPlan) -> None:
        """Gives up loads for waiting requests that went away."""
        for adapter in list(self._for_waiting):
            entry = self._cache.entry(adapter) if adapter in self._cache else None
            if entry is None or entry.tier is not AdapterTier.LOADING:
                self._for_waiting.discard(adapter)
            elif adapter not in self._wanted and not entry.references:
                self._for_waiting.discard(adapter)
                plan.cancels.append(adapter)
                self._cache.fail_load(adapter)
                self.num_cancelled += 1

    def load_ahead(self, plan: StepPlan, order: QueuePolicy, num_running: int, now: float) -> None:
        """Loads what waiting requests want into pages that nobody uses, or that only adapters hold which are needed later.

        A page for every running request is left, since what is loading cannot be evicted when they grow.
        """
        sooner: set[str] = set()
        for request in order.upcoming(PREFETCH_DEPTH) if self._wanted else ():
            if self._cache.num_loading >= MAX_LOADS:
                return
            adapter = request.adapter
            if adapter is None or adapter in sooner:
                continue
            entry = self._cache.entry(adapter)
            if entry.tier is AdapterTier.HOST:
                if not self._cache.reserve(entry.info.num_pages + num_running, now, keep=sooner, wanted=self._wanted):
                    return
                self.begin(adapter, plan)
                self.num_begun += 1
            sooner.add(adapter)
        if self._predictor is not None and not self._cache.num_loading:
            self._load_predicted(self._predictor, plan, num_running, now)

    def _load_predicted(self, predictor: UsePredictor, plan: StepPlan, num_running: int, now: float) -> None:
        """Into free pages only: a guess evicts nothing."""
        absent = (e.info.content_hash for e in self._cache.entries() if e.tier is AdapterTier.HOST and not e.removed)
        for adapter in predictor.candidates(absent, now):
            pages = self._cache.entry(adapter).info.num_pages
            if self._cache.num_loading >= MAX_LOADS or not self._pool.can_allocate(pages + num_running):
                return
            plan.loads.append((adapter, self._cache.begin_load(adapter)))
            self.num_begun += 1
