"""Metrics under vLLM's names, and the metrics that its public dashboards query."""

from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from chameleon_jax.serving.telemetry.metrics import Metrics
from tests.serving.telemetry.engine_stats import engine_stats
from tests.serving.telemetry.test_metrics import ended, serve

QUERIED = [
    "e2e_request_latency_seconds",
    "generation_tokens_total",
    "gpu_cache_usage_perc",
    "inter_token_latency_seconds",
    "kv_cache_usage_perc",
    "num_preemptions_total",
    "num_requests_running",
    "num_requests_waiting",
    "prompt_tokens_total",
    "request_decode_time_seconds",
    "request_generation_tokens",
    "request_prefill_time_seconds",
    "request_prompt_tokens",
    "request_queue_time_seconds",
    "request_success_total",
    "request_time_per_output_token_seconds",
    "time_per_output_token_seconds",
    "time_to_first_token_seconds",
]
"""Metrics that vLLM's boards `grafana.json`, `vllm_overview.json`, `performance_statistics.json` and `query_statistics.json`
query, and that are published here. Histograms stand for their series `_bucket`, `_sum` and `_count`."""

NOT_APPLICABLE = {
    "request_max_num_generation_tokens": "each choice is a request of its own; request_generation_tokens has its length",
    "num_requests_waiting_by_reason": "requests wait in queues by size, chameleon:num_requests_waiting{queue}",
    "iteration_tokens_total": "steps and tokens are counted, not the sizes of steps: chameleon:engine_steps_total",
    "prefix_cache_hits_total": "there is no prefix cache",
    "prefix_cache_queries_total": "there is no prefix cache",
    "prompt_tokens_by_source_total": "every prompt token is computed",
    "external_prefix_cache_hits_total": "there is no prefix cache",
    "external_prefix_cache_queries_total": "there is no prefix cache",
    "mm_cache_hits_total": "models are text only",
    "mm_cache_queries_total": "models are text only",
}
"""Metrics that the same boards query and that are not published, with the reason. Of other prefixes, `vllm_overview.json`
queries `http_requests_total` and `http_request_duration_seconds`: the access log has the status and seconds of each request."""


def series(metrics: Metrics, prefix: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Value of each series by name without the prefix, and labels."""
    text = metrics.render(engine_stats(["a", "b"]), model_name="base").decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (sample.name.removeprefix(prefix), tuple(sorted(sample.labels.items()))): sample.value
        for sample in samples
        if sample.name.startswith(prefix)
    }


def served(vllm_names: bool = True) -> Metrics:
    metrics = Metrics(vllm_names=vllm_names)
    metrics.close()
    for queue in (0, 2):
        request = ended()
        request.queue = queue
        serve(metrics, request)
    return metrics


def test_every_series_of_vllms_boards_is_published_or_listed_with_the_reason():
    published = {name for name, _ in series(served(), "vllm:")}
    histograms = {name for name in QUERIED if f"{name}_bucket" in published}
    assert {f"{name}{suffix}" for name in histograms for suffix in ("_bucket", "_sum", "_count")} <= published
    assert set(QUERIED) - histograms <= published
    assert not {re.sub("_(bucket|sum|count)$", "", name) for name in published} & NOT_APPLICABLE.keys()


def test_series_carry_the_labels_that_the_boards_select_by():
    found = series(served(), "vllm:")
    assert all(("model_name", "base") in labels and ("engine", "0") in labels for _, labels in found)
    reasons = {dict(labels)["finished_reason"] for name, labels in found if name == "request_success_total"}
    assert reasons == {"stop", "length", "abort", "error"}


def test_values_are_those_under_the_own_names():
    metrics = served()
    own, vllm = series(metrics, "chameleon:"), series(metrics, "vllm:")
    labels = (("engine", "0"), ("model_name", "base"))

    def same(name: str, other: str | None = None) -> bool:
        return own[name, ()] == vllm[other or name, labels]

    assert same("num_requests_running") and same("num_requests_queued", "num_requests_waiting")
    assert same("kv_cache_usage_perc") and same("kv_cache_usage_perc", "gpu_cache_usage_perc")
    assert same("time_per_output_token_seconds_sum", "request_time_per_output_token_seconds_sum")
    assert same("inter_token_latency_seconds_count", "time_per_output_token_seconds_count")
    assert vllm["num_preemptions_total", labels] == 4  # of both reasons
    assert vllm["request_queue_time_seconds_count", labels] == 2  # of both queues
    assert vllm["request_queue_time_seconds_bucket", (*labels[:1], ("le", "1.0"), *labels[1:])] == 2
    (info,) = [labels for name, labels in vllm if name == "lora_requests_info"]
    assert dict(info)["running_lora_adapters"] == "a"


def test_the_names_can_be_switched_off():
    assert not series(served(vllm_names=False), "vllm:")
    assert series(served(vllm_names=False), "chameleon:")
