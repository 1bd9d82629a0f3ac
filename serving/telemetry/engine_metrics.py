"""What an engine says of itself as metric families. Names follow vLLM's, with this project's prefix."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.serving.stats import AdapterStats, EngineStats

LEVELS = {AdapterTier.HOST.value: "host", AdapterTier.LOADING.value: "loading", AdapterTier.RESIDENT.value: "device"}


def families(stats: EngineStats) -> Iterator[Metric]:
    """Every family each time, so that what has not happened yet is there as well."""
    yield from _load(stats)
    yield from _pool(stats)
    yield from _adapters(stats)
    yield from _scheduler(stats)


def _load(stats: EngineStats) -> Iterator[Metric]:
    yield gauge("num_requests_running", "Requests that run.", stats.running)
    waiting = {q.name: q.waiting for q in stats.queues}
    yield gauge("num_requests_waiting", "Requests that wait, by queue of the scheduler.", waiting, "queue")
    yield gauge("num_requests_queued", "Requests that wait, in all queues: what a gateway reads.", stats.waiting)
    yield counter("prompt_tokens", "Prompt tokens computed, those of recomputed requests again.", stats.prompt_tokens)
    yield counter("generation_tokens", "Tokens generated.", stats.generation_tokens)
    yield counter("engine_steps", "Steps dispatched to the device.", stats.steps)
    yield counter("faults", "Failures of the device that were outlived.", stats.faults)


def _pool(stats: EngineStats) -> Iterator[Metric]:
    pages = {"kv": stats.pool.kv, "adapters": stats.pool.adapters, "free": stats.pool.free}
    yield gauge("pool_pages", "Pages of the device pool, by owner.", pages, "owner")
    text = "Share that KV takes of the pages it can have: all but those of adapters that may not be evicted. 1: none is left."
    kept = sum(a.num_pages for a in stats.adapters if a.tier != AdapterTier.HOST.value and not _is_idle(a))
    yield gauge("kv_cache_usage_perc", text, stats.pool.kv / max(1, stats.pool.total - kept))


def _adapters(stats: EngineStats) -> Iterator[Metric]:
    yield _requests_info(stats)
    yield _adapter_levels(stats)
    size = {"device": stats.pool.adapters * stats.page_bytes, "host": stats.host_bytes}
    yield gauge("lora_cache_bytes", "Bytes that adapters take, by tier of memory.", size, "tier")
    text = "Requests that found their adapter on the device when their turn came."
    yield counter("lora_cache_hits", text, {"device": stats.hits}, "tier")
    text = "Requests that did not find their adapter on the device when their turn came."
    yield counter("lora_cache_misses", text, {"device": stats.misses}, "tier")
    evictions = {"device": stats.evictions, "host": stats.spills}
    yield counter("lora_cache_evictions", "Adapters that left a tier: the device, or host memory for disk.", evictions, "tier")
    yield counter("lora_load_bytes", "Bytes of adapters that were sent to the device.", stats.load_bytes)
    outcomes = {"begun": stats.prefetches, "cancelled": stats.cancelled_loads}
    text = "Loads begun ahead of a request's turn, and loads given up as nobody waited for them any more."
    yield counter("lora_prefetch", text, outcomes, "outcome")


def _scheduler(stats: EngineStats) -> Iterator[Metric]:
    tokens = stats.page_tokens
    quotas = {q.name: q.quota_pages * tokens for q in stats.queues if q.quota_pages is not None}
    yield gauge("scheduler_quota_tokens", "What a queue's requests may hold, as tokens of KV.", quotas, "queue")
    free = {q.name: q.free_pages * tokens for q in stats.queues if q.free_pages is not None}
    yield gauge("scheduler_quota_free_tokens", "What is left of a queue's quota; below 0 while it owes.", free, "queue")
    yield counter("scheduler_bypass", "Requests that passed the head of their queue.", stats.bypasses)
    reasons = {"memory": stats.memory_squashes, "bypass": stats.bypass_squashes}
    text = "Requests that were made to wait again: for memory, or since they had passed another."
    yield counter("scheduler_squash", text, reasons, "reason")
    yield counter("preemptions", "Requests that were made to wait again, for either reason.", sum(reasons.values()))


def _requests_info(stats: EngineStats) -> Metric:
    """What gateways route by: who is here, who is wanted here, and whether one more would fit.

    They send a request to where its adapter is running, else to a server that has fewer adapters than `max_lora`. So "running"
    is what lies in the pool, in use or not, and `max_lora` how many adapters of the mean size the pool can hold altogether: as
    a label it must not follow the load, or each scrape would begin a new series.
    """
    here = [a for a in stats.adapters if a.tier == AdapterTier.RESIDENT.value]
    wanted = [a for a in stats.adapters if a.tier != AdapterTier.RESIDENT.value and a.references + a.waiting]
    mean = sum(a.num_pages for a in stats.adapters) / max(1, len(stats.adapters))
    fit = int(stats.pool.total / mean) if mean else 0
    labels = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
    family = GaugeMetricFamily("chameleon:lora_requests_info", "Adapters in the pool and awaited; Unix time.", labels=labels)
    family.add_metric((str(fit), _listed(here), _listed(wanted)), time.time())
    return family


def _adapter_levels(stats: EngineStats) -> Metric:
    labels = ("adapter_name", "level", "pinned", "rank")
    text = "1 for each adapter that is known, with where it is."
    family = GaugeMetricFamily("chameleon:lora_adapter_loaded", text, labels=labels)
    for a in stats.adapters:
        for name in a.names:
            family.add_metric((name, LEVELS[a.tier], str(a.pinned).lower(), str(a.rank)), 1)
    return family


def _listed(adapters: list[AdapterStats]) -> str:
    """Names, with commas between; one with a comma in it would be read as two, and is left out."""
    return ",".join(name for a in adapters for name in a.names if "," not in name)


def _is_idle(adapter: AdapterStats) -> bool:
    return adapter.tier == AdapterTier.RESIDENT.value and not adapter.references and not adapter.pinned


Values = float | Mapping[str, float]
"""Of a family without a label, or by the label's values."""


def gauge(name: str, text: str, values: Values, label: str = "") -> Metric:
    return _filled(GaugeMetricFamily(f"chameleon:{name}", text, labels=(label,) if label else ()), values)


def counter(name: str, text: str, values: Values, label: str = "") -> Metric:
    """Args: name: without the `_total` that is put behind it."""
    return _filled(CounterMetricFamily(f"chameleon:{name}", text, labels=(label,) if label else ()), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    if isinstance(values, Mapping):
        for label, value in values.items():
            family.add_metric((label,), value)
    else:
        family.add_metric((), values)
    return family
