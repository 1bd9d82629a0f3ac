"""One queue of the multi-level scheduler: its requests, its quota, what it has learnt of its traffic."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from chameleon_jax.request import Request
from chameleon_jax.scheduler.quotas import LevelLoad
from chameleon_jax.scheduler.request_queue import RequestQueue


class Level:
    """Requests whose size lies between two bounds, oldest first.

    Attributes:
        quota: pages its requests may hold; `remaining` is what they and those it lent to leave of it.
        blocked_since: when its oldest request first fitted the quota and not the memory; None: it does not wait for memory.
    """

    def __init__(self, quota: int):
        self.waiting = RequestQueue()
        self.quota = self.remaining = quota
        self.blocked_since: float | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is charged to it."""
        return self.remaining >= self.quota


class TrafficHistory:
    """What arrived and how long it ran, for as long as a window.

    Attributes:
        window: seconds.
    """

    def __init__(self, window: float, limit: int = 8192):
        self.window = window
        self._arrivals: deque[tuple[float, float, int]] = deque(maxlen=limit)  # (time, size, pages)
        self._runs: deque[tuple[float, float, float]] = deque(maxlen=limit)  # (time, size, seconds)

    def __len__(self) -> int:
        return len(self._arrivals)

    def arrived(self, request: Request, pages: int, now: float) -> None:
        self._arrivals.append((now, request.size, pages))

    def ran(self, request: Request, seconds: float, now: float) -> None:
        self._runs.append((now, request.size, seconds))

    def sizes(self, last: int | None = None) -> list[float]:
        sizes = [size for _, size, _ in self._arrivals]
        return sizes if last is None else sizes[-last:]

    def forget(self, now: float) -> None:
        for events in (self._arrivals, self._runs):
            while events and events[0][0] < now - self.window:
                events.popleft()

    def loads(self, bounds: list[float], now: float, level_of: Callable[[list[float], float], int]) -> list[LevelLoad]:
        """One for each level that `bounds` part; levels without a finished request are taken to run as long as the mean one."""
        count = len(bounds) + 1
        pages: list[list[int]] = [[] for _ in range(count)]
        seconds: list[list[float]] = [[] for _ in range(count)]
        for _, size, needed in self._arrivals:
            pages[level_of(bounds, size)].append(needed)
        for _, size, ran in self._runs:
            seconds[level_of(bounds, size)].append(ran)
        everyone = [s for level in seconds for s in level]
        mean = sum(everyone) / len(everyone) if everyone else 1.0
        span = max(now - self._arrivals[0][0], 1.0) if self._arrivals else 1.0
        return [
            LevelLoad(max(p, default=1), sum(p) / max(len(p), 1), sum(s) / len(s) if s else mean, len(p) / span)
            for p, s in zip(pages, seconds)
        ]
