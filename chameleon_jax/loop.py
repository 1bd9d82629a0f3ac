"""The one step of the system: take in, schedule, run, hand out.

The host runs one step behind the device: step n + 1 is dispatched before the tokens of step n are looked at, so that the
device never waits for the host. A request that turns out to have ended computes one token too many, which is dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from chameleon_jax.config import EngineConfig
from chameleon_jax.errors import DuplicateRequest, QueueFull
from chameleon_jax.executor import Executor, LoadResult, SampledToken
from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterInfo, AdapterTier
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.output_processor import cut_at_stop
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler import Scheduler, StepPlan
from chameleon_jax.scheduler.length_predictor import HistoryPredictor, LengthPredictor
from chameleon_jax.scheduler.prefill_shapes import ANY_SIZE, PrefillShapes
from chameleon_jax.systems import get_system


@dataclasses.dataclass
class LoopCounters:
    """Since the start: steps dispatched, tokens handed out, prompt tokens computed, rows decoded, requests that ended, seconds
    for which steps were held back by loads, bytes and seconds of loads that succeeded, failures of the device that were
    outlived."""

    steps: int = 0
    generation_tokens: int = 0
    prefill_tokens: int = 0
    decode_rows: int = 0
    finished: int = 0
    load_wait: float = 0.0
    load_bytes: int = 0
    load_seconds: float = 0.0
    faults: int = 0


class ServingLoop:
    """Drives an executor. Not thread-safe: one thread owns it.

    Args:
        shapes: in which the device prefills.
        clock: seconds, monotonic; the simulator passes its own.
        predictor: of output lengths; None: each adapter's own history.
        forget: called with the content hash of an adapter that nothing needs any more.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        pool: PagePool,
        *,
        page_tokens: int,
        max_model_len: int,
        shapes: PrefillShapes = ANY_SIZE,
        clock: Callable[[], float] = time.monotonic,
        predictor: LengthPredictor | None = None,
        forget: Callable[[str], None] = lambda content_hash: None,
    ):
        self.config = config
        self.executor = executor
        self.pool = pool
        self.cache = AdapterCache(pool, get_system(config.system).eviction)
        predictor = predictor or HistoryPredictor(config.predicted_output_len)
        self.scheduler = Scheduler(config, page_tokens, pool, self.cache, predictor, shapes)
        self.counters = LoopCounters()
        self.max_model_len = max_model_len
        self.awaits_load = False  # the last step did nothing, as whoever is left waits for an adapter
        self.ended_loads: deque[LoadResult] = deque(maxlen=1024)  # the last ones; whoever watches takes them out
        self._page_tokens = page_tokens
        self._clock = clock
        self._forget = forget
        self._requests: dict[str, Request] = {}
        self._orders = 0
        self._in_flight: deque[tuple[Any, StepPlan, float]] = deque()  # dispatched steps whose tokens were not looked at
        self._collected_at = 0.0
        self._pending: StepPlan | None = None  # planned and not dispatched: an interrupt came while it waited
        self._updated: list[Request] = []  # what the next return of `step` reports
        self._failed = False

    # -- requests -------------------------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> list[Request]:
        """In order of arrival."""
        return list(self._requests.values())

    @property
    def has_unfinished(self) -> bool:
        """Also while adapters load, so that what nobody wants any more is given up."""
        return bool(self._requests or self._in_flight or self._updated or self.cache.num_loading)

    def submit(self, request: Request) -> None:
        """Takes a request in.

        Raises:
            ValueError: the request could never run; says why.
            QueueFull: nothing is wrong with it, but too many wait.
        """
        if request.request_id in self._requests:
            raise DuplicateRequest(f"request_id is {request.request_id!r}; a request of that id is running")
        if not request.prompt_token_ids:
            raise ValueError("prompt is empty; allowed: at least one token")
        if request.max_total_tokens > self.max_model_len:
            raise ValueError(
                f"prompt and max_tokens are {len(request.prompt_token_ids)} + {request.params.max_tokens} tokens; "
                f"allowed: {self.max_model_len} together (max_model_len)"
            )
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
            self.cache.hold(request.adapter)
        request.order = self._orders = self._orders + 1
        self._requests[request.request_id] = request
        self.scheduler.add(request, self._clock())

    def abort(self, request_id: str) -> Request | None:
        """Ends a request now; returns it, or None where there is none of that id."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, FinishReason.ABORT, None)
        return request

    # -- adapters -------------------------------------------------------------------------------------------------------

    def add_adapter(self, info: AdapterInfo) -> None:
        self.cache.add(info, self._clock())

    def remove_adapter(self, content_hash: str) -> None:
        """Requests that were submitted with the adapter still finish with it; then its memory is free."""
        for gone in self.cache.remove(content_hash):
            self._forgotten(gone)

    def pin_adapter(self, content_hash: str, pinned: bool = True) -> None:
        """A pinned adapter never leaves the pool once it is there. Raises as `check_pin`."""
        if pinned:
            self.check_pin(self.cache.entry(content_hash).info)
        self.cache.pin(content_hash, pinned)

    def check_pin(self, info: AdapterInfo, replaced: str | None = None) -> None:
        """Whether an adapter, known or not yet, may be pinned, in the place of one that is `replaced` or beside all others.
        Raises ValueError where a live request could then starve."""
        taken = self.cache.pinned_pages(info.content_hash, replaced) + info.num_pages
        needs = [self._most_pages(r) for r in self._requests.values() if r.adapter != info.content_hash]
        if taken + max(needs, default=0) > self.pool.capacity or taken > self.pool.capacity // 2:
            raise ValueError(
                f"pinned adapters would take {taken} of {self.pool.capacity} pages; allowed: half, and room for every "
                f"request (the largest needs {max(needs, default=0)})"
            )

    def _most_pages(self, request: Request) -> int:
        adapter = 0 if request.adapter is None else self.cache.entry(request.adapter).info.num_pages
        return -(-request.max_total_tokens // self._page_tokens) + adapter

    # -- the step -------------------------------------------------------------------------------------------------------

    def step(self, wait: bool = True) -> list[Request]:
        """One round. Returns the requests that have new tokens or ended.

        An interrupt while it waits for the device loses nothing: the next call goes on.

        Args:
            wait: where nothing can run before an adapter is there, wait for one. False: return at once.

        Raises:
            RuntimeError: an earlier call failed between planning and dispatch, so what was planned did not run, and nobody
                called `recover` since.
        """
        if self._failed:
            raise RuntimeError("an earlier step failed; recover, or start a new engine")
        self._finish_loads()
        plan = self._pending or self._plan()
        if plan.awaited:
            self._await_loads(plan)
        self._dispatch(plan)
        self.awaits_load = not plan.runs and not self._in_flight and self.has_unfinished
        if wait and self.awaits_load:
            self._finish_loads(wait=True)
        self._collect(leave=int(plan.runs))
        updated, self._updated = self._updated, []
        return updated

    def recover(self) -> None:
        """Goes on after `step` has raised: what was dispatched is lost and the pool is empty. Requests that ran wait again and
        are recomputed to the same output; the others are where they were. What this raises cannot be recovered from."""
        self.executor.reset()
        self._in_flight.clear()
        self._pending = None
        for request in self._requests.values():
            request.num_in_flight = 0
        for request in self.scheduler.running:
            request.metrics.num_faults += 1
        self.scheduler.restart(self._clock())
        self.cache.lose()
        self._sweep()
        self.counters.faults += 1
        self._failed = False

    def _plan(self) -> StepPlan:
        with self._fatal():
            self._pending = plan = self.scheduler.plan(self._clock())
            for content_hash in plan.cancels:
                self.executor.cancel_load(content_hash)
        self._sweep()
        return plan

    def _await_loads(self, plan: StepPlan) -> None:
        """Holds a step back, the device idle, until the adapters it needs are there: how systems serve that copy adapters on
        the stream they compute on. Requests that have ended meanwhile leave the plan."""
        self._collect()
        begin = self._clock()
        self._begin_loads(plan)
        while any(a in self.cache and self.cache.entry(a).tier is AdapterTier.LOADING for a in plan.awaited):
            self._finish_loads(wait=True)
        waited = self._clock() - begin
        self.counters.load_wait += waited
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
                self._in_flight.append((self.executor.dispatch(plan), plan, self._clock()))
        self._pending = None
        self.counters.steps += plan.runs
        self.counters.prefill_tokens += sum(chunk.num_tokens for chunk in plan.prefills)
        self.counters.decode_rows += len(plan.decodes)

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """What is raised inside leaves the plan half done: nothing can go on from there."""
        try:
            yield
        except BaseException:
            self._failed = True
            raise

    def _collect(self, leave: int = 0) -> None:
        """Waits for the steps in flight, except the last `leave`, and hands out their tokens."""
        while len(self._in_flight) > leave:
            handle, plan, dispatched_at = self._in_flight[0]
            tokens = self.executor.collect(handle)
            self._in_flight.popleft()
            now = self._clock()
            self.scheduler.observe_step(plan, now - max(dispatched_at, self._collected_at))
            self._collected_at = now
            self._hand_out(tokens)

    def _finish_loads(self, wait: bool = False) -> None:
        for result in self.executor.poll_loads(wait):
            self.ended_loads.append(result)
            if result.error is None:
                self.cache.finish_load(result.content_hash)
                self.counters.load_bytes += result.num_bytes
                self.counters.load_seconds += result.seconds
                continue
            self.cache.fail_load(result.content_hash)
            for request in [r for r in self._requests.values() if r.adapter == result.content_hash]:
                self._finish(request, FinishReason.ERROR, f"its adapter could not be loaded: {result.error}")
                self._updated.append(request)
        self._sweep()

    def _sweep(self) -> None:
        for gone in self.cache.sweep():
            self._forgotten(gone)

    def _forgotten(self, content_hash: str) -> None:
        self.scheduler.forget(content_hash)
        self._forget(content_hash)

    def _hand_out(self, tokens: list[SampledToken]) -> None:
        now = self._clock()
        for sampled in tokens:
            request = sampled.request
            request.num_in_flight -= 1
            if request.state is not RequestState.FINISHED:
                self._append(request, sampled, now)
                self._updated.append(request)

    def _append(self, request: Request, sampled: SampledToken, now: float) -> None:
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = now
        self.counters.generation_tokens += 1
        token, params = sampled.token_id, request.params
        request.output_token_ids.append(token)
        if sampled.logprobs is not None:
            request.logprobs.append(sampled.logprobs)
        stops = token in request.stop_ids
        if request.stream is not None and (not stops or params.include_stop_str_in_output):
            searched = len(request.text)
            request.text += request.stream.append(token)
            if self._cut_at_stop(request, searched):
                return
        if stops:
            self._finish(request, FinishReason.STOP, token if token in params.stop_token_ids else None)
        elif len(request.output_token_ids) >= params.max_tokens:
            self._finish(request, FinishReason.LENGTH, None)

    def _cut_at_stop(self, request: Request, searched: int) -> bool:
        """Ends the request where its text from `searched` on completes a stop string (which is cut off)."""
        stop = cut_at_stop(request, searched)
        if stop is None:
            return False
        request.stream = None
        self._finish(request, FinishReason.STOP, stop)
        return True

    def _finish(self, request: Request, reason: FinishReason, stop_reason: str | int | None) -> None:
        now = self._clock()
        request.finish_reason, request.stop_reason = reason, stop_reason
        request.metrics.finished_time = now
        self.scheduler.finish(request, now)
        if request.stream is not None:
            searched = len(request.text)
            request.text += request.stream.flush()
            if reason is FinishReason.LENGTH and (stop := cut_at_stop(request, searched)) is not None:
                request.finish_reason, request.stop_reason = FinishReason.STOP, stop
        del self._requests[request.request_id]
        self.counters.finished += 1
        if request.adapter is not None:
            for gone in self.cache.unhold(request.adapter):
                self._forgotten(gone)
