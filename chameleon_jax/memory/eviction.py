"""Eviction policies: each scores idle adapters, and the one with the lowest score leaves the pool first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from chameleon_jax.checks import require

WINDOW_S = 300.0
"""Seconds over which uses are counted and recency falls from 1 to 0: the paper's T_refresh."""
HALF_LIFE_S = 120.0
"""Seconds in which a use loses half its weight in `AdapterUse.rate`."""
LOAD_LATENCY_S, LINK_BYTES_PER_S = 2e-3, 12e9
"""Assumed cost of a reload. Only the ratio of the two matters, since scores are compared with one another."""


@dataclasses.dataclass
class AdapterUse:
    """Size and uses of one adapter, from which policies compute scores.

    Attributes:
        num_pages: pages of the adapter.
        num_bytes: bytes that a load moves.
        last_used: seconds of the loop's clock at the last use, or when the adapter was added.
        uses: requests that started with the adapter.
        priority: memory of the policy.
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
        """Assumed seconds of a load."""
        return LOAD_LATENCY_S + self.num_bytes / LINK_BYTES_PER_S

    def use(self, now: float) -> None:
        """Count a request that starts with the adapter."""
        self._roll(now)
        self._window_uses += 1
        self._decayed = self.rate(now) * HALF_LIFE_S / math.log(2) + 1
        self.uses, self.last_used, self._decayed_at = self.uses + 1, now, now

    def frequency(self, now: float) -> float:
        """Count the uses of the last WINDOW_S seconds.

        Windows are fixed; uses of the one before the current one count in proportion to its part of the last WINDOW_S seconds.
        """
        self._roll(now)
        share = 1 - (now - self._window_start) / WINDOW_S
        return self._window_uses + self._previous_uses * share

    def rate(self, now: float) -> float:
        """Estimate the uses a second, older ones counting less."""
        decay: float = 0.5 ** ((now - self._decayed_at) / HALF_LIFE_S)
        return self._decayed * decay * math.log(2) / HALF_LIFE_S

    def _roll(self, now: float) -> None:
        passed = int((now - self._window_start) // WINDOW_S)
        if passed > 0:
            self._previous_uses = self._window_uses if passed == 1 else 0
            self._window_uses = 0
            self._window_start += passed * WINDOW_S


class Policy:
    """Scores idle adapters against one another. A policy that learns nothing overrides `scores` alone."""

    def scores(self, uses: Sequence[AdapterUse], now: float) -> list[float]:
        """Return one score for each adapter; the lowest leaves first."""
        raise NotImplementedError

    def used(self, use: AdapterUse, now: float) -> None:
        """Learn that a request started with the adapter."""

    def evicted(self, score: float) -> None:
        """Learn that the adapter with this score left."""


class Lru(Policy):
    """Least recently used."""

    def scores(self, uses: Sequence[AdapterUse], now: float) -> list[float]:
        return [use.last_used for use in uses]


@dataclasses.dataclass(frozen=True)
class Compound(Policy):
    """Chameleon's score: a weighted sum of frequency, recency and size (paper, section 4.1).

    Each term is in [0, 1]; the normalisation is ours. Small adapters leave first, since large ones cost more to bring back.

    Attributes:
        frequency: weight of the uses in the last WINDOW_S seconds, relative to the most used adapter's.
        recency: weight of the last use, which falls from 1 to 0 over WINDOW_S seconds.
        size: weight of the pages, relative to the largest adapter's.
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


class Gdsf(Policy):
    """Greedy dual size frequency (Cherkasova, 1998): frequency x cost / size on top of the score that left last."""

    def __init__(self) -> None:
        self._age = 0.0

    def used(self, use: AdapterUse, now: float) -> None:
        use.priority = self._age + use.uses * use.load_seconds / use.num_pages

    def scores(self, uses: Sequence[AdapterUse], now: float) -> list[float]:
        return [use.priority for use in uses]

    def evicted(self, score: float) -> None:
        self._age = max(self._age, score)


class CostAware(Policy):
    """Seconds of reloading that keeping an adapter should save, per second and page: rate x load time / pages.

    Chameleon adds these terms; here they are multiplied (as ELORA and FASTLIBRA do), so a large adapter without uses is worth
    nothing. All rates decay alike, so their order does not change between uses. The score is therefore computed once a use: the
    logarithm of the value at that time, plus the half-lives that had passed by then.
    """

    NEVER_USED = -1e9

    def used(self, use: AdapterUse, now: float) -> None:
        use.priority = math.log2(use.rate(now) * use.load_seconds / use.num_pages) + now / HALF_LIFE_S

    def scores(self, uses: Sequence[AdapterUse], now: float) -> list[float]:
        return [use.priority if use.uses else self.NEVER_USED for use in uses]


def make_policy(name: str) -> Policy:
    """Make the policy of a name; raise ValueError for a name outside POLICIES."""
    require(name in POLICIES, "eviction", name, ", ".join(POLICIES))
    return POLICIES[name]()


POLICIES: dict[str, Callable[[], Policy]] = {
    "lru": Lru,
    "chameleon": Compound,
    "fairshare": lambda: Compound(1 / 3, 1 / 3, 1 / 3),
    "gdsf": Gdsf,
    "cost-aware": CostAware,
}
"""Constructors of the policies by name."""
