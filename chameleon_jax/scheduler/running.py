"""Running requests: prompts in chunks, then one token a step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler.plan import PrefillChunk, StepPlan
from chameleon_jax.scheduler.step_shapes import StepShapes


def _row_key(request: Request) -> tuple[str, int]:
    """Sort key that puts rows of one adapter side by side."""
    return request.adapter or "", request.order


class RunningSet:
    """Requests with a slot and pages.

    Attributes:
        by_age: all of them, in order of arrival.
        step_tokens: most prompt tokens of a step.

    Args:
        page_tokens: tokens of a page.
        step_tokens: most prompt tokens of a step; its decode rows do not count.
        shapes: sizes of the steps for which the device has programs.
    """

    def __init__(self, page_tokens: int, step_tokens: int, shapes: StepShapes):
        self.by_age: list[Request] = []
        self.step_tokens = step_tokens
        self._page_tokens = page_tokens
        self._shapes = shapes
        self._prefilling: list[Request] = []  # in order of admission
        self._decoding: list[Request] = []  # in the order of their rows

    def __len__(self) -> int:
        return len(self.by_age)

    @property
    def has_prompts(self) -> bool:
        """Whether there are uncomputed prompt tokens."""
        return bool(self._prefilling)

    def prompts_left(self, cost_of: Callable[[Request, int], float]) -> float:
        """Cost of the uncomputed prompt tokens, the sum of `cost_of(request, tokens)`."""
        return sum(cost_of(r, r.num_to_prefill - r.num_computed) for r in self._prefilling)

    def longest_wait(self, now: float) -> float:
        """Seconds since the arrival of the oldest request whose prompt is not computed; 0 without one."""
        return max([now - request.arrival_time for request in self._prefilling], default=0.0)

    def add(self, request: Request) -> None:
        """Let a request run from its first token, or again from its first token."""
        request.num_computed, request.num_to_prefill = 0, request.num_known
        request.state = RequestState.RUNNING
        bisect.insort(self.by_age, request, key=lambda r: r.order)
        self._prefilling.append(request)

    def remove(self, request: Request) -> None:
        """Drop a request that ended or was preempted."""
        self.by_age.remove(request)
        (self._prefilling if request in self._prefilling else self._decoding).remove(request)

    def plan_decodes(self, plan: StepPlan, grow: Callable[[Request, int], bool]) -> None:
        """Plan the next token of every request past its prompt, where `grow` finds the page it may need.

        Args:
            plan: the step, whose decodes are set.
            grow: hands a request so many more pages. It may preempt other requests. False where it found none or preempted
                the request itself.
        """
        decodes = plan.decodes = []
        for request in tuple(self._decoding):
            if request.num_computed >= request.decode_limit and not self._raise_limit(request, grow):
                continue
            decodes.append(request)
        if len(decodes) > 1 and any(r.state is not RequestState.RUNNING for r in decodes):  # a later one's growth preempted it
            decodes = plan.decodes = [r for r in decodes if r.state is RequestState.RUNNING]
        for request in decodes:
            request.num_computed += 1
            request.num_in_flight += 1

    def _raise_limit(self, request: Request, grow: Callable[[Request, int], bool]) -> bool:
        """Make room for the request's next token; False where it cannot be computed now."""
        if request.state is not RequestState.RUNNING or request.num_computed >= request.max_total_tokens - 1:
            return False  # preempted just now, or its last token is in flight
        missing = request.num_computed // self._page_tokens + 1 - len(request.pages)
        if missing > 0 and not grow(request, missing):
            return False
        request.decode_limit = min(len(request.pages) * self._page_tokens, request.max_total_tokens - 1)
        return True

    def plan_prefills(
        self, plan: StepPlan, seconds: float, seconds_of: Callable[[Request, int], float], pass_tokens: float
    ) -> None:
        """Cut prompts into chunks, the prompts that started first before others, until the step is full.

        Args:
            plan: the step, its decodes already planned, whose prefills are set.
            seconds: time that the chunks may take. The step has at least one token, and padding is not counted.
            seconds_of: seconds that so many tokens of a request take.
            pass_tokens: fixed cost of a further step's prompts, in prompt tokens.
        """
        plan.prefills = self._cut(self.step_tokens, self._shapes.most_tiles, seconds, seconds_of)
        if plan.prefills:
            counts, rows = [chunk.num_tokens for chunk in plan.prefills], len(plan.decodes)
            size = self._shapes.size(sum(counts), sum(map(self._shapes.tiles, counts)), rows, pass_tokens)
            if size != rows + sum(counts):  # a larger one has room for prompts that time left out
                tokens = min(size - rows, self.step_tokens)
                plan.prefills = self._cut(tokens, self._shapes.room(size), math.inf, lambda request, tokens: 0.0)
        for chunk in plan.prefills:
            request = chunk.request
            request.num_computed += chunk.num_tokens
            if chunk.samples:
                request.num_in_flight += 1
                request.decode_limit = 0  # so that its first decode looks for a page
                self._prefilling.remove(request)
                bisect.insort(self._decoding, request, key=_row_key)
        plan.prefills.sort(key=lambda chunk: _row_key(chunk.request))

    def _cut(
        self, tokens: int, tiles: float, seconds: float, seconds_of: Callable[[Request, int], float]
    ) -> list[PrefillChunk]:
        """Cut chunks of so many tokens and tiles in all; `seconds` and `seconds_of` as in `plan_prefills`."""
        chunks: list[PrefillChunk] = []
        for request in self._prefilling:
            left = request.num_to_prefill - request.num_computed
            fits = left <= tokens and self._shapes.tiles(left) <= tiles
            if not tokens or not tiles:
                break
            taken = min(left, tokens) if fits else int(min(left, tokens, tiles * self._shapes.tile))
            needed = seconds_of(request, taken)
            if needed > seconds:
                taken = int(taken * max(seconds, 0.0) / needed)
                if not taken and chunks:
                    break
                taken = max(taken, 1)
            seconds -= needed
            tokens -= taken
            tiles -= self._shapes.tiles(taken)
            chunks.append(PrefillChunk(request, request.num_computed, taken, samples=taken == left))
            if seconds <= 0:
                break
        return chunks
