"""S-LoRA's loop, from its public code (commit c1ddf48: router/manager.py, router/req_queue.py).

A cycle computes the prompts of one batch, alone, while requests that decode wait. Then ten steps decode and admit no request.
Each later step tries to admit a batch, and decodes where no request fits. An engine without running requests admits at once.
Adapters of a batch are loaded before its prompts, and adapters of the head of the queue twice in a cycle, while others decode.

Two details differ: the loop plans a step while the one before runs, and the prefetch comes one step earlier.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from chameleon_jax.request import Request
from chameleon_jax.scheduler.admission import AdmissionBatch, Verdict
from chameleon_jax.scheduler.plan import StepPlan
from chameleon_jax.scheduler.prefetch import PREFETCH_DEPTH
from chameleon_jax.scheduler.scheduler import Scheduler, known_tokens

DECODES = 10
"""Steps that decode after a batch's prompts before the next batch is admitted (`max_wait_tokens`)."""
PREFETCH_AT = (DECODES // 2, DECODES - 3)
"""Of them, those in which adapters of the head of the queue are loaded."""


class CycleScheduler(Scheduler):
    """Plans steps of prompts alone and steps that decode alone, in cycles; arguments as for `Scheduler`."""

    _decodes = 0  # steps that decoded since the last batch's prompts
    _ahead: frozenset[str] = frozenset()  # adapters of the requests that the last prefetch looked at

    def plan(self, now: float) -> StepPlan:
        """Decide the next step and book it: positions advance as if it had run."""
        plan = StepPlan()
        self._apply_length_updates(now)
        self._prefetcher.cancel_unwanted(plan)
        if not self.system.keep_idle:
            self._cache.evict_idle(keep=self._ahead)
        if not self._running.has_prompts and (not self.running or self._decodes >= DECODES):
            self._preempt_bypasser(now)
            self._admit(plan, math.inf, now)
        if self._running.has_prompts:
            self._decodes = 0
            self._running.plan_prefills(plan, math.inf, self._budget.prefill_seconds, math.inf)
            return plan
        self._running.plan_decodes(plan, lambda request, pages: self._grow(request, pages, now))
        self._decodes += bool(plan.decodes)
        if plan.decodes and self._decodes in PREFETCH_AT:
            self._prefetch(plan, now)
        return plan

    def _prefetch(self, plan: StepPlan, now: float) -> None:
        """Load the adapters of the requests at the head of the queue whose prompts would fill a batch."""
        head, room = [], self._running.step_tokens
        for request in self.policy.upcoming(PREFETCH_DEPTH):
            room -= request.num_known
            if room < 0:
                break
            head.append(request)
        self._ahead = frozenset(request.adapter for request in head if request.adapter is not None)
        self._prefetcher.load_ahead(plan, head, len(self._running), now, most_loads=PREFETCH_DEPTH)

    def _new_batch(self, budget: float) -> AdmissionBatch:
        room = self._running.step_tokens if self.system.limit_prompts else math.inf
        common = (self._cache, len(self._slots), room, known_tokens)
        if self.system.reserve != "peak":
            return AdmissionBatch(*common, overlap_loads=False)
        return PeakBatch(*common, overlap_loads=False, running=self.running, page_tokens=self._page_tokens)


@dataclasses.dataclass(eq=False)
class PeakBatch(AdmissionBatch):
    """Batch that grows while all that run, each to its `max_tokens`, will never need more pages than there are.

    The need is largest at the moment before a request ends. Sorted by tokens still to come, most first, the i-th request ends
    when the i before it and itself have grown by as many tokens. The adapters of all are counted once each.

    Attributes:
        running: requests that run.
        page_tokens: tokens of a page.
    """

    running: Sequence[Request] = ()
    page_tokens: int = 1

    def try_admit(self, request: Request, kv_pages: int) -> Verdict:
        """Add a request to the batch if its prompt, and the peak of all, fit."""
        if self.starts and self.prompt_of(request) > self.prompt_room:
            return Verdict.FULL
        if self.peak_pages([*self.running, *self.starts, request]) > self.cache.pool.capacity:
            self.lacks_memory = True
            return Verdict.NO_MEMORY
        return super().try_admit(request, kv_pages)

    def peak_pages(self, requests: Sequence[Request]) -> int:
        """Bound the pages that the requests and their adapters will need at once."""
        left = np.array([request.max_total_tokens - request.num_known for request in requests])
        known = np.array([request.num_known for request in requests])
        order = np.argsort(-left, kind="stable")
        count = np.arange(1, len(requests) + 1)
        # each request fills its last page in part
        tokens = np.cumsum(known[order]) + count * (left[order] + self.page_tokens - 1)
        adapters = {request.adapter for request in requests if request.adapter is not None}
        adapter_pages = self.cache.pinned_pages(*adapters) + sum(self.cache.entry(a).info.num_pages for a in adapters)
        return int(tokens.max()) // self.page_tokens + adapter_pages
