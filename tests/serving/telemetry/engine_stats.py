"""Made-up stats of an engine with many adapters."""

from __future__ import annotations

from chameleon_jax.loop import LoopCounters
from chameleon_jax.memory.adapter_cache import CacheCounters
from chameleon_jax.memory.page_pool import PoolUsage
from chameleon_jax.scheduler.stats import ProxyCounters, QueueStats, SchedulerCounters
from chameleon_jax.serving.stats import AdapterStats, EngineStats, RequestStats


def engine_stats(names: list[str], num_running: int = 4, num_waiting: int = 1) -> EngineStats:
    """Adapters take a page. Every third is resident, every third loads and is waited for, and the first is pinned."""
    tiers = ("resident", "loading", "host")
    adapters = tuple(
        AdapterStats(
            names=(name,),
            content_hash=f"{i:064x}",
            rank=8,
            tier=tiers[i % 3],
            num_bytes=4096,
            num_pages=1,
            references=0,
            waiting=int(i % 3 == 1),
            pinned=i == 0,
            uses=i,
            loads=1,
            idle_s=1.0,
        )
        for i, name in enumerate(names)
    )
    states = ["running"] * num_running + ["waiting"] * num_waiting
    requests = tuple(
        RequestStats(f"request-{i}", names[i % len(names)] if names else None, state, 10, 20, 1.5)
        for i, state in enumerate(states)
    )
    used = sum(a.tier != "host" for a in adapters)
    return EngineStats(
        system="chameleon",
        running=num_running,
        waiting=num_waiting,
        queues=(QueueStats("0", num_waiting, 60, 40), QueueStats("1", 0, 40, -5)),
        requests=requests,
        adapters=adapters,
        pool=PoolUsage(total=2 * used + 20, free=used + 10, kv=10, adapters=used),
        page_tokens=16,
        page_bytes=4096,
        host_bytes=4096 * len(names),
        spills=3,
        loop=LoopCounters(
            steps=100,
            generation_tokens=2000,
            prefill_tokens=1000,
            decode_rows=1900,
            finished=50,
            load_wait_s=0.25,
            faults=1,
        ),
        cache=CacheCounters(hits=30, misses=10, loads=12, evictions=5, bytes_sent=1 << 20, load_seconds=0.5),
        scheduler=SchedulerCounters(
            prefetches=6,
            cancelled_loads=2,
            memory_preemptions=3,
            bypasses=4,
            bypass_squashes=1,
            underpredicted=20,
            overpredicted=25,
            length_updates=7,
            quota_refreshes=8,
            scaled_quotas=2,
        ),
        length_proxy=ProxyCounters(predicted=40, skipped=9, failed=1),
    )
