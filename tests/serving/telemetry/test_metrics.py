from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from chameleon_jax.errors import EngineDead
from chameleon_jax.executor import LoadResult
from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest, SamplingParams
from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.stats import EngineStats
from chameleon_jax.serving.telemetry.metrics import Metrics
from tests.serving.conftest import make_service
from tests.serving.telemetry.engine_stats import engine_stats

PUBLISHED = {
    "engine_up": (),
    "num_requests_running": (),
    "num_requests_waiting": ("queue",),
    "time_to_first_token_seconds": (),
    "time_per_output_token_seconds": (),
    "inter_token_latency_seconds": (),
    "request_prefill_time_seconds": (),
    "request_decode_time_seconds": (),
    "request_inference_time_seconds": (),
    "request_prompt_tokens": (),
    "request_generation_tokens": (),
    "lora_request_success_total": ("adapter_name", "finished_reason"),
    "lora_prompt_tokens_total": ("adapter_name",),
    "lora_generation_tokens_total": ("adapter_name",),
    "lora_time_to_first_token_seconds": ("adapter_name",),
    "lora_request_queue_time_seconds": ("adapter_name",),
    "e2e_request_latency_seconds": (),
    "request_queue_time_seconds": ("queue",),
    "kv_cache_usage_perc": (),
    "generation_tokens_total": (),
    "prompt_tokens_total": (),
    "request_success_total": ("finished_reason",),
    "lora_requests_info": ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    "lora_adapter_loaded": ("adapter_name", "level", "pinned", "rank"),
    "lora_cache_bytes": ("tier",),
    "lora_cache_hits_total": ("tier",),
    "lora_cache_misses_total": ("tier",),
    "lora_cache_evictions_total": ("tier",),
    "lora_adapter_load_seconds": (),
    "lora_prefetch_total": ("outcome",),
    "scheduler_quota_tokens": ("queue",),
    "scheduler_bypass_total": (),
    "num_preemptions_total": ("reason",),
    "compilations_total": ("phase",),
    "pool_pages": ("owner",),
    "faults_total": (),
}
"""What dashboards and gateways of users rely on: names and labels."""


ELSEWHERE = {"finished": "request_success", "loads": "lora_adapter_load_seconds", "load_seconds": "lora_adapter_load_seconds"}
"""Counters of the engine that an observed metric has too."""


@pytest.fixture
def metrics() -> Iterator[Metrics]:
    metrics = Metrics()
    yield metrics
    metrics.close()


def families(metrics: Metrics, stats: EngineStats | None, up: bool = True) -> dict[str, Metric]:
    """By name; that of a counter ends in `_total`."""
    parsed = list(text_string_to_metric_families(metrics.render(stats, up).decode()))
    named = {f.name + ("_total" if f.type == "counter" else ""): f for f in parsed}
    assert len(named) == len(parsed), "a family is there twice"
    return named


def value(found: dict[str, Metric], name: str, suffix: str = "", **labels: str) -> float:
    (sample,) = [
        s
        for s in found[f"chameleon:{name}"].samples
        if s.name == f"chameleon:{name}{suffix}" and labels.items() <= s.labels.items()
    ]
    return sample.value


def test_every_counter_of_the_engine_is_a_metric(metrics):
    numbers = itertools.count(1_000_003, 17)
    stats = engine_stats(["a"])
    filled, expected = {}, {}
    for part in ("loop", "cache", "scheduler", "length_proxy"):
        counters = getattr(stats, part)
        values = {field.name: next(numbers) for field in dataclasses.fields(counters)}
        expected |= {f"{part}.{name}": value for name, value in values.items() if name not in ELSEWHERE}
        filled[part] = dataclasses.replace(counters, **values)
    text = metrics.render(dataclasses.replace(stats, **filled)).decode()
    published = {float(line.rpartition(" ")[2]) for line in text.splitlines() if not line.startswith("#")}
    assert {name: value for name, value in expected.items() if value not in published} == {}


def ended(
    reason: str = "stop", scheduled: float | None = 2.0, first: float | None = 4.0, end: float = 10.0, tokens: int = 4
) -> Request:
    request = Request("r", [1], SamplingParams(), arrival_time=1.0, seed=0, queue=2)
    request.finish_reason = FinishReason(reason)
    request.output_token_ids = [0] * tokens
    request.metrics.first_scheduled_time = scheduled
    request.metrics.first_token_time = first
    request.metrics.finished_time = end
    return request


def serve(metrics: Metrics, request: Request) -> None:
    """Tells of a request what an engine does."""
    if request.metrics.first_token_time is not None:
        metrics.first_token(request)
    metrics.finished(request)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_labels(metrics, name):
    serve(metrics, ended())  # before that, nobody knows which queues there are
    found = families(metrics, engine_stats(["a"]))[f"chameleon:{name}"]
    assert found.samples
    for sample in found.samples:
        assert tuple(sorted(sample.labels.keys() - {"le"})) == tuple(sorted(PUBLISHED[name]))


def test_every_family_is_there_before_anything_has_happened(metrics):
    found = families(metrics, engine_stats([], num_running=0, num_waiting=0))
    assert {f"chameleon:{name}" for name in PUBLISHED} <= found.keys()
    assert value(found, "request_success_total", finished_reason="error") == 0
    assert all(not s.name.endswith("_created") for family in found.values() for s in family.samples)


def test_what_the_engine_says_is_what_a_scrape_reads(metrics):
    stats = engine_stats(["a", "b", "c"])
    found = families(metrics, stats)
    assert value(found, "num_requests_running") == 4
    assert value(found, "num_requests_waiting", queue="0") == value(found, "num_requests_queued") == 1
    assert value(found, "scheduler_quota_tokens", queue="1") == 640
    assert value(found, "scheduler_quota_free_tokens", queue="1") == -80
    assert {s.labels["owner"]: s.value for s in found["chameleon:pool_pages"].samples} == {"kv": 10, "adapters": 2, "free": 12}
    assert value(found, "kv_cache_usage_perc") == 10 / 22  # one adapter is pinned, one loads: neither can make way
    assert value(found, "lora_cache_bytes", tier="device") == 2 * 4096
    assert value(found, "lora_cache_bytes", tier="host") == 3 * 4096
    assert value(found, "lora_cache_evictions_total", tier="device") == 5
    assert value(found, "lora_cache_evictions_total", tier="host") == 3
    assert value(found, "num_preemptions_total", reason="memory") == 3
    assert value(found, "num_preemptions_total", reason="bypass") == 1
    assert value(found, "lora_adapter_loaded", adapter_name="a", level="device", pinned="true", rank="8") == 1
    assert value(found, "lora_adapter_loaded", adapter_name="b", level="loading", pinned="false") == 1
    assert value(found, "lora_adapter_loaded", adapter_name="c", level="host") == 1


def test_what_gateways_route_by(metrics):
    (info,) = families(metrics, engine_stats(["a", "b", "c", "d", "e,f", "g,h"]))["chameleon:lora_requests_info"].samples
    assert info.labels["running_lora_adapters"] == "a,d"
    assert info.labels["waiting_lora_adapters"] == "b"  # "e,f" would be read as two
    assert info.labels["max_lora"] == "28"  # pages of the pool, at one page an adapter
    assert info.value > 1.6e9  # of several series, gateways take the latest


def test_the_series_that_gateways_read_does_not_change_with_the_load(metrics):
    def labels(free: int, kv: int) -> dict[str, str]:
        stats = engine_stats(["a", "b", "c"])
        pool = dataclasses.replace(stats.pool, free=free, kv=kv)
        (info,) = families(metrics, dataclasses.replace(stats, pool=pool))["chameleon:lora_requests_info"].samples
        return info.labels

    assert labels(free=22, kv=0) == labels(free=12, kv=10) == labels(free=0, kv=22)


def test_500_adapters_with_hostile_names(metrics):
    names = [f'adapter-{i}"\\\n}} 1\nchameleon:faults_total 99' for i in range(500)]
    found = families(metrics, engine_stats(names))
    assert [s.labels["adapter_name"] for s in found["chameleon:lora_adapter_loaded"].samples] == names
    assert value(found, "faults_total") == 1


def test_latencies_of_a_request(metrics):
    serve(metrics, ended())
    found = families(metrics, engine_stats([]))
    assert value(found, "time_to_first_token_seconds", "_sum") == 3.0
    assert value(found, "time_per_output_token_seconds", "_sum") == 2.0
    assert value(found, "e2e_request_latency_seconds", "_sum") == 9.0
    assert value(found, "request_queue_time_seconds", "_sum", queue="2") == 1.0
    assert value(found, "request_success_total", finished_reason="stop") == 1
    assert value(found, "request_prefill_time_seconds", "_sum") == 2.0
    assert value(found, "request_decode_time_seconds", "_sum") == 6.0
    assert value(found, "request_inference_time_seconds", "_sum") == 8.0
    assert value(found, "request_prompt_tokens", "_sum") == 1
    assert value(found, "request_generation_tokens", "_sum") == 4


def stepped(metrics: Metrics, *requests: Request) -> None:
    """Tells of a step in which each request got a token, or ended without one."""
    metrics.updated([OutputSnapshot.of(request) for request in requests])


def test_times_between_tokens_are_counted_for_each_token():
    clock = iter([10.0, 10.25, 11.25, 11.5, 20.0])
    metrics = Metrics(clock=lambda: next(clock))
    metrics.close()
    one, other, aborted = (ended() for _ in range(3))
    for request in (one, other, aborted):
        request.finish_reason = None
    stepped(metrics, one, other, aborted)  # the first tokens
    stepped(metrics, one, other)  # 0.25 s each
    stepped(metrics, other)  # 1 s
    one.finish_reason = FinishReason.STOP
    stepped(metrics, one)  # 1.25 s, as it was preempted
    metrics.finished(one)
    aborted.finish_reason = FinishReason.ABORT
    stepped(metrics, aborted)  # no token
    metrics.finished(aborted)
    found = families(metrics, engine_stats([]))
    assert value(found, "inter_token_latency_seconds", "_count") == 4
    assert value(found, "inter_token_latency_seconds", "_sum") == 2.75
    assert value(found, "inter_token_latency_seconds", "_bucket", le="0.3") == 2
    assert value(found, "inter_token_latency_seconds", "_bucket", le="1.0") == 3
    assert value(found, "inter_token_latency_seconds", "_bucket", le="+Inf") == 4
    assert set(metrics._token_at) == {other}  # ended requests leave nothing behind


def test_metrics_of_the_process(metrics):
    found = {family.name for family in text_string_to_metric_families(metrics.render(None).decode())}
    assert {"process_resident_memory_bytes", "process_cpu_seconds", "process_open_fds"} <= found


def test_the_time_to_a_first_token_does_not_wait_for_the_last(metrics):
    request = ended()
    metrics.first_token(request)
    found = families(metrics, engine_stats([]))
    assert value(found, "time_to_first_token_seconds", "_sum") == 3.0
    assert value(found, "request_queue_time_seconds", "_sum", queue="2") == 1.0
    assert value(found, "e2e_request_latency_seconds", "_count") == 0
    metrics.finished(request)
    found = families(metrics, engine_stats([]))
    assert value(found, "time_to_first_token_seconds", "_count") == 1
    assert value(found, "request_queue_time_seconds", "_count", queue="2") == 1
    assert value(found, "e2e_request_latency_seconds", "_count") == 1


def test_an_engine_that_is_dead(metrics):
    serve(metrics, ended())
    metrics.engine_died(EngineDead("the device is gone"), [None, LoRARequest("a"), LoRARequest("a")])
    found = families(metrics, engine_stats([]), up=False)
    assert value(found, "engine_up") == 0
    assert value(found, "request_success_total", finished_reason="error") == 3
    found = families(metrics, None, up=False)  # it never said anything
    assert value(found, "engine_up") == 0 and "chameleon:num_requests_running" not in found
    assert value(found, "time_to_first_token_seconds", "_count") == 1


def test_requests_without_some_of_the_times(metrics):
    serve(metrics, ended("abort", scheduled=None, first=None, tokens=0))
    serve(metrics, ended("error", first=None, tokens=0))
    serve(metrics, ended("abort"))
    serve(metrics, ended("length", tokens=1))
    found = families(metrics, engine_stats([]))
    assert value(found, "request_queue_time_seconds", "_count") == 3
    assert value(found, "time_to_first_token_seconds", "_count") == 2
    assert value(found, "e2e_request_latency_seconds", "_count") == 1
    assert value(found, "time_per_output_token_seconds", "_count") == 0
    assert value(found, "request_success_total", finished_reason="abort") == 2


def test_loads(metrics):
    metrics.loaded(LoadResult("hash", None, 100, 0.25))
    metrics.loaded(LoadResult("hash", OSError("gone")))
    found = families(metrics, engine_stats([]))
    assert value(found, "lora_adapter_load_seconds", "_count") == 1
    assert value(found, "lora_adapter_load_seconds", "_sum") == 0.25
    assert value(found, "lora_load_failures_total") == 1


def test_compilations_before_and_while_serving(metrics):
    def compile_one(k: int) -> None:
        jax.jit(lambda x: x * k + k).lower(jnp.zeros(3)).compile()

    def counts() -> tuple[float, float]:
        found = families(metrics, engine_stats([]))
        return tuple(value(found, "compilations_total", phase=phase) for phase in ("start", "serving"))  # type: ignore[return-value]

    compile_one(2)
    start, serving = counts()
    assert start >= 1 and serving == 0
    metrics.compilations.serve()
    jnp.zeros(3)
    compile_one(3)
    assert counts()[0] == start and counts()[1] >= 1
    before = counts()
    metrics.close()
    compile_one(4)
    assert counts() == before


def test_a_scrape_after_requests(shared_llm: AsyncLLM, adapter_dir, metrics):
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)

    async def ask() -> tuple[EngineStats, EngineStats]:
        await make_service(shared_llm, adapter_dir).load_named({})
        before = await shared_llm.stats(max_age=0)
        shared_llm.observers.append(metrics)
        try:
            loras = [None, LoRARequest("a0"), LoRARequest("a1"), LoRARequest("a0")]

            async def one(lora: LoRARequest | None) -> None:
                async for _ in shared_llm.generate("twelve bytes", params, lora):
                    pass

            await asyncio.gather(*(one(lora) for lora in loras))
        finally:
            shared_llm.observers.remove(metrics)
        return before, await shared_llm.stats(max_age=0)

    before, after = asyncio.run(ask())
    earlier, found = families(metrics, before), families(metrics, after)

    def grown(name: str, **labels: str) -> float:
        return value(found, name, **labels) - value(earlier, name, **labels)

    assert grown("generation_tokens_total") == 20
    assert grown("prompt_tokens_total") == 4 * len("twelve bytes")
    assert grown("lora_cache_hits_total", tier="device") + grown("lora_cache_misses_total", tier="device") == 3
    assert value(found, "request_success_total", finished_reason="length") == 4
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds", "e2e_request_latency_seconds"):
        assert value(found, name, "_count") == 4
        assert value(found, name, "_sum") > 0
    assert value(found, "inter_token_latency_seconds", "_count") == 4 * (5 - 1)
    for name, requests in {"": 1, "a0": 2, "a1": 1}.items():
        assert value(found, "lora_request_success_total", adapter_name=name, finished_reason="length") == requests
        assert value(found, "lora_generation_tokens_total", adapter_name=name) == 5 * requests
    assert value(found, "request_queue_time_seconds", "_count", queue="0") == 4
    assert value(found, "compilations_total", phase="serving") == 0
    assert value(found, "lora_adapter_loaded", adapter_name="a0", level="device", rank="2") == 1
    (info,) = found["chameleon:lora_requests_info"].samples
    assert {"a0", "a1"} <= set(info.labels["running_lora_adapters"].split(","))
    assert value(found, "num_requests_running") == 0 and value(found, "engine_up") == 1
