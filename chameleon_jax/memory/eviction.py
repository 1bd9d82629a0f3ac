"""Which idle adapter leaves the pool first: policies give scores, the lowest leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

WINDOW_S = 300.0
"""Seconds over which uses are counted and recency falls from 1 to 0: the paper's T_refresh."""
HALF_LIFE_S = 120.0
"""Seconds in which an adapter's use loses half its weight in `AdapterUse.rate`."""
LOAD_LATENCY_S, LINK_BYTES_PER_S = 2e-3, 12e9
"""What a reload is assumed to cost: only the ratio of the two matters, as scores are compared with one another."""


@dataclasses.dataclass
class AdapterUse:
    """What a policy may look at.

    Attributes:
        num_pages: pages it takes.
        num_bytes: bytes a load moves.
        last_used: seconds of the loop's clock.
        uses: how often a request took it since it became known.
        priority: what the policy remembers about it.
    """

    num_pages: int
    num_bytes: int
    last_used: float
    uses: int = 0
    priority: float = 0.0
    _window_start: float = 0.0
    _window_uses: int = 0
    _previous_uses: int = 0
    _decayed: float = 0.0
    _decayed_at: float = 0.0

    @property
    def load_seconds(self) -> float:
        return LOAD_LATENCY_S + self.num_bytes / LINK_BYTES_PER_S

    def use(self, now: float) -> None:
        self._roll(now)
        self._window_uses += 1
        self._decayed = self.rate(now) * HALF_LIFE_S / math.log(2) + 1
        self.uses, self.last_used, self._decayed_at = self.uses + 1, now, now

    def frequency(self, now: float) -> float:
        """Uses in the last WINDOW_S; the part of the window before the current one counts in proportion."""
        self._roll(now)
        share = 1 - (now - self._window_start) / WINDOW_S
        return self._window_uses + self._previous_uses * share

    def rate(self, now: float) -> float:
        """Uses a second, decayed."""
        return float(self._decayed * 0.5 ** ((now - self._decayed_at) / HALF_LIFE_S) * math.log(2) / HALF_LIFE_S)

    def _roll(self, now: float) -> None:
        passed = int((now - self._window_start) // WINDOW_S)
        if passed > 0:
            self._previous_uses = self._window_uses if passed == 1 else 0
            self._window_uses = 0
            self._window_start += passed * WINDOW_S


class Policy(Protocol):
    """Scores idle adapters against one another."""

    def used(self, use: AdapterUse, now: float) -> None:
        """A request took the adapter."""

    def scores(self, uses: Sequence[AdapterUse], now: float) -> list[float]:
        """One score each; the lowest leaves first."""

    def evicted(self, score: float) -> None:
        """The adapter of that score left."""


class _Stateless:
    def used(self, use: AdapterUse, now: float) -> None:
        pass

    def evicted(self, score: float) -> None:
        pass


class Lru(_Stateless):
    """Least recently used."""

    def scores(self, uses: Sequence[AdapterUse], now: float) -> list[float]:
        return [use.last_used for use in uses]


@dataclasses.dataclass(frozen=True)
class Compound(_Stateless):
    """Chameleon's score, weights of frequency + recency + size, each term in [0, 1] (paper, section 4.1; normalisation ours).

    Small adapters leave first, since large ones cost more to bring back.
    """

    frequency: float = 0.45
    recency: float = 0.10
    size: float = 0.45

    def scores(self, uses: Sequence[AdapterUse], now: float) -> list[float]:
        frequencies = [use.frequency(now) for use in uses]
        most = max(frequencies, default=0) or 1
        largest = max((use.num_pages for use in uses), default=0) or 1
        return [
            self.frequency * frequency / most
            + self.recency * max(0.0, 1 - (now - use.last_used) / WINDOW_S)
            + self.size * use.num_pages / largest
            for use, frequency in zip(uses, frequencies)
        ]


class Gdsf:
    """Greedy dual size frequency (Cherkasova, 1998): frequency x cost / size on top of the score that left last."""

    def __init__(self) -> None:
        self._age = 0.0

    def used(self, use: AdapterUse, now: float) -> None:
        use.priority = self._age + use.uses * use.load_seconds / use.num_pages

    def scores(self, uses: Sequence[AdapterUse], now: float) -> list[float]:
        return [use.priority for use in uses]

    def evicted(self, score: float) -> None:
        self._age = max(self._age, score)


class CostAware:
    """Seconds of reloading that keeping an adapter is expected to save, per second and page: rate x load time / pages.

    Multiplies what Chameleon adds (as ELORA and FASTLIBRA do): a large adapter that nobody asks for is worth nothing. All rates
    decay alike, so their order does not change between uses: the score is the logarithm of the value at the last use, moved
    by the time that has passed until then, and is taken once a use.
    """

    NEVER_USED = -1e9

    def used(self, use: AdapterUse, now: float) -> None:
        use.priority = math.log2(use.rate(now) * use.load_seconds / use.num_pages) + now / HALF_LIFE_S

    def scores(self, uses: Sequence[AdapterUse], now: float) -> list[float]:
        return [use.priority if use.uses else self.NEVER_USED for use in uses]

    def evicted(self, score: float) -> None:
        pass


def make_policy(name: str) -> Policy:
    """Raises ValueError for a name that is none of POLICIES."""
    if name not in POLICIES:
        raise ValueError(f"eviction is {name!r}; allowed: {', '.join(POLICIES)}")
    return POLICIES[name]()


POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": Lru,
    "chameleon": Compound,
    "fairshare": lambda: Compound(1 / 3, 1 / 3, 1 / 3),
    "gdsf": Gdsf,
    "cost-aware": CostAware,
}
"""Constructors by name."""
