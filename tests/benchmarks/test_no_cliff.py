"""No latency cliff where active adapters exceed the pool, as servers with slots have it (SGLang #13349). Simulated."""

from __future__ import annotations

import pytest

from benchmarks.simulator.cost_model import PROFILES
from benchmarks.simulator.simulate import simulate
from benchmarks.workload import WorkloadSpec, generate

PROFILE = PROFILES["a40-llama-7b"]


@pytest.mark.parametrize("system", ["chameleon-plus", "chameleon"])
def test_the_median_grows_slowly_past_what_the_pool_holds(system):
    median, demand = {}, {}
    for count in (20, 200, 400, 800):
        workload = generate(WorkloadSpec(rps=6, duration_s=120, num_adapters=count, adapter_exponent=0.0, length_factor=0.25))
        demand[count] = sum(PROFILE.adapter_pages(rank) for rank in workload.ranks.tolist()) / PROFILE.num_pages
        result = simulate(workload, PROFILE, system)
        median[count] = result.ttft_percentile(50)
        assert result.loads > 0
    assert demand[20] < 0.1 and 1.5 < demand[400] < demand[800] and demand[800] > 3
    assert median[400] < 1.5 * median[20] and median[800] < 2 * median[20]
