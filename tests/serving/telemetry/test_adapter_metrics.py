from __future__ import annotations

from collections.abc import Callable

from chameleon_jax.sampling_params import LoRAMix, LoRARequest
from chameleon_jax.serving.telemetry.metrics import Metrics
from tests.serving.telemetry.engine_stats import engine_stats
from tests.serving.telemetry.test_metrics import ended, families, serve, value


def serve_all(metrics: Metrics, *names: str | None) -> None:
    """Serves a request with each adapter."""
    for name in names:
        request = ended()
        request.adapter_name = name
        serve(metrics, request)


def requests(metrics: Metrics, is_adapter: Callable[[str], bool] = lambda name: True) -> dict[str, float]:
    """Requests that stopped, by label."""
    metrics.render(engine_stats([]), is_adapter=is_adapter)
    found = families(metrics, engine_stats([]))["chameleon:lora_request_success_total"]
    return {s.labels["adapter_name"]: s.value for s in found.samples if s.labels["finished_reason"] == "stop"}


def made(max_adapters: int) -> Metrics:
    metrics = Metrics(max_adapters)
    metrics.close()
    return metrics


def test_a_request_is_counted_for_its_adapter():
    metrics = made(2)
    serve_all(metrics, "a", None)
    found = families(metrics, engine_stats([]))
    for name in ("a", ""):
        assert value(found, "lora_request_success_total", adapter_name=name, finished_reason="stop") == 1
        assert value(found, "lora_request_success_total", adapter_name=name, finished_reason="error") == 0
        assert value(found, "lora_prompt_tokens_total", adapter_name=name) == 1
        assert value(found, "lora_generation_tokens_total", adapter_name=name) == 4
        assert value(found, "lora_time_to_first_token_seconds", "_sum", adapter_name=name) == 3.0
        assert value(found, "lora_request_queue_time_seconds", "_sum", adapter_name=name) == 1.0


def test_adapters_above_the_limit_are_counted_together():
    metrics = made(2)
    serve_all(metrics, "a", "b", "c", "a", "d", "other")
    assert requests(metrics) == {"": 0, "a": 2, "b": 1, "other": 3}
    metrics = made(0)
    serve_all(metrics, "a", None)
    assert requests(metrics) == {"": 1, "other": 1}


def test_mixes_are_counted_together_and_take_no_adapter_s_place():
    metrics = made(1)
    for weight in (0.1, 0.2):
        request = ended()
        request.adapter_name, request.is_mix = f"{weight}*a", True
        serve(metrics, request)
    serve_all(metrics, "a")
    assert requests(metrics, {"a"}.__contains__) == {"": 0, "a": 1, "other": 2}


def test_a_removed_name_leaves_its_place_to_another():
    metrics = made(2)
    serve_all(metrics, "a", "b", "c")
    assert requests(metrics, {"b", "c"}.__contains__) == {"": 0, "b": 1, "other": 1}
    serve_all(metrics, "c", "d")
    assert requests(metrics) == {"": 0, "b": 1, "c": 1, "other": 2}
    found = families(metrics, engine_stats([]))
    for name in ("lora_prompt_tokens_total", "lora_time_to_first_token_seconds", "lora_request_queue_time_seconds"):
        assert {s.labels["adapter_name"] for s in found[f"chameleon:{name}"].samples} == {"", "b", "c", "other"}


def test_a_request_that_ends_after_its_adapter_was_removed_keeps_no_series():
    metrics = made(2)
    serve_all(metrics, "a")
    assert "a" not in requests(metrics, lambda name: False)
    serve_all(metrics, "a")  # it ran until now
    assert "a" not in requests(metrics, lambda name: False)


def test_requests_lost_with_the_engine_count_for_their_adapters():
    metrics = made(1)
    metrics.by_adapter.engine_died(
        None, [None, LoRARequest("a"), LoRARequest("a"), LoRARequest("b"), LoRAMix([LoRARequest("a")])]
    )
    found = families(metrics, engine_stats([]))
    lost = {
        name: value(found, "lora_request_success_total", adapter_name=name, finished_reason="error")
        for name in ("", "a", "other")
    }
    assert lost == {"": 1, "a": 2, "other": 2}


def test_requests_without_a_first_token_have_a_time_in_the_queue():
    metrics = made(1)
    request = ended("abort", first=None)
    request.adapter_name = "a"
    serve(metrics, request)
    found = families(metrics, engine_stats([]))
    assert value(found, "lora_request_queue_time_seconds", "_count", adapter_name="a") == 1
    assert value(found, "lora_time_to_first_token_seconds", "_count", adapter_name="a") == 0
