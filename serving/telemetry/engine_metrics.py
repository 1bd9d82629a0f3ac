"""Metric families of an engine's state. Names follow vLLM's, with this project's prefix."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.scheduler.stats import ProxyCounters
from chameleon_jax.serving.stats import AdapterStats, EngineStats

LEVELS = {AdapterTier.HOST.value: "host", AdapterTier.LOADING.value: "loading", AdapterTier.RESIDENT.value: "device"}


def families(stats: EngineStats) -> Iterator[Metric]:
    """Yield every family each time, counters at 0 too, so that a dashboard finds them from the start."""
    yield from _load(stats)
    yield from _pool(stats)
    yield from _adapters(stats)
    yield from _scheduler(stats)


def _load(stats: EngineStats) -> Iterator[Metric]:
    loop = stats.loop
    yield gauge("num_requests_running", "Running requests.", stats.running)
    waiting = {q.name: q.waiting for q in stats.queues}
    yield gauge("num_requests_waiting", "Waiting requests, by queue of the scheduler.", waiting, "queue")
    yield gauge("num_requests_queued", "Waiting requests in all queues, for gateways.", stats.waiting)
    yield counter("prompt_tokens", "Prompt tokens computed; preempted requests count again.", loop.prefill_tokens)
    yield counter("generation_tokens", "Tokens generated.", loop.generation_tokens)
    yield counter("engine_steps", "Steps dispatched to the device.", loop.steps)
    yield counter("decode_rows", "Rows decoded in all steps.", loop.decode_rows)
    yield counter("load_wait_seconds", "Seconds for which steps were held back by adapter loads.", loop.load_wait_s)
    yield counter("faults", "Device failures that the engine recovered from.", loop.faults)


def _pool(stats: EngineStats) -> Iterator[Metric]:
    pages = {"kv": stats.pool.kv, "adapters": stats.pool.adapters, "free": stats.pool.free}
    yield gauge("pool_pages", "Pages of the device pool, by owner.", pages, "owner")
    text = "Share of the pages open to KV that KV has: pages of adapters that cannot be evicted are left out. 1 is full."
    kept = sum(a.num_pages for a in stats.adapters if a.tier != AdapterTier.HOST.value and not _is_idle(a))
    yield gauge("kv_cache_usage_perc", text, stats.pool.kv / max(1, stats.pool.total - kept))


def _adapters(stats: EngineStats) -> Iterator[Metric]:
    cache, scheduler = stats.cache, stats.scheduler
    yield _requests_info(stats)
    yield _adapter_levels(stats)
    size = {"device": stats.pool.adapters * stats.page_bytes, "host": stats.host_bytes}
    yield gauge("lora_cache_bytes", "Bytes of adapters, by tier of memory.", size, "tier")
    text = "Requests whose adapter was on the device when their turn came."
    yield counter("lora_cache_hits", text, {"device": cache.hits}, "tier")
    text = "Requests whose adapter was not on the device when their turn came."
    yield counter("lora_cache_misses", text, {"device": cache.misses}, "tier")
    evictions = {"device": cache.evictions, "host": stats.spills}
    yield counter("lora_cache_evictions", "Adapters that left a tier: the device, or host memory for disk.", evictions, "tier")
    yield counter("lora_loaded_bytes", "Bytes of the pool that adapter loads filled.", cache.bytes_loaded)
    yield counter("lora_load_bytes", "Bytes of adapters sent to the device.", cache.bytes_sent)
    outcomes = {"begun": scheduler.prefetches, "cancelled": scheduler.cancelled_loads}
    text = "Adapter loads begun ahead of a request's turn, and loads cancelled as no request waited for them any more."
    yield counter("lora_prefetch", text, outcomes, "outcome")


def _scheduler(stats: EngineStats) -> Iterator[Metric]:
    tokens, counters = stats.page_tokens, stats.scheduler
    quotas = {q.name: q.quota_pages * tokens for q in stats.queues if q.quota_pages is not None}
    yield gauge("scheduler_quota_tokens", "Quota of a queue, in tokens of KV.", quotas, "queue")
    free = {q.name: q.free_pages * tokens for q in stats.queues if q.free_pages is not None}
    text = "Quota that a queue has left, in tokens of KV; negative while the queue exceeds its quota."
    yield gauge("scheduler_quota_free_tokens", text, free, "queue")
    text = "Times that queues and quotas were formed from recent traffic."
    yield counter("scheduler_quota_refreshes", text, counters.quota_refreshes)
    text = "Times that quotas were scaled down, as the least quotas exceeded the pool together."
    yield counter("scheduler_quotas_scaled", text, counters.scaled_quotas)
    yield counter("scheduler_bypass", "Requests that started ahead of the head of their queue.", counters.bypasses)
    reasons = {"memory": counters.memory_preemptions, "bypass": counters.bypass_squashes}
    text = "Running requests preempted: for memory, or because they had bypassed the head of their queue."
    yield counter("num_preemptions", text, reasons, "reason")
    outcomes = {"under": counters.underpredicted, "over": counters.overpredicted}
    text = "Requests that ended with more output tokens than predicted (under), or with fewer (over)."
    yield counter("output_len_mispredictions", text, outcomes, "prediction")
    text = "Waiting requests whose predicted output length was replaced by a later prediction."
    yield counter("output_len_updates", text, counters.length_updates)
    proxy = stats.length_proxy or ProxyCounters()
    outcomes = {"predicted": proxy.predicted, "skipped": proxy.skipped, "failed": proxy.failed}
    yield counter("length_proxy_requests", "Requests given to the length proxy, by outcome.", outcomes, "outcome")


def _requests_info(stats: EngineStats) -> Metric:
    """Describe the adapters for gateways: those in the pool, those awaited, and the number that fits.

    A gateway sends a request to a server where its adapter is running, else to one that has fewer adapters than `max_lora`. So
    "running" lists the adapters in the pool, in use or not. `max_lora` is the number of adapters of mean size that fit the
    whole pool: a label must not follow the load, or each scrape would begin a new series.
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
    text = "1 for each registered adapter, with its tier of memory as level."
    family = GaugeMetricFamily("chameleon:lora_adapter_loaded", text, labels=labels)
    for a in stats.adapters:
        for name in a.names:
            family.add_metric((name, LEVELS[a.tier], str(a.pinned).lower(), str(a.rank)), 1)
    return family


def _listed(adapters: list[AdapterStats]) -> str:
    """Join names with commas. A name with a comma in it would be read as two, and is left out."""
    return ",".join(name for a in adapters for name in a.names if "," not in name)


def _is_idle(adapter: AdapterStats) -> bool:
    return adapter.tier == AdapterTier.RESIDENT.value and not adapter.references and not adapter.pinned


Values = float | Mapping[str, float]
"""Value of a family without a label, or values by label."""


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
