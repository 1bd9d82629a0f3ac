"""Snapshot of an engine's state, taken between two steps."""

from __future__ import annotations

import dataclasses

from chameleon_jax.loop import LoopCounters
from chameleon_jax.memory.adapter_cache import CacheCounters, CacheEntry
from chameleon_jax.memory.page_pool import PoolUsage
from chameleon_jax.request import Request, RequestState
from chameleon_jax.scheduler.stats import ProxyCounters, QueueStats, SchedulerCounters
from chameleon_jax.serving.engine import LLMEngine


@dataclasses.dataclass(frozen=True)
class AdapterStats:
    """One registered adapter.

    Attributes:
        names: Its names; none once they were unloaded while requests still use it. For a mix, the sum as text.
        tier: "host", "loading" or "resident".
        num_bytes: Bytes of the pool that it takes while it is there.
        num_pages: Pages of the pool that it takes while it is there.
        references: Running requests that use it.
        waiting: Waiting requests that came with it.
        uses: Requests that ran with it so far.
        loads: Times that it was brought into the pool.
        idle_s: Seconds since a request used it, or since it was added.
    """

    names: tuple[str, ...]
    content_hash: str
    rank: int
    tier: str
    num_bytes: int
    num_pages: int
    references: int
    waiting: int
    pinned: bool
    uses: int
    loads: int
    idle_s: float

    @classmethod
    def of(cls, entry: CacheEntry, names: list[str], now: float) -> AdapterStats:
        """Take the state of one adapter.

        Args:
            entry: Its entry in the cache.
            names: Its names.
            now: Seconds of the engine's clock.
        """
        return cls(
            **vars(entry.info),
            names=tuple(names),
            tier=entry.tier.value,
            references=entry.references,
            waiting=entry.requests - entry.references,
            pinned=entry.pinned,
            uses=entry.use.uses,
            loads=entry.loads,
            idle_s=now - entry.use.last_used,
        )


@dataclasses.dataclass(frozen=True)
class RequestStats:
    """One unfinished request.

    Attributes:
        adapter: Adapter's name in the request; None for the base model.
        state: "waiting" or "running".
        age_s: Seconds since it arrived.
    """

    request_id: str
    adapter: str | None
    state: str
    prompt_tokens: int
    output_tokens: int
    age_s: float

    @classmethod
    def of(cls, request: Request, now: float) -> RequestStats:
        """Take the state of one request at `now`, seconds of the engine's clock."""
        prompt, output = len(request.prompt_token_ids), len(request.output_token_ids)
        age = now - request.arrival_time
        return cls(request.request_id, request.adapter_name, request.state.value, prompt, output, age)


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """State of an engine now, and its counters since the start.

    Attributes:
        running: Number of running requests.
        waiting: Number of waiting requests.
        queues: Waiting queues of the scheduler.
        requests: Unfinished requests, running ones first.
        pool: Pages of the device pool by owner.
        page_tokens: Tokens of a page.
        page_bytes: Bytes of a page, over all layers.
        host_bytes: Bytes of packed adapters in host memory.
        spills: Adapters that left host memory for disk.
        loop: Counters of the serving loop.
        cache: Counters of the adapter cache.
        scheduler: Counters of the scheduler.
        length_proxy: Counters of the length proxy; None where the engine has none.
    """

    system: str
    running: int
    waiting: int
    queues: tuple[QueueStats, ...]
    requests: tuple[RequestStats, ...]
    adapters: tuple[AdapterStats, ...]
    pool: PoolUsage
    page_tokens: int
    page_bytes: int
    host_bytes: int
    spills: int
    loop: LoopCounters
    cache: CacheCounters
    scheduler: SchedulerCounters
    length_proxy: ProxyCounters | None


def take_stats(engine: LLMEngine) -> EngineStats:
    """Take a snapshot, on the thread that owns the engine."""
    loop, now = engine.loop, engine.clock()
    system = engine.config.system
    names = loop.adapters.names_by_hash()
    unfinished = sorted(loop.unfinished, key=lambda request: request.state is not RequestState.RUNNING)
    return EngineStats(
        system=system if isinstance(system, str) else "custom",
        running=len(loop.scheduler.running),
        waiting=loop.scheduler.num_waiting,
        queues=tuple(loop.scheduler.policy.queues()),
        requests=tuple(RequestStats.of(request, now) for request in unfinished),
        adapters=tuple(AdapterStats.of(e, names.get(e.info.content_hash, []), now) for e in loop.cache.entries()),
        pool=loop.pool.usage(),
        page_tokens=engine.layout.page_tokens,
        page_bytes=engine.layout.page_bytes(engine.dtype.itemsize),
        host_bytes=engine.store.bytes_in_memory,
        spills=engine.store.num_spills,
        loop=dataclasses.replace(loop.counters),
        cache=dataclasses.replace(loop.cache.counters),
        scheduler=dataclasses.replace(loop.scheduler.counters),
        length_proxy=engine.proxy_counters,
    )
