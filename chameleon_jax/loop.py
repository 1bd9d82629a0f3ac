"""The serving loop. Each step takes requests in, schedules, runs, and hands out tokens.

The host runs one step behind the device: step n + 1 is dispatched before the tokens of step n are read, so the device never
waits for the host. A request that turns out to have ended computes one token too many, which is dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from chameleon_jax import output_processor
from chameleon_jax.config import EngineConfig
from chameleon_jax.errors import DuplicateRequest, InvalidValue, QueueFull
from chameleon_jax.executor import Executor, LoadResult
from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapter_registry import AdapterRegistry
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler import Scheduler, StepPlan
from chameleon_jax.scheduler.cycles import CycleScheduler
from chameleon_jax.scheduler.length_predictor import HistoryPredictor, LengthPredictor
from chameleon_jax.scheduler.step_shapes import ANY_SIZE, StepShapes
from chameleon_jax.systems import get_system


@dataclasses.dataclass
class LoopCounters:
    """Counts since the loop was made.

    Attributes:
        steps: Steps dispatched.
        generation_tokens: Tokens handed out.
        prefill_tokens: Prompt tokens computed; preempted requests count again.
        decode_rows: Rows decoded.
        finished: Requests that ended.
        load_wait_s: Seconds for which steps were held back by loads.
        faults: Device failures that the loop has recovered from.
    """

    steps: int = 0
    generation_tokens: int = 0
    prefill_tokens: int = 0
    decode_rows: int = 0
    finished: int = 0
    load_wait_s: float = 0.0
    faults: int = 0


class ServingLoop:
    """Drives an executor. Not thread-safe: one thread owns it.

    Args:
        num_pages: Pages of the pool, the trash page included. The device's may be larger.
        page_tokens: Tokens of a page.
        max_model_len: Longest sequence, prompt and output, in tokens.
        shapes: Sizes of the steps for which the device has programs.
        clock: Seconds, monotonic; the simulator passes its own.
        predictor: Predictor of output lengths; None takes each adapter's own history.

    Attributes:
        adapters: Adapters by name.
        cache: Their residency in the pool.
        awaits_load: The last step did nothing, as every unfinished request waits for an adapter.
        ended_loads: The latest loads that ended; their reader takes them out.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        num_pages: int,
        *,
        page_tokens: int,
        max_model_len: int,
        shapes: StepShapes = ANY_SIZE,
        clock: Callable[[], float] = time.monotonic,
        predictor: LengthPredictor | None = None,
    ):
        self.config = config
        self.executor = executor
        self.pool = PagePool(num_pages)
        system = get_system(config.system)
        self.cache = AdapterCache(self.pool, system.eviction, self._forget_adapter)
        self.adapters = AdapterRegistry(self.cache, clock, self._largest_need)
        predictor = predictor or HistoryPredictor(config.predicted_output_len)
        make_scheduler = CycleScheduler if system.cycles else Scheduler
        self.scheduler: Scheduler = make_scheduler(config, page_tokens, self.cache, predictor, shapes)
        self.counters = LoopCounters()
        self.max_model_len = max_model_len
        self.awaits_load = False
        self.ended_loads: deque[LoadResult] = deque(maxlen=1024)
        self._page_tokens = page_tokens
        self._clock = clock
        self._requests: dict[str, Request] = {}
        self._orders = 0
        self._in_flight: deque[tuple[Any, StepPlan, float, int | None]] = deque()  # dispatched steps whose tokens were not read
        self._collected_at = 0.0
        self._learnt_beside = False  # the last step that was learnt from ran beside compilations
        self._undrawn: Any = None  # the last dispatched step, until its tokens are drawn
        self._pending: StepPlan | None = None  # planned and not dispatched: an interrupt came while it waited
        self._updated: list[Request] = []  # for the next return of `step`
        self._failed = False

    # -- requests -------------------------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> list[Request]:
        """Unfinished requests, in order of arrival."""
        return list(self._requests.values())

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has work. True while adapters load, too, so that loads no request wants any more are cancelled."""
        return bool(self._requests or self._in_flight or self._updated or self.cache.num_loading)

    def submit(self, request: Request) -> None:
        """Take a request in.

        Raises:
            ValueError: The request could never run; says why.
            QueueFull: max_queue_len requests wait already.
        """
        if request.request_id in self._requests:
            raise DuplicateRequest(f"request_id is {request.request_id!r}; a request of that id is running")
        if not request.prompt_token_ids:
            raise InvalidValue("prompt", "prompt is empty; allowed: at least one token")
        if request.max_total_tokens > self.max_model_len:
            prompt, output, most = len(request.prompt_token_ids), request.params.max_tokens, self.max_model_len
            text = f"prompt and max_tokens are {prompt} + {output} tokens; allowed: {most} together (max_model_len)"
            raise InvalidValue("max_tokens" if prompt < most else "prompt", text)
        pages = self._most_pages(request)
        if pages > self.pool.capacity - self.cache.pinned_pages(request.adapter):
            raise ValueError(
                f"the request needs up to {pages} pages for its tokens and adapter; the pool has {self.pool.capacity}, "
                f"of which {self.cache.pinned_pages(request.adapter)} hold other pinned adapters"
            )
        limit = self.config.max_queue_len
        if limit is not None and self.scheduler.num_waiting >= limit:
            raise QueueFull(f"{limit} requests wait (max_queue_len)")
        if request.adapter is not None:
            self.cache.add_request(request.adapter)
        request.order = self._orders = self._orders + 1
        self._requests[request.request_id] = request
        self.scheduler.add(request, self._clock())

    def abort(self, request_id: str) -> Request | None:
        """End a request now; return it, or None where no request has that id."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, FinishReason.ABORT)
        return request

    def _most_pages(self, request: Request) -> int:
        adapter = 0 if request.adapter is None else self.cache.entry(request.adapter).info.num_pages
        return -(-request.max_total_tokens // self._page_tokens) + adapter

    def _largest_need(self, besides: str) -> int:
        """Pages that the largest unfinished request may take, requests of the adapter `besides` left out."""
        return max((self._most_pages(r) for r in self._requests.values() if r.adapter != besides), default=0)

    # -- the step -------------------------------------------------------------------------------------------------------

    def step(self, wait: bool = True) -> list[Request]:
        """Run one step of the loop, and return the requests that have new tokens or ended.

        An interrupt while it waits for the device loses nothing: the next call goes on.

        Args:
            wait: Wait for an adapter where nothing can run before one is there. False returns at once.

        Raises:
            RuntimeError: An earlier call failed between planning and dispatch, and `recover` was not called since.
        """
        if self._failed:
            raise RuntimeError("an earlier step failed; recover, or start a new engine")
        self._draw()
        self._finish_loads()
        plan = self._pending or self._plan()
        if plan.awaited:
            self._await_loads(plan)
        self._dispatch(plan)
        self.awaits_load = not plan.runs and not self._in_flight and self.has_unfinished
        if wait and self.awaits_load:
            self._finish_loads(wait=True)
        if plan.runs:
            self._draw()
        else:
            self._collect()
        updated, self._updated = self._updated, []
        return updated

    def recover(self) -> None:
        """Go on after `step` has raised, from an empty pool.

        Dispatched steps are lost. Requests that ran wait again and are recomputed to the same output; waiting ones keep their
        places. An error that this raises is final.
        """
        self.executor.reset()
        self._in_flight.clear()
        self._undrawn = None
        self._pending = None
        for request in self._requests.values():
            request.num_in_flight = 0
        for request in self.scheduler.running:
            request.metrics.num_faults += 1
        self.scheduler.restart(self._clock())
        self.cache.lose()
        self.cache.sweep()
        self.counters.faults += 1
        self._failed = False

    def _plan(self) -> StepPlan:
        with self._fatal():
            self._pending = plan = self.scheduler.plan(self._clock())
            for content_hash in plan.cancels:
                self.executor.cancel_load(content_hash)
        self.cache.sweep()
        return plan

    def _await_loads(self, plan: StepPlan) -> None:
        """Hold a step back, the device idle, until its adapters are there, as in systems that copy on the compute stream.

        Requests that have ended meanwhile leave the plan.
        """
        self._collect()
        begin = self._clock()
        self._begin_loads(plan)
        while any(a in self.cache and self.cache.entry(a).tier is AdapterTier.LOADING for a in plan.awaited):
            self._finish_loads(wait=True)
        waited = self._clock() - begin
        self.counters.load_wait_s += waited
        plan.prefills = [chunk for chunk in plan.prefills if chunk.request.state is RequestState.RUNNING]
        plan.decodes = [request for request in plan.decodes if request.state is RequestState.RUNNING]
        for chunk in plan.prefills:
            if chunk.request.adapter in plan.awaited:
                chunk.request.metrics.adapter_wait += waited

    def _begin_loads(self, plan: StepPlan) -> None:
        with self._fatal():
            for content_hash, pages in plan.loads:
                self.executor.begin_load(content_hash, pages)
        plan.loads = []

    def _dispatch(self, plan: StepPlan) -> None:
        self._begin_loads(plan)
        if plan.runs:
            with self._fatal():
                handle = self.executor.dispatch(plan)
                self._in_flight.append((handle, plan, self._clock(), self.executor.num_compiled))
                self._undrawn = handle
        self._pending = None
        self.counters.steps += plan.runs
        self.counters.prefill_tokens += sum(chunk.num_tokens for chunk in plan.prefills)
        self.counters.decode_rows += len(plan.decodes)

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """Mark the loop as failed when the body raises: the plan is half done, and no step can go on from there."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _draw(self) -> None:
        """Draw the tokens of the step dispatched last, once the ones before it are collected."""
        if self._undrawn is not None:
            self._collect(leave=1)
            with self._fatal():
                self.executor.draw(self._undrawn)
            self._undrawn = None

    def _collect(self, leave: int = 0) -> None:
        """Wait for the steps in flight, except the last `leave`, and hand out their tokens."""
        while len(self._in_flight) > leave:
            handle, plan, dispatched_at, num_compiled = self._in_flight[0]
            tokens = self.executor.collect(handle)
            self._in_flight.popleft()
            now = self._clock()
            if num_compiled == self.executor.num_compiled:  # else a compilation took the seconds
                self._learn(plan, now - max(dispatched_at, self._collected_at), beside=num_compiled is None)
            self._collected_at = now
            for request in output_processor.process(tokens, now):
                self.counters.generation_tokens += 1
                self._updated.append(request)
                if request.finish_reason is not None:
                    self._remove(request)

    def _learn(self, plan: StepPlan, seconds: float, beside: bool) -> None:
        """Let the scheduler learn from a step. Steps beside compilations take longer than the steps to come."""
        if self._learnt_beside and not beside:
            self.scheduler.forget_steps()
        self._learnt_beside = beside
        self.scheduler.observe_step(plan, seconds)

    def _finish_loads(self, wait: bool = False) -> None:
        for result in self.executor.poll_loads(wait):
            self.ended_loads.append(result)
            if result.error is None:
                self.cache.finish_load(result.content_hash, result.num_bytes, result.seconds)
                continue
            self.cache.fail_load(result.content_hash)
            for request in [r for r in self._requests.values() if r.adapter == result.content_hash]:
                self._finish(request, FinishReason.ERROR, f"its adapter could not be loaded: {result.error}")
                self._updated.append(request)
        self.cache.sweep()

    def _finish(self, request: Request, reason: FinishReason, stop_reason: str | None = None) -> None:
        output_processor.finish(request, reason, stop_reason)
        self._remove(request)

    def _remove(self, request: Request) -> None:
        """Give up all that a request holds, once it has a `finish_reason`."""
        now = self._clock()
        request.metrics.finished_time = now
        self.scheduler.finish(request, now)
        del self._requests[request.request_id]
        self.counters.finished += 1
        if request.adapter is not None:
            self.cache.remove_request(request.adapter)

    def _forget_adapter(self, content_hash: str) -> None:
        self.scheduler.forget(content_hash)
        self.executor.forget(content_hash)
