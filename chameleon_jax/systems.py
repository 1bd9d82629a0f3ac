"""Systems to choose from by name: which policy does what. Each field is a choice that an ablation can turn."""

from __future__ import annotations

import dataclasses

from chameleon_jax.checks import require
from chameleon_jax.memory.eviction import POLICIES

ORDERS = ("fifo", "sjf", "multilevel", "boost")
SIZES = ("wrs", "output")


@dataclasses.dataclass(frozen=True)
class System:
    """One way to serve.

    Attributes:
        order: who starts next: "fifo"; "sjf", shortest predicted output first; "multilevel", the paper's queues with quotas;
            "boost", ours: first come first served with a head start that is larger the less work a request is and the longer
            others have waited.
        size: what the queues sort by: "wrs", the paper's weighted request size, or "output", the predicted output alone.
        equal_levels: four queues of equal width and quota instead of clustered ones.
        drift_test: recompute queues and quotas as soon as the mix has visibly shifted, not only every five minutes.
        eviction: which idle adapter leaves first; see `eviction.POLICIES`.
        keep_idle: adapters that no request wants stay in the pool while nobody needs their pages.
        prefetch_predicted: also load adapters that are likely to be asked for soon, into memory that nobody uses.
        overlap_loads: a request whose adapter is loading lets others run until it is there; else its step waits for the load,
            and the load for the step before it, as where adapters are copied on the stream that computes.
        whole_prompts: a prompt that fits a step is prefilled in one, not cut to fill the step.
        bound_stalls: while requests decode, a step takes as much of the prompts as keeps it within the target for the time
            between tokens, by what steps of that size and rank have taken so far, and more where the device cannot meet the
            target or requests wait for long (`scheduler.step_budget`); else max_num_batched_tokens, whatever their ranks.
        reserve_max_tokens: reserve pages for max_tokens output tokens instead of the predicted ones.
        admission_interval: steps between admissions while requests run.
        transfers_per_load: times an adapter is copied to the device for one load.
    """

    order: str = "multilevel"
    size: str = "wrs"
    equal_levels: bool = False
    drift_test: bool = False
    eviction: str = "chameleon"
    keep_idle: bool = True
    prefetch_predicted: bool = False
    overlap_loads: bool = False
    whole_prompts: bool = True
    bound_stalls: bool = False
    reserve_max_tokens: bool = False
    admission_interval: int = 1
    transfers_per_load: int = 1

    def __post_init__(self) -> None:
        for field, allowed in (("order", ORDERS), ("size", SIZES), ("eviction", tuple(POLICIES))):
            value = getattr(self, field)
            require(value in allowed, field, value, ", ".join(allowed))
        for field in ("admission_interval", "transfers_per_load"):
            value = getattr(self, field)
            require(value >= 1, field, value, "1 or more")


_CHAMELEON = System()
_S_LORA = System(order="fifo", eviction="lru", keep_idle=False)

SYSTEMS: dict[str, System] = {
    "chameleon": _CHAMELEON,
    "chameleon-plus": System(order="boost", eviction="cost-aware", overlap_loads=True, whole_prompts=False, bound_stalls=True),
    "s-lora": _S_LORA,
    "s-lora-published": dataclasses.replace(_S_LORA, reserve_max_tokens=True, admission_interval=10, transfers_per_load=2),
    "sjf": dataclasses.replace(_S_LORA, order="sjf"),
    "fifo": System(order="fifo", eviction="lru", overlap_loads=True, whole_prompts=False),
    "chameleon-no-cache": dataclasses.replace(_CHAMELEON, eviction="lru", keep_idle=False),
    "chameleon-no-sched": dataclasses.replace(_CHAMELEON, order="fifo"),
    "chameleon-lru": dataclasses.replace(_CHAMELEON, eviction="lru"),
    "chameleon-fairshare": dataclasses.replace(_CHAMELEON, eviction="fairshare"),
    "chameleon-gdsf": dataclasses.replace(_CHAMELEON, eviction="gdsf"),
    "chameleon-prefetch": dataclasses.replace(_CHAMELEON, prefetch_predicted=True),
    "output-only": dataclasses.replace(_CHAMELEON, size="output"),
    "static": dataclasses.replace(_CHAMELEON, equal_levels=True),
}
"""The paper's systems, its baselines and its ablations; "fifo" is first come first served with an LRU cache and loads that
overlap, as users of other servers know it."""


def get_system(system: str | System) -> System:
    """Raises ValueError for a name that is none of SYSTEMS."""
    if isinstance(system, System):
        return system
    require(system in SYSTEMS, "system", system, ", ".join(SYSTEMS))
    return SYSTEMS[system]
