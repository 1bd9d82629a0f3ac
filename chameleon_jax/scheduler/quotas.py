"""Shares of the pool that the queues may hold (paper, section 4.2: every queue is an M/M/1 server)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class LevelLoad:
    """Observed traffic of one queue.

    Attributes:
        largest: pages of its largest request, tokens and adapter.
        mean: pages of its mean request, tokens and adapter.
        duration: mean seconds that a request runs.
        rate: arrivals a second.
    """

    largest: int
    mean: float
    duration: float
    rate: float


def least_quota(load: LevelLoad, slo: float) -> float:
    """Tok_min = S D (1 / SLO + lambda), in pages; at least the largest request, which could not run otherwise (ours).

    In an M/M/1 queue a response time of SLO seconds needs a service rate of 1 / SLO + lambda. A quota of S x D serves one
    request a second.
    """
    return max(load.largest * load.duration * (1 / slo + load.rate), load.largest)


def share_quotas(loads: Sequence[LevelLoad], total: int, slo: float) -> tuple[list[int], bool]:
    """Divide `total` pages among the queues.

    Pages beyond the least quotas are shared by demand, rate x mean pages x duration. (The paper shares them by the queues'
    weights, which it does not define.)

    Returns:
        The pages of each queue, and whether the least quotas exceeded the total and were scaled down.
    """
    least = [least_quota(load, slo) for load in loads]
    scaled = sum(least) > total
    if scaled:
        exact = [quota * total / sum(least) for quota in least]
    else:
        demand = [load.rate * load.mean * load.duration for load in loads]
        whole = sum(demand)
        spare = total - sum(least)
        exact = [quota + spare * (d / whole if whole else 1 / len(loads)) for quota, d in zip(least, demand)]
    quotas = [int(quota) for quota in exact]
    quotas[-1] += total - sum(quotas)
    return quotas, scaled
