"""Decides the next step: who starts, who computes what, which adapters move.

What is common to all systems is here; who starts next is an `QueuePolicy`'s. What is short is taken, in this order, from
free pages, from idle adapters, from the youngest running request, which is squashed: it waits again and recomputes what it had,
to the same output.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from collections.abc import Iterable

from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler.admission import Batch, QueuePolicy
from chameleon_jax.scheduler.length_predictor import LengthPredictor
from chameleon_jax.scheduler.multilevel import MultiLevelQueue
from chameleon_jax.scheduler.plan import StepPlan
from chameleon_jax.scheduler.prefetch import Prefetcher
from chameleon_jax.scheduler.prefill_shapes import PrefillShapes
from chameleon_jax.scheduler.request_size import RequestSizer
from chameleon_jax.scheduler.running import RunningSet
from chameleon_jax.scheduler.single_queue import boosted, fifo, shortest_first
from chameleon_jax.scheduler.step_budget import StepBudget
from chameleon_jax.systems import System, get_system


@dataclasses.dataclass
class SchedulerCounters:
    """Since the start: requests that were squashed for memory or because they had passed another, answered with more
    tokens than predicted, with fewer."""

    memory_squashes: int = 0
    bypass_squashes: int = 0
    underpredicted: int = 0
    overpredicted: int = 0


class Scheduler:
    """Owns the requests. Memory is the pool's and the cache's, which it asks before it acts."""

    def __init__(
        self,
        config: EngineConfig,
        page_tokens: int,
        pool: PagePool,
        cache: AdapterCache,
        predictor: LengthPredictor,
        shapes: PrefillShapes,
    ):
        self.counters = SchedulerCounters()
        self.system: System = get_system(config.system)
        self._page_tokens = page_tokens
        self._pool = pool
        self._cache = cache
        self._predictor = predictor
        self._sizer = RequestSizer(output_only=self.system.size == "output")
        self._budget = StepBudget(
            config.tbt_slo if self.system.bound_stalls else None,
            config.ttft_slo,
            learns=self.system.bound_stalls
            or self.system.order == "boost"
            or (bool(shapes.sizes) and not self.system.whole_prompts),
            slots=config.max_num_seqs,
            rank_of=self._rank,
            shapes=shapes,
        )
        self._order = self._make_order(config)
        self._running = RunningSet(page_tokens, config.max_num_batched_tokens, shapes, self.system.whole_prompts)
        self._slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._waiting: dict[str, Request] = {}
        self._wanted: Counter[str] = Counter()  # adapters of waiting requests
        self._prefetcher = Prefetcher(pool, cache, self._wanted, self.system.prefetch_predicted)
        self._steps_to_admission = 0

    def _make_order(self, config: EngineConfig) -> QueuePolicy:
        if self.system.order == "fifo":
            return fifo(self._first_pages)
        if self.system.order == "sjf":
            return shortest_first(self._first_pages)
        if self.system.order == "boost":
            return boosted(self._first_pages, self._budget.work, config.ttft_slo)
        return MultiLevelQueue(
            self._pool.capacity,
            self._first_pages,
            self._adapter_pages,
            self._missing_pages,
            config.ttft_slo,
            equal_levels=self.system.equal_levels,
            drift_test=self.system.drift_test,
        )

    @property
    def order(self) -> QueuePolicy:
        return self._order

    @property
    def waiting(self) -> Iterable[Request]:
        return self._waiting.values()

    @property
    def running(self) -> list[Request]:
        """In order of arrival."""
        return self._running.by_age

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_prefetches(self) -> int:
        return self._prefetcher.num_begun

    @property
    def num_cancelled_loads(self) -> int:
        return self._prefetcher.num_cancelled

    @property
    def num_squashes(self) -> int:
        return self.counters.memory_squashes + self.counters.bypass_squashes

    # -- requests -------------------------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Takes in a new request."""
        request.predicted_output_len = self._predictor.predict(request)
        request.size = self._sizer.size(request, self._adapter_pages(request))
        self._prefetcher.used(request, now)
        self._wait(request, now, new=True)

    def forget(self, content_hash: str) -> None:
        """Drop what was learnt of an adapter that is not registered any more."""
        self._prefetcher.forget(content_hash)
        self._predictor.forget(content_hash)

    def finish(self, request: Request, now: float) -> None:
        """Forgets a request, waiting or running, and gives back what it held."""
        state, request.state = request.state, RequestState.FINISHED
        if state is RequestState.RUNNING:
            self._running.remove(request)
            self._release(request, now)
        elif state is RequestState.WAITING:
            self._order.remove(request)
            self._stop_waiting(request)
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.counters.underpredicted += len(request.output_token_ids) > request.predicted_output_len
            self.counters.overpredicted += len(request.output_token_ids) < request.predicted_output_len
            self._predictor.observe(request)

    def _wait(self, request: Request, now: float, new: bool) -> None:
        self._waiting[request.request_id] = request
        if request.adapter is not None:
            self._wanted[request.adapter] += 1
        self._order.add(request, now, new)

    def _stop_waiting(self, request: Request) -> None:
        del self._waiting[request.request_id]
        if request.adapter is not None:
            self._wanted[request.adapter] -= 1
            if not self._wanted[request.adapter]:
                del self._wanted[request.adapter]

    def _first_pages(self, request: Request) -> int:
        """KV pages for the prompt and the output that is expected, or may come."""
        done = len(request.output_token_ids)
        if self.system.reserve_max_tokens:
            expected = request.params.max_tokens
        else:
            expected = min(request.params.max_tokens, max(request.predicted_output_len, done + 1))
        return -(-(len(request.prompt_token_ids) + expected) // self._page_tokens)

    def _adapter_pages(self, request: Request) -> int:
        return 0 if request.adapter is None else self._cache.entry(request.adapter).info.num_pages

    def _missing_pages(self, request: Request) -> int:
        """Adapter pages that the request would add to what running requests hold."""
        if request.adapter is None:
            return 0
        entry = self._cache.entry(request.adapter)
        return 0 if entry.references else entry.info.num_pages

    # -- the step -------------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan:
        """Decides the next step and books it: positions advance as if it had run."""
        plan = StepPlan()
        self._apply_length_updates(now)
        self._prefetcher.cancel(plan)
        if not self.system.keep_idle:
            self._cache.evict_idle(keep=self._wanted)
        self._preempt_bypasser(now)
        self._running.plan_decodes(plan, lambda request, pages: self._grow(request, pages, now))
        budget = self._budget.decodes_planned(plan, self._longest_wait(now))
        if self._admit(plan, budget, now):
            self._prefetcher.load_ahead(plan, self._order, len(self._running), now)
        self._running.plan_prefills(plan, budget, self._budget.prefill_seconds, self._budget.pass_tokens)
        self._budget.prefills_planned(plan)
        return plan

    def ran(self, plan: StepPlan, seconds: float) -> None:
        """A step took that long."""
        self._budget.ran(plan, seconds)

    def _longest_wait(self, now: float) -> float:
        """Seconds since the first of the waiting requests came."""
        first = next(iter(self._waiting.values()), None)
        return 0.0 if first is None else now - first.arrival_time

    def _rank(self, request: Request) -> int:
        return 0 if request.adapter is None else self._cache.entry(request.adapter).info.rank

    def _apply_length_updates(self, now: float) -> None:
        for request, tokens in self._predictor.updates():
            if request.state is RequestState.WAITING:
                self._order.remove(request)
                request.predicted_output_len = tokens
                request.size = self._sizer.size(request, self._adapter_pages(request))
                self._order.add(request, now, new=False)

    def _admit(self, plan: StepPlan, budget: float, now: float) -> bool:
        """Starts requests. False where one that could run lacks memory."""
        self._steps_to_admission -= 1
        if not self._waiting or (self._steps_to_admission > 0 and len(self._running)):
            return True
        self._steps_to_admission = self.system.admission_interval
        batch = self._new_batch(budget)
        self._order.admit(batch, self.running, now)
        for request in batch.await_adapters:
            if request.metrics.adapter_awaited_since is None:
                request.metrics.adapter_awaited_since = now
        self._commit(batch, plan, now)
        return not batch.lacks_memory

    def _new_batch(self, budget: float) -> Batch:
        """Takes as many prompts as the steps until the next admission can prefill: tokens, or time where that is bounded."""
        if budget < float("inf"):
            room = budget - self._running.prompts_left(self._budget.prefill_seconds)
            prompt_of = self._budget.prompt_seconds
        else:
            room = self._running.step_tokens * self.system.admission_interval
            room -= self._running.prompts_left(lambda request, tokens: tokens)
            prompt_of = _known_tokens
        return Batch(self._pool, self._cache, len(self._slots), room, prompt_of, self.system.overlap_loads)

    def _commit(self, batch: Batch, plan: StepPlan, now: float) -> None:
        if batch.pages and not self._cache.reserve(batch.pages, now, keep=batch.keep, wanted=self._wanted):
            raise AssertionError(f"a batch of {batch.pages} pages was agreed to and does not fit")
        for adapter in batch.loads:
            self._prefetcher.begin(adapter, plan)
        awaited = set()
        for request in batch.starts:
            self._start(request, now)
            if request.adapter is not None and self._cache.entry(request.adapter).tier is AdapterTier.LOADING:
                awaited.add(request.adapter)
        plan.awaited = sorted(awaited)

    def _start(self, request: Request, now: float) -> None:
        if request.adapter is not None:
            self._cache.acquire(request.adapter, now)
        metrics = request.metrics
        if metrics.first_scheduled_time is None:
            metrics.first_scheduled_time = now
            if metrics.adapter_awaited_since is not None:
                metrics.adapter_wait = now - metrics.adapter_awaited_since
            if request.adapter is not None:
                self._cache.counters.hits += bool(metrics.adapter_was_resident)
                self._cache.counters.misses += not metrics.adapter_was_resident
        request.pages = array("i", self._pool.extend_kv(request.request_id, self._first_pages(request)))
        request.slot = self._slots.pop()
        self._stop_waiting(request)
        self._running.add(request)

    # -- memory ---------------------------------------------------------------------------------------------------------

    def _preempt_bypasser(self, now: float) -> None:
        """Squashes a request that passed another which could run in its place."""
        victim = self._order.victim(self._pool.num_free + self._cache.idle_pages)
        if victim is not None:
            self.counters.bypass_squashes += 1
            self._squash(victim, now)

    def _grow(self, request: Request, pages: int, now: float) -> bool:
        """Makes room for the request's next token; False where it has to wait or was squashed itself."""
        while not self._cache.reserve(pages, now, wanted=self._wanted):
            victim = self.running[-1]
            if victim is request and len(self.running) == 1:
                return False  # only a load under way can hold the pages it lacks; it will end
            self.counters.memory_squashes += 1
            self._squash(victim, now)
            if victim is request:
                return False
        request.pages.extend(self._pool.extend_kv(request.request_id, pages))
        return True

    def _squash(self, request: Request, now: float) -> None:
        """RUNNING -> WAITING, ahead of all of its queue that arrived later."""
        self._running.remove(request)
        request.state = RequestState.WAITING
        self._release(request, now)
        request.num_computed = 0
        request.metrics.num_squashes += 1
        self._wait(request, now, new=False)

    def restart(self, now: float) -> None:
        """What was dispatched is lost: who ran waits again."""
        for request in reversed(self.running):
            self._squash(request, now)

    def _release(self, request: Request, now: float) -> None:
        self._pool.free_kv(request.request_id)
        request.pages = array("i")
        self._slots.append(request.slot)
        request.slot = -1
        if request.adapter is not None:
            self._cache.release(request.adapter, now)
        self._order.ended(request, now)


def _known_tokens(request: Request) -> float:
    return request.num_known
