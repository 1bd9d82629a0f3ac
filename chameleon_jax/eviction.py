"""Which idle adapter leaves the pool first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class AdapterUse:
    """What a policy may look at.

    Attributes:
        num_pages: its size.
        last_used: seconds of the loop's clock.
        uses: how often a request took it since it became known.
    """

    num_pages: int
    last_used: float
    uses: int = 0


Policy = Callable[[AdapterUse, float], float]
"""`(use, now) -> score`; the lowest score leaves first."""


def lru(use: AdapterUse, now: float) -> float:
    """Least recently used."""
    return use.last_used - now


POLICIES: dict[str, Policy] = {"lru": lru}
