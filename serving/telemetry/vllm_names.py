"""vLLM's names of the metrics that mean the same here, so that its dashboards, and gateways made for it, work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

NAMES = {
    "num_requests_running": ("num_requests_running",),
    "num_requests_queued": ("num_requests_waiting",),
    "kv_cache_usage_perc": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens",),
    "num_preemptions": ("num_preemptions",),
    "request_success": ("request_success",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": ("inter_token_latency_seconds", "time_per_output_token_seconds"),
    "time_per_output_token_seconds": ("request_time_per_output_token_seconds",),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "request_queue_time_seconds": ("request_queue_time_seconds",),
    "request_prefill_time_seconds": ("request_prefill_time_seconds",),
    "request_decode_time_seconds": ("request_decode_time_seconds",),
    "request_inference_time_seconds": ("request_inference_time_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_generation_tokens": ("request_generation_tokens",),
    "lora_requests_info": ("lora_requests_info",),
}
"""Name here, without prefix and `_total`, to vLLM's names: today's, and the one before where boards still query it."""

OWN_LABELS = ("queue", "reason")
"""Labels that vLLM's metrics lack. Their values are summed."""


def with_vllm_names(families: Iterable[Metric], model_name: str) -> Iterator[Metric]:
    """Yield each family, and behind it the same values under each of vLLM's names.

    Args:
        families: Families whose names begin with `chameleon:`.
        model_name: Value of the label `model_name`.
    """
    for family in families:
        yield family
        for name in NAMES.get(family.name.removeprefix("chameleon:"), ()):
            yield _renamed(family, f"vllm:{name}", model_name)


def _renamed(family: Metric, name: str, model_name: str) -> Metric:
    values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
    for sample in family.samples:
        labels = tuple((label, value) for label, value in sample.labels.items() if label not in OWN_LABELS)
        values[sample.name.replace(family.name, name, 1), labels] += sample.value
    renamed = Metric(name, family.documentation, family.type)
    own = {"model_name": model_name, "engine": "0"}
    renamed.samples = [Sample(sample, own | dict(labels), value) for (sample, labels), value in values.items()]
    return renamed
