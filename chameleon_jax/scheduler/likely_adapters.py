"""Which adapters will be asked for soon: each one's gaps between uses, after Shahrad et al. (ATC 2020).

Their hybrid histogram bins the gaps; the last 64 of each adapter are few enough to be kept as they are, sorted.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

LONGEST_GAP_S = 240.0
"""Longer gaps are not predicted."""
HEAD, TAIL = 0.05, 0.95
"""Quantiles of the gaps between which the next use is expected."""
LEAST_GAPS = 4


class UseHistory:
    """Gaps between uses of one adapter, sorted, the oldest forgotten beyond a limit."""

    LIMIT = 64

    def __init__(self, now: float):
        self.last = now
        self._gaps: list[float] = []
        self._recent: list[float] = []

    def used(self, now: float) -> None:
        gap, self.last = now - self.last, now
        if gap > LONGEST_GAP_S:
            return
        if len(self._recent) == self.LIMIT:
            del self._gaps[bisect.bisect_left(self._gaps, self._recent.pop(0))]
        self._recent.append(gap)
        bisect.insort(self._gaps, gap)

    def chance(self, now: float, horizon: float) -> float:
        """Share of the gaps that end within the next `horizon` seconds, among those that are not over yet.

        0 outside the window from the HEAD to the TAIL quantile, and while too few were seen.
        """
        count = len(self._gaps)
        if count < LEAST_GAPS:
            return 0.0
        idle = now - self.last
        if idle + horizon < self._gaps[int(HEAD * (count - 1))] or idle > self._gaps[int(TAIL * (count - 1))]:
            return 0.0
        left = bisect.bisect_left(self._gaps, idle)
        return (bisect.bisect_left(self._gaps, idle + horizon) - left) / max(count - left, 1)


class UsePredictor:
    """Learns when adapters are used and names those that likely will be.

    Args:
        horizon: seconds ahead; candidates are worked out once in that time.
    """

    def __init__(self, horizon: float = 1.0):
        self._horizon = horizon
        self._histories: dict[str, UseHistory] = {}
        self._next = 0.0

    def used(self, content_hash: str, now: float) -> None:
        history = self._histories.get(content_hash)
        if history is None:
            self._histories[content_hash] = UseHistory(now)
        else:
            history.used(now)

    def candidates(self, absent: Iterable[str], now: float, least: float = 0.05) -> list[str]:
        """Of those that are not in the pool, the ones with a chance of at least that to be used within the horizon, best first.
        Empty until a horizon has passed since they were asked for last."""
        if now < self._next:
            return []
        self._next = now + self._horizon
        chances = [(h.chance(now, self._horizon), name) for name in absent if (h := self._histories.get(name)) is not None]
        return [name for chance, name in sorted(chances, reverse=True) if chance >= least]

    def forget(self, content_hash: str) -> None:
        self._histories.pop(content_hash, None)
