"""How much of the pool each queue may hold (paper, section 4.2: every queue is an M/M/1 server)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class LevelLoad:
    """What is known of one queue.

    Attributes:
        largest: pages of its largest request (tokens and adapter).
        mean: pages of its mean request.
        duration: mean seconds a request runs.
        rate: arrivals a second.
    """

    largest: int
    mean: float
    duration: float
    rate: float


def least_quota(load: LevelLoad, slo: float) -> float:
    """Tok_min = S D (1 / SLO + lambda), in pages; at least the largest request, which could not run otherwise (ours).

    In an M/M/1 queue a response time of SLO needs a service rate of 1 / SLO + lambda; a quota of S x D serves one a second.
    """
    return max(load.largest * load.duration * (1 / slo + load.rate), load.largest)


def share_quotas(loads: Sequence[LevelLoad], total: int, slo: float) -> tuple[list[int], bool]:
    """Pages of each queue, `total` together, and whether the minima had to be scaled down to fit.

    What the minima leave is shared by demand, rate x mean pages x duration (the paper says by the queues' weights, undefined).
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
