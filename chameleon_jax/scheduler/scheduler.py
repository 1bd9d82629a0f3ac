"""Plans steps: which requests start, which tokens are computed, which adapters move.

The scheduler is common to all systems; its `QueuePolicy` decides which waiting request starts next. Memory is taken first from
free pages, then from idle adapters, then from the youngest running request of the lowest class. That request is preempted: it
waits again and recomputes its tokens, to the same output.
"""

from __future__ import annotations

from array import array

from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler.admission import AdmissionBatch
from chameleon_jax.scheduler.length_predictor import LengthPredictor
from chameleon_jax.scheduler.level_planner import LevelPlanner
from chameleon_jax.scheduler.multilevel import MultiLevelQueue
from chameleon_jax.scheduler.plan import StepPlan
from chameleon_jax.scheduler.prefetch import PREFETCH_DEPTH, Prefetcher
from chameleon_jax.scheduler.queue_policy import QueuePolicy
from chameleon_jax.scheduler.request_size import PageNeeds, RequestSizer
from chameleon_jax.scheduler.running import RunningSet
from chameleon_jax.scheduler.single_queue import boosted, fifo, shortest_first
from chameleon_jax.scheduler.stats import SchedulerCounters
from chameleon_jax.scheduler.step_budget import StepBudget
from chameleon_jax.scheduler.step_shapes import StepShapes
from chameleon_jax.scheduler.waiting import WaitingSet
from chameleon_jax.systems import System, get_system

PATIENCE = 0.5
"""Part of the target for the time to first token after which prompts are unbounded: from then on the rest of it is needed."""


class Scheduler:
    """Owns the waiting and running requests. The pool and the cache own memory, and are asked before anything is done.

    Attributes:
        counters: counts since the scheduler was made.
        system: the policies in use.
        policy: order in which waiting requests start.

    Args:
        config: limits, targets and the system.
        page_tokens: tokens of a page.
        cache: the adapters, and the pool that they share with KV.
        predictor: predictor of output lengths.
        shapes: sizes of the steps for which the device has programs.
    """

    def __init__(
        self, config: EngineConfig, page_tokens: int, cache: AdapterCache, predictor: LengthPredictor, shapes: StepShapes
    ):
        self.counters = SchedulerCounters()
        self.system: System = get_system(config.system)
        self._page_tokens = page_tokens
        self._pool = cache.pool
        self._cache = cache
        self._predictor = predictor
        self._sizer = RequestSizer(output_only=self.system.size == "output")
        self._needs = PageNeeds(cache, page_tokens, self.system.reserve)
        self._budget = StepBudget(
            config.tbt_slo if self.system.bound_stalls else None,
            PATIENCE * config.ttft_slo,
            learns=self.system.bound_stalls or self.system.order == "boost" or bool(shapes.sizes),
            slots=config.max_num_seqs,
            rank_of=self._rank,
            shapes=shapes,
        )
        self.policy = self._make_policy(config)
        self._waiting = WaitingSet()
        self._running = RunningSet(page_tokens, config.max_num_batched_tokens, shapes)
        self._slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._prefetcher = Prefetcher(cache, self._waiting.adapters, self.counters, self.system.prefetch_predicted)

    def _make_policy(self, config: EngineConfig) -> QueuePolicy:
        if self.system.order == "fifo":
            return fifo(self._needs.kv)
        if self.system.order == "sjf":
            return shortest_first(self._needs.kv)
        if self.system.order == "boost":
            return boosted(self._needs.kv, self._budget.work, config.ttft_slo)
        system = self.system
        planner = LevelPlanner(self._pool.capacity, config.ttft_slo, self.counters, system.equal_levels, system.drift_test)
        return MultiLevelQueue(self._needs, planner)

    @property
    def running(self) -> list[Request]:
        """Running requests in order of arrival."""
        return self._running.by_age

    @property
    def num_waiting(self) -> int:
        """Requests that wait to start."""
        return len(self._waiting)

    # -- the step -------------------------------------------------------------------------------------------------------

    def plan(self, now: float) -> StepPlan:
        """Decide the next step and book it: positions advance as if it had run."""
        plan = StepPlan()
        self._apply_length_updates(now)
        self._prefetcher.cancel_unwanted(plan)
        if not self.system.keep_idle:
            self._cache.evict_idle(keep=self._waiting.adapters)
        self._preempt_bypasser(now)
        self._running.plan_decodes(plan, lambda request, pages: self._grow(request, pages, now))
        budget = self._budget.bound_prefills(plan, max(self._waiting.longest_wait(now), self._running.longest_wait(now)))
        if self._admit(plan, budget, now):
            upcoming = self.policy.upcoming(PREFETCH_DEPTH) if self._waiting.adapters else ()
            self._prefetcher.load_ahead(plan, upcoming, len(self._running), now)
        pass_tokens = self._budget.pass_tokens(decodes=bool(plan.decodes))
        self._running.plan_prefills(plan, budget, self._budget.prefill_seconds, pass_tokens)
        self._budget.note_prefills(plan)
        return plan

    def observe_step(self, plan: StepPlan, seconds: float) -> None:
        """Learn from a planned step that took so many seconds."""
        self._budget.observe_step(plan, seconds)

    def forget_steps(self) -> None:
        """Forget the seconds of all steps so far, as the device has changed."""
        self._budget.forget_steps()

    def _apply_length_updates(self, now: float) -> None:
        """Queue waiting requests anew by later predictions of their output lengths."""
        for request, tokens in self._predictor.updates():
            if request.state is RequestState.WAITING:
                self.policy.remove(request)
                self._set_predicted_len(request, tokens)
                self.policy.add(request, now, new=False)
                self.counters.length_updates += 1

    def _preempt_bypasser(self, now: float) -> None:
        """Squash a request that passed an older one which could run in its place."""
        victim = self.policy.victim(self._pool.num_free + self._cache.idle_pages)
        if victim is not None:
            self._preempt(victim, now)

    def _grow(self, request: Request, pages: int, now: float) -> bool:
        """Hand a request more pages; False where it has to wait for them or was preempted itself."""
        while not self._cache.reserve(pages, now, wanted=self._waiting.adapters):
            victim = max(self.running, key=lambda running: (running.priority, running.order))
            if victim is request and len(self.running) == 1:
                return False  # only a load under way can hold the pages it lacks; it will end
            self.counters.memory_preemptions += 1
            victim.priority = min(victim.priority, request.priority)  # else ever new higher classes would keep it from its end
            self._preempt(victim, now)
            if victim is request:
                return False
        request.pages.extend(self._pool.extend_kv(request.request_id, pages))
        return True

    def _admit(self, plan: StepPlan, budget: float, now: float) -> bool:
        """Start waiting requests; False where one that could run lacks memory."""
        if not self._waiting:
            return True
        batch = self._new_batch(budget)
        self.policy.admit(batch, self.running, now)
        for request in batch.await_adapters:
            if request.metrics.adapter_awaited_since is None:
                request.metrics.adapter_awaited_since = now
        self._start_batch(batch, plan, now)
        return not batch.lacks_memory

    def _new_batch(self, budget: float) -> AdmissionBatch:
        """Make a batch with room for the prompts that the next step can prefill.

        The room is in tokens, or in seconds where `budget` bounds the step.
        """
        if budget < float("inf"):
            room = budget - self._running.prompts_left(self._budget.prefill_seconds)
            prompt_of = self._budget.prompt_seconds
        else:
            room = self._running.step_tokens - self._running.prompts_left(lambda request, tokens: tokens)
            prompt_of = known_tokens
        return AdmissionBatch(self._cache, len(self._slots), room, prompt_of, self.system.overlap_loads)

    def _start_batch(self, batch: AdmissionBatch, plan: StepPlan, now: float) -> None:
        if batch.pages and not self._cache.reserve(batch.pages, now, keep=batch.keep, wanted=self._waiting.adapters):
            raise AssertionError(f"a batch of {batch.pages} pages was agreed to and does not fit")
        for adapter in batch.loads:
            self._prefetcher.begin(adapter, plan)
        for request in batch.starts:
            self._start(request, now)
        adapters = {request.adapter for request in batch.starts if request.adapter is not None}
        plan.awaited = sorted(a for a in adapters if self._cache.entry(a).tier is AdapterTier.LOADING)

    def _start(self, request: Request, now: float) -> None:
        if request.adapter is not None:
            self._cache.acquire(request.adapter, now)
        if request.metrics.first_scheduled_time is None:
            self._record_start(request, now)
        request.pages = array("i", self._pool.extend_kv(request.request_id, self._needs.kv(request)))
        request.slot = self._slots.pop()
        self._waiting.remove(request)
        self._running.add(request)

    def _record_start(self, request: Request, now: float) -> None:
        """Note a request's first start in its metrics and in the cache's."""
        metrics = request.metrics
        metrics.first_scheduled_time = now
        if metrics.adapter_awaited_since is not None:
            metrics.adapter_wait = now - metrics.adapter_awaited_since
        if request.adapter is not None:
            self._cache.counters.hits += bool(metrics.adapter_was_resident)
            self._cache.counters.misses += not metrics.adapter_was_resident

    # -- requests -------------------------------------------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        """Queue a new request."""
        self._set_predicted_len(request, self._predictor.predict(request))
        self._prefetcher.record_use(request, now)
        self._wait(request, now, new=True)

    def finish(self, request: Request, now: float) -> None:
        """Drop a request, waiting or running, and free its memory and slot."""
        state, request.state = request.state, RequestState.FINISHED
        if state is RequestState.RUNNING:
            self._running.remove(request)
            self._release(request, now)
        elif state is RequestState.WAITING:
            self.policy.remove(request)
            self._waiting.remove(request)
        if request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self.counters.underpredicted += len(request.output_token_ids) > request.predicted_output_len
            self.counters.overpredicted += len(request.output_token_ids) < request.predicted_output_len
            self._predictor.observe(request)

    def forget(self, content_hash: str) -> None:
        """Drop the histories of an adapter that is no longer known."""
        self._prefetcher.forget(content_hash)
        self._predictor.forget(content_hash)

    def restart(self, now: float) -> None:
        """Preempt all running requests, since the steps dispatched for them are lost."""
        for request in reversed(self.running):
            self._preempt(request, now)

    def _preempt(self, request: Request, now: float) -> None:
        """Send a running request back to wait, ahead of all of its queue that arrived later."""
        self._running.remove(request)
        request.state = RequestState.WAITING
        self._release(request, now)
        request.num_computed = 0
        request.metrics.num_preemptions += 1
        self._wait(request, now, new=False)

    def _wait(self, request: Request, now: float, new: bool) -> None:
        self._waiting.add(request)
        self.policy.add(request, now, new)

    def _release(self, request: Request, now: float) -> None:
        """Free the pages, the slot and the adapter of a request that stopped running."""
        self._pool.free_kv(request.request_id)
        request.pages = array("i")
        self._slots.append(request.slot)
        request.slot = -1
        if request.adapter is not None:
            self._cache.release(request.adapter, now)
        self.policy.release(request, now)

    def _set_predicted_len(self, request: Request, tokens: int) -> None:
        request.predicted_output_len = tokens
        request.size = self._sizer.size(request, self._needs.adapter(request))

    def _rank(self, request: Request) -> int:
        return 0 if request.adapter is None else self._cache.entry(request.adapter).info.rank


def known_tokens(request: Request) -> float:
    """Count the tokens that the request computes before it decodes."""
    return request.num_known
