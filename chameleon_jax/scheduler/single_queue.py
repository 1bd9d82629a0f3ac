"""One queue: first come first served, shortest first, or first come first served with head starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

from chameleon_jax.request import Request
from chameleon_jax.scheduler.admission import AdmissionBatch, Verdict
from chameleon_jax.scheduler.queue_policy import MAX_OVERTAKEN
from chameleon_jax.scheduler.request_queue import RequestQueue
from chameleon_jax.scheduler.stats import QueueStats

BOOST_TAIL = 0.01
"""Share of requests that may miss the TTFT target. With the target it sets how slowly the tail of waiting times may fall."""

MAX_BOOST = 1.0
"""Largest head start, as a share of the TTFT target."""

TAIL_RATE = 2.0
"""Rate at which the tail of waiting times falls, times the mean wait.

An exponential tail has 1, but with it the 99th percentile is up to 18 % longer than first come first served has it. With 2 it
is up to 5 % longer, for three fifths of the gain in the median (docs/experiments.md).
"""

WAIT_WEIGHT = 0.02
"""Weight of the newest waiting time in their mean."""

PagesOf = Callable[[Request], int]
"""KV pages with which a request starts."""


class SingleQueue:
    """Requests of higher classes first (see `RequestQueue`), in a class those with the lowest key.

    A request whose adapter is loading is passed by those behind it. A request that lacks memory, for its tokens or its adapter,
    is not: the small ones behind it would take every page that becomes free.

    With a constant key, which is first come first served, a request starts once those that came before it have run, and up to
    MAX_PASSES of higher classes for each of them: no other is ever given memory that it waits for. With another key it can wait
    for ever (the paper's point about SJF).

    Args:
        pages_of: KV pages with which a request starts.
        key: sort key, computed once when a request is added.
        waited: called with the seconds that a request waited, when it starts for the first time.
    """

    def __init__(
        self, pages_of: PagesOf, key: Callable[[Request], float], waited: Callable[[float], None] = lambda seconds: None
    ):
        self._pages_of = pages_of
        self._key = key
        self._waited = waited
        self._queue = RequestQueue()
        self._keys: dict[str, float] = {}

    def add(self, request: Request, now: float, new: bool = True) -> None:
        self._keys[request.request_id] = self._key(request)
        self._queue.add(request, self._keys[request.request_id])

    def remove(self, request: Request, starts: bool = False) -> None:
        self._queue.remove(request, self._keys.pop(request.request_id), starts)

    def admit(self, batch: AdmissionBatch, running: Collection[Request], now: float) -> None:
        passed = 0
        while (request := self._queue.at(passed)) is not None and passed <= MAX_OVERTAKEN:
            verdict = batch.try_admit(request, self._pages_of(request))
            if verdict is Verdict.STARTS:
                self.remove(request, starts=True)
                if request.metrics.first_scheduled_time is None:
                    self._waited(now - request.arrival_time)
            elif verdict is Verdict.WAITS:
                passed += 1
            else:
                return

    def release(self, request: Request, now: float) -> None:
        pass

    def victim(self, room: int) -> Request | None:
        return None

    def upcoming(self, count: int) -> list[Request]:
        return self._queue.first(count)

    def queues(self) -> tuple[QueueStats, ...]:
        return (QueueStats("0", len(self._queue)),)


def fifo(pages_of: PagesOf) -> SingleQueue:
    """Make a queue that is first come first served."""
    return SingleQueue(pages_of, lambda request: 0.0)


def shortest_first(pages_of: PagesOf) -> SingleQueue:
    """Make a queue sorted by predicted output length (S-LoRA+SJF in the paper)."""
    return SingleQueue(pages_of, lambda request: float(request.predicted_output_len))


class Boost:
    """Sort key: arrival time less a boost that is larger the less work a request is.

    The boost is (1 / gamma) ln(1 / (1 - exp(-gamma work))). Yu and Scully (SIGMETRICS 2024) show that no order has a lighter
    tail of response times in a light-tailed M/G/1 queue, if gamma is the rate at which that tail falls. Long waits are nearly
    exponential (Kingman), so that rate is 1 over their mean. Here gamma is TAIL_RATE over the mean of the waits so far, but
    never less than the rate with which BOOST_TAIL of the requests wait longer than `slo`: while waits are short, the order is
    nearly first come first served. A boost is at most MAX_BOOST: of its own class, a request can only be passed by those that
    arrive within that time after it. So without other classes it starts at most as long after its arrival as first come first
    served would start the last of these.

    Args:
        work_of: seconds for which a request keeps others waiting.
        slo: target for time to first token, seconds.
    """

    def __init__(self, work_of: Callable[[Request], float], slo: float):
        self._work_of = work_of
        self._slo = slo
        self._mean_wait = 0.0

    def waited(self, seconds: float) -> None:
        """Learn from the waiting time of a request that starts."""
        self._mean_wait += WAIT_WEIGHT * (seconds - self._mean_wait)

    def __call__(self, request: Request) -> float:
        gamma = max(-math.log(BOOST_TAIL) / self._slo, TAIL_RATE / max(self._mean_wait, 1e-3))
        boost = -math.log1p(-math.exp(-gamma * max(self._work_of(request), 1e-6))) / gamma
        return request.arrival_time - min(boost, MAX_BOOST * self._slo)


def boosted(pages_of: PagesOf, work_of: Callable[[Request], float], slo: float) -> SingleQueue:
    """Make a queue sorted by `Boost`."""
    boost = Boost(work_of, slo)
    return SingleQueue(pages_of, boost, boost.waited)
