from __future__ import annotations

from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.serving.telemetry.recent import NUM_REQUESTS, Percentiles, RecentRequests


def begun(ttft: float) -> Request:
    request = Request("r", [1], SamplingParams(), arrival_time=0.0, seed=0)
    request.metrics.first_token_time = ttft
    return request


def test_no_percentiles_without_requests():
    assert RecentRequests().ttft() == Percentiles(0, None, None, None)


def test_percentiles_are_values_that_were_seen():
    recent = RecentRequests()
    for i in reversed(range(1, 201)):
        recent.first_token(begun(float(i)))
        recent.finished(begun(float(i)))  # must not count again
    assert recent.ttft() == Percentiles(200, 100.0, 180.0, 198.0)


def test_only_the_last_requests_count():
    recent = RecentRequests()
    for ttft in (*[100.0] * NUM_REQUESTS, *[1.0] * NUM_REQUESTS):
        recent.first_token(begun(ttft))
    assert recent.ttft() == Percentiles(NUM_REQUESTS, 1.0, 1.0, 1.0)
