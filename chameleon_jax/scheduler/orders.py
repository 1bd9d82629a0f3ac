"""One queue: first come first served, or shortest first."""

from __future__ import annotations

from collections.abc import Callable, Collection

from chameleon_jax.request import Request
from chameleon_jax.scheduler.admission import Batch, Verdict
from chameleon_jax.scheduler.request_queue import RequestQueue

PASS_DEPTH = 32
"""Requests whose adapters load that the ones behind them may pass."""

PagesOf = Callable[[Request], int]
"""KV pages with which a request starts."""


class SingleQueue:
    """Requests in the order of a key. One whose adapter is loading is passed by those behind it; one that lacks memory, for its
    tokens or its adapter, is not: else the small ones behind it would take every page that becomes free.

    With a constant key, first come first served, a request starts once those that came before it have run: nothing younger is
    ever given memory that it waits for. With another key it can wait for ever (the paper's point about SJF).
    """

    def __init__(self, pages_of: PagesOf, key: Callable[[Request], float]):
        self._pages_of = pages_of
        self._key = key
        self._queue = RequestQueue()
        self._keys: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, request: Request, now: float, new: bool = True) -> None:
        self._keys[request.request_id] = self._key(request)
        self._queue.add(request, self._keys[request.request_id])

    def remove(self, request: Request) -> None:
        self._queue.remove(request, self._keys.pop(request.request_id))

    def admit(self, batch: Batch, running: Collection[Request], now: float) -> None:
        passed = 0
        while passed <= PASS_DEPTH:
            request = self._queue.at(passed)
            if request is None:
                return
            verdict = batch.offer(request, self._pages_of(request))
            if verdict is Verdict.STARTS:
                self.remove(request)
            elif verdict is Verdict.WAITS:
                passed += 1
            else:
                return

    def ended(self, request: Request, now: float) -> None:
        pass

    def victim(self, room: int, running: Collection[Request]) -> Request | None:
        return None

    def upcoming(self, count: int) -> list[Request]:
        return self._queue.first(count)


def fifo(pages_of: PagesOf) -> SingleQueue:
    return SingleQueue(pages_of, lambda request: 0.0)


def shortest_first(pages_of: PagesOf) -> SingleQueue:
    """By predicted output (S-LoRA+SJF in the paper)."""
    return SingleQueue(pages_of, lambda request: float(request.predicted_output_len))
