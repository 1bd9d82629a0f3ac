"""What an engine says of itself: one value, taken between two steps."""

from __future__ import annotations

import dataclasses

from chameleon_jax.memory.page_pool import PoolUsage
from chameleon_jax.request import RequestState
from chameleon_jax.scheduler.multilevel import MultiLevelQueue
from chameleon_jax.serving.engine import LLMEngine


@dataclasses.dataclass(frozen=True)
class QueueStats:
    """One queue of the scheduler. Systems with one queue have no quotas.

    Attributes:
        name: "0" is that of the smallest requests.
        waiting: requests.
        quota_pages: pages that its requests may hold; None: no quota.
        free_pages: what is left of it, negative while it owes.
    """

    name: str
    waiting: int
    quota_pages: int | None = None
    free_pages: int | None = None


@dataclasses.dataclass(frozen=True)
class AdapterStats:
    """One adapter that is known.

    Attributes:
        names: what it is called; none once it was unloaded and requests still use it.
        tier: "host", "loading" or "resident".
        num_bytes, num_pages: what it takes in the pool while it is there.
        references: running requests that use it.
        waiting: requests that wait with it, or run.
        uses: requests that ran with it so far.
        loads: times it was brought into the pool.
        idle_s: seconds since a request used it, or since it was added.
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


@dataclasses.dataclass(frozen=True)
class RequestStats:
    """One unfinished request.

    Attributes:
        adapter: the name it came with; None: the base model.
        state: "waiting" or "running".
        age_s: seconds since it arrived.
    """

    request_id: str
    adapter: str | None
    state: str
    prompt_tokens: int
    output_tokens: int
    age_s: float


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Sizes now; counts since the start.

    Attributes:
        pool: pages of the device pool by owner.
        page_tokens, page_bytes: of one page, over all layers.
        host_bytes: packed adapters in host memory.
        spills: adapters that left host memory for disk.
        prefetches: loads that were begun ahead of a request's turn; cancelled_loads: those given up as nobody waited any more.
        memory_squashes, bypass_squashes: requests that were made to wait again, for memory or since they had passed another.
        bypasses: requests that passed the head of their queue.
        faults: failures of the device that were outlived.
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
    steps: int
    prompt_tokens: int
    generation_tokens: int
    finished: int
    hits: int
    misses: int
    evictions: int
    loads: int
    load_seconds: float
    load_bytes: int
    prefetches: int
    cancelled_loads: int
    memory_squashes: int
    bypass_squashes: int
    bypasses: int
    faults: int


def take_stats(engine: LLMEngine) -> EngineStats:
    """For the thread that owns the engine."""
    loop, now = engine.loop, engine.clock()
    scheduler, cache = loop.scheduler, loop.cache
    order = scheduler.order
    if isinstance(order, MultiLevelQueue):
        queues = tuple(
            QueueStats(str(i), len(level.waiting), level.quota, level.remaining) for i, level in enumerate(order.levels)
        )
        bypasses = order.num_bypasses
    else:
        queues, bypasses = (QueueStats("0", scheduler.num_waiting),), 0
    system = engine.config.system
    names = engine.adapters.names_by_hash()
    return EngineStats(
        system=system if isinstance(system, str) else "custom",
        running=len(scheduler.running),
        waiting=scheduler.num_waiting,
        queues=queues,
        requests=tuple(
            RequestStats(
                r.request_id,
                r.adapter_name,
                r.state.value,
                len(r.prompt_token_ids),
                len(r.output_token_ids),
                now - r.arrival_time,
            )
            for state in (RequestState.RUNNING, RequestState.WAITING)
            for r in loop.unfinished
            if r.state is state
        ),
        adapters=tuple(
            AdapterStats(
                names=tuple(names.get(e.info.content_hash, ())),
                content_hash=e.info.content_hash,
                rank=e.info.rank,
                tier=e.tier.value,
                num_bytes=e.info.num_bytes,
                num_pages=e.info.num_pages,
                references=e.references,
                waiting=e.requests - e.references,
                pinned=e.pinned,
                uses=e.use.uses,
                loads=e.loads,
                idle_s=now - e.use.last_used,
            )
            for e in cache.entries()
        ),
        pool=loop.pool.usage(),
        page_tokens=engine.layout.page_tokens,
        page_bytes=engine.layout.page_bytes(engine.dtype.itemsize),
        host_bytes=engine.store.bytes_in_memory,
        spills=engine.store.num_spills,
        steps=loop.counters.steps,
        prompt_tokens=loop.counters.prefill_tokens,
        generation_tokens=loop.counters.generation_tokens,
        finished=loop.counters.finished,
        hits=cache.counters.hits,
        misses=cache.counters.misses,
        evictions=cache.counters.evictions,
        loads=cache.counters.loads,
        load_seconds=cache.counters.load_seconds,
        load_bytes=cache.counters.bytes_sent,
        prefetches=scheduler.num_prefetches,
        cancelled_loads=scheduler.num_cancelled_loads,
        memory_squashes=scheduler.counters.memory_squashes,
        bypass_squashes=scheduler.counters.bypass_squashes,
        bypasses=bypasses,
        faults=loop.counters.faults,
    )
