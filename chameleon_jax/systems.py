"""Serving systems by name. Each field of a system is a choice that an ablation can change."""

from __future__ import annotations

import dataclasses

from chameleon_jax.checks import require, require_field
from chameleon_jax.memory.eviction import POLICIES

ORDERS = ("fifo", "sjf", "multilevel", "boost")
SIZES = ("wrs", "output")
RESERVES = ("predicted", "max_tokens", "peak")


@dataclasses.dataclass(frozen=True)
class System:
    """Policies of one serving system.

    Attributes:
        order: order in which waiting requests start. "fifo" is first come first served. "sjf" is shortest predicted output
            first. "multilevel" (default) is the paper's queues with quotas. "boost", ours, is first come first served with a
            head start that is larger the less work a request is and the longer others have waited.
        size: sort key of the queues: "wrs" (default), the paper's weighted request size, or "output", the predicted output
            length alone.
        equal_levels: four queues of equal width and quota instead of clustered ones (default False).
        drift_test: form queues and quotas anew as soon as the traffic has visibly shifted, not only every five minutes
            (default False).
        eviction: policy that picks the idle adapter to evict, a name in `eviction.POLICIES` (default "chameleon").
        keep_idle: keep adapters that no request wants in the pool until their pages are needed (default True).
        prefetch_predicted: load adapters that are likely to be used soon into free pages (default False).
        overlap_loads: True lets others run while a request waits for its adapter. False (default) starts the request at once;
            its step waits for the load, and the load for the step before it, as where adapters are copied on the stream that
            computes.
        bound_stalls: limit the prompts of a step that also decodes by time (default False). Prompts take the time that keeps
            the step within `tbt_slo`, estimated from past steps and the adapters' ranks. They take more where the device cannot
            meet that target or requests wait for long (see `scheduler.step_budget`). False limits prompts by
            max_num_batched_tokens alone.
        reserve: memory that a request needs to start. "predicted" (default) is pages for its predicted output, "max_tokens"
            for max_tokens output tokens. "peak" starts it where all that run, each to its max_tokens, will never need more
            pages than there are, as S-LoRA does; requires `cycles`.
        cycles: S-LoRA's loop (default False): the prompts of a batch run in steps of their own while decodes wait, then ten
            steps decode before the next batch (see `scheduler.cycles`). Time bounds none of its steps, and its loads hold the
            device.
        limit_prompts: start requests until a step's prompts are full (default True). False limits them by memory alone;
            requires `cycles`.
        transfers_per_load: times that an adapter is copied to the device for one load (default 1).
    """

    order: str = "multilevel"
    size: str = "wrs"
    equal_levels: bool = False
    drift_test: bool = False
    eviction: str = "chameleon"
    keep_idle: bool = True
    prefetch_predicted: bool = False
    overlap_loads: bool = False
    bound_stalls: bool = False
    reserve: str = "predicted"
    cycles: bool = False
    limit_prompts: bool = True
    transfers_per_load: int = 1

    def __post_init__(self) -> None:
        for field, allowed in (("order", ORDERS), ("size", SIZES), ("eviction", tuple(POLICIES)), ("reserve", RESERVES)):
            require_field(self, field, getattr(self, field) in allowed, ", ".join(allowed))
        require_field(self, "transfers_per_load", self.transfers_per_load >= 1, "1 or more")
        if self.cycles:
            require_field(self, "order", self.order != "boost", "fifo, sjf, multilevel with cycles")
            require_field(self, "overlap_loads", not self.overlap_loads, "False with cycles")
            require_field(self, "bound_stalls", not self.bound_stalls, "False with cycles")
        else:
            require_field(self, "reserve", self.reserve != "peak", "predicted, max_tokens; peak with cycles alone")
            require_field(self, "limit_prompts", self.limit_prompts, "True; False with cycles alone")


_CHAMELEON = System()
_S_LORA = System(order="fifo", eviction="lru", keep_idle=False)
_S_LORA_PUBLISHED = dataclasses.replace(_S_LORA, reserve="peak", cycles=True, transfers_per_load=2)
_CHAMELEON_PUBLISHED = dataclasses.replace(_CHAMELEON, cycles=True, limit_prompts=False, transfers_per_load=2)

SYSTEMS: dict[str, System] = {
    "chameleon": _CHAMELEON,
    "chameleon-plus": System(order="boost", eviction="cost-aware", overlap_loads=True, bound_stalls=True),
    "s-lora": _S_LORA,
    "s-lora-published": _S_LORA_PUBLISHED,
    "sjf": dataclasses.replace(_S_LORA, order="sjf"),
    "fifo": System(order="fifo", eviction="lru", overlap_loads=True),
    "chameleon-no-cache": dataclasses.replace(_CHAMELEON, eviction="lru", keep_idle=False),
    "chameleon-no-sched": dataclasses.replace(_CHAMELEON, order="fifo"),
    "chameleon-lru": dataclasses.replace(_CHAMELEON, eviction="lru"),
    "chameleon-fairshare": dataclasses.replace(_CHAMELEON, eviction="fairshare"),
    "chameleon-gdsf": dataclasses.replace(_CHAMELEON, eviction="gdsf"),
    "chameleon-prefetch": dataclasses.replace(_CHAMELEON, prefetch_predicted=True),
    "output-only": dataclasses.replace(_CHAMELEON, size="output"),
    "static": dataclasses.replace(_CHAMELEON, equal_levels=True),
    "chameleon-published": _CHAMELEON_PUBLISHED,
    "chameleon-published-no-cache": dataclasses.replace(_CHAMELEON_PUBLISHED, eviction="lru", keep_idle=False),
    "chameleon-published-no-sched": dataclasses.replace(_CHAMELEON_PUBLISHED, order="fifo"),
}
"""The paper's systems, baselines and ablations by name, and ours.

Those called published run on S-LoRA's loop, all others on ours. "chameleon-plus" is ours. "fifo" is first come first served
with an LRU cache and loads that overlap computation, as in other servers.
"""


def get_system(system: str | System) -> System:
    """Return the system of a name, or the system itself; raise ValueError for a name outside SYSTEMS."""
    if isinstance(system, System):
        return system
    require(system in SYSTEMS, "system", system, ", ".join(SYSTEMS))
    return SYSTEMS[system]
