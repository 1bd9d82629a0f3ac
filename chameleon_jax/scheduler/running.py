"""The requests that run: prompts in chunks, then a token a step."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler.plan import PrefillChunk, StepPlan
from chameleon_jax.scheduler.prefill_shapes import PrefillShapes


def _place(request: Request) -> tuple[str, int]:
    """Rows of one adapter side by side."""
    return request.adapter or "", request.order


class RunningSet:
    """Requests with a slot and pages.

    Args:
        step_tokens: prompt tokens of a step at most, rounded down to whole tiles, of which there is always one.
        shapes: the device's; chunks start at multiples of its tile from the first uncomputed token.
        whole_prompts: cuts no prompt that fits a step.
    """

    def __init__(self, page_tokens: int, step_tokens: int, shapes: PrefillShapes, whole_prompts: bool):
        self.by_age: list[Request] = []  # in order of arrival
        self._page_tokens = page_tokens
        self._shapes = shapes
        self._step_tiles = max(1, step_tokens // shapes.tile)
        self._whole_prompts = whole_prompts
        self._prefilling: list[Request] = []  # in order of admission
        self._decoding: list[Request] = []  # in the order of their rows

    def __len__(self) -> int:
        return len(self.by_age)

    @property
    def step_tokens(self) -> int:
        return self._step_tiles * self._shapes.tile

    def prompts_left(self, cost_of: Callable[[Request, int], float]) -> float:
        """What the prompts of requests that have started still cost, `cost_of(request, tokens)` each."""
        return sum(cost_of(r, r.num_to_prefill - r.num_computed) for r in self._prefilling)

    def add(self, request: Request) -> None:
        request.num_computed, request.num_to_prefill = 0, request.num_known
        request.state = RequestState.RUNNING
        bisect.insort(self.by_age, request, key=lambda r: r.order)
        self._prefilling.append(request)

    def remove(self, request: Request) -> None:
        self.by_age.remove(request)
        (self._prefilling if request in self._prefilling else self._decoding).remove(request)

    def plan_decodes(self, plan: StepPlan, grow: Callable[[Request, int], bool]) -> None:
        """Every request past its prompt computes its next token, where `grow` finds the page it may need.

        Args:
            grow: hands a request that many more pages; may squash others, or the request itself (then it is False).
        """
        decodes = plan.decodes = []
        for request in tuple(self._decoding):
            if request.num_computed >= request.decode_limit and not self._can_decode(request, grow):
                continue
            decodes.append(request)
        if len(decodes) > 1 and any(r.state is not RequestState.RUNNING for r in decodes):  # squashed by a later one's growth
            decodes = plan.decodes = [r for r in decodes if r.state is RequestState.RUNNING]
        for request in decodes:
            request.num_computed += 1
            request.num_in_flight += 1

    def _can_decode(self, request: Request, grow: Callable[[Request, int], bool]) -> bool:
        if request.state is not RequestState.RUNNING or request.num_computed >= request.max_total_tokens - 1:
            return False  # squashed just now, or its last token is in flight
        missing = request.num_computed // self._page_tokens + 1 - len(request.pages)
        if missing > 0 and not grow(request, missing):
            return False
        request.decode_limit = min(len(request.pages) * self._page_tokens, request.max_total_tokens - 1)
        return True

    def plan_prefills(
        self, plan: StepPlan, seconds: float, seconds_of: Callable[[Request, int], float], pass_tokens: float
    ) -> None:
        """Cuts prompts into chunks, those that started first first, until the step is full.

        Args:
            seconds: that the chunks may take, one tile at least and the padding of the step excepted.
            seconds_of: how long that many tokens of a request take, whole tiles where the device computes those.
            pass_tokens: see `PrefillShapes.size`.
        """
        plan.prefills = self._chunks(self._step_tiles, seconds, seconds_of)
        if not self._whole_prompts:
            tiles = sum(self._shapes.tiles(chunk.num_tokens) for chunk in plan.prefills)
            size = min(self._shapes.size(tiles, pass_tokens), self._step_tiles)
            if size != tiles:
                plan.prefills = self._chunks(size, math.inf, lambda request, tokens: 0.0)
        for chunk in plan.prefills:
            request = chunk.request
            request.num_computed += chunk.num_tokens
            if chunk.samples:
                request.num_in_flight += 1
                request.decode_limit = 0  # looked at before its first decode
                self._prefilling.remove(request)
                bisect.insort(self._decoding, request, key=_place)
        plan.prefills.sort(key=lambda chunk: _place(chunk.request))

    def _chunks(self, tiles: int, seconds: float, seconds_of: Callable[[Request, int], float]) -> list[PrefillChunk]:
        chunks: list[PrefillChunk] = []
        tile = self._shapes.tile
        for request in self._prefilling:
            left = request.num_to_prefill - request.num_computed
            if tiles <= 0 or (self._whole_prompts and tiles < self._shapes.tiles(left) <= self._step_tiles):
                break
            tokens = min(left, tiles * tile)
            needed = seconds_of(request, tokens)
            if needed > seconds:
                tokens = min(tokens, int(self._shapes.padded(tokens) * max(seconds, 0.0) / needed) // tile * tile)
                if not tokens and chunks:
                    break
                tokens = max(tokens, min(left, tile))
            seconds -= needed
            tiles -= self._shapes.tiles(tokens)
            chunks.append(PrefillChunk(request, request.num_computed, tokens, samples=tokens == left))
            if seconds <= 0:
                break
        return chunks
