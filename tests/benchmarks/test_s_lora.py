"""The simulation of S-LoRA's loop, held to its authors' measurements."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.simulator import s_lora
from benchmarks.simulator.cost_model import PROFILES, CostModel
from benchmarks.simulator.simulate import batch_max_tokens, simulate
from benchmarks.workload import Workload

POINTS = {f"{p.setting}-{p.num_adapters}-{p.req_rate:g}": p for p in s_lora.points()}


def test_workloads_are_as_long_as_the_measured_runs():
    """The last answer of a run that keeps up ends within a longest answer of the last arrival."""
    assert len(POINTS) == 10
    for point in POINTS.values():
        drawn = s_lora.workload(point)
        ended = len(drawn) / point.throughput_rps
        assert drawn.arrival_s[-1] < ended
        if point.req_rate <= 1.5:
            assert ended < drawn.arrival_s[-1] + 20


@pytest.mark.parametrize("name", ["S2-200-1", "S1-200-2.5", "S2-200-2.5"])  # the command has all ten
def test_measured_points_are_met(name):
    point = POINTS[name]
    result = s_lora.serve(point)
    assert len(result.ttft) / result.finished_s == pytest.approx(point.throughput_rps, rel=0.05)
    assert result.e2e.mean() == pytest.approx(point.avg_latency_s, rel=0.12)
    assert result.ttft.mean() == pytest.approx(point.avg_first_token_latency_s, rel=0.25)
    assert result.preemptions == 0


def test_the_a40_has_the_paper_s_first_tokens_on_an_idle_machine():
    """Figure 2: one medium request, whose adapter is not loaded, by rank."""
    profile = PROFILES["a40-s-lora"]
    ranks = {8: 0.074, 16: 0.078, 32: 0.088, 64: 0.107, 128: 0.144}
    for rank, expected in ranks.items():
        one = Workload(*(np.array([value]) for value in (0.5, 255, 2, 0, rank)))
        result = simulate(one, profile, "s-lora-published", length_factor=0.25)
        assert result.ttft[0] == pytest.approx(expected, rel=0.03)


def test_a_batch_takes_a_sixth_of_the_pool_or_3072_prompt_tokens():
    assert batch_max_tokens(PROFILES["a10g-s-lora"]) == 3072
    assert batch_max_tokens(PROFILES["a40-s-lora"]) == 8416
    assert PROFILES["a40-s-lora"].num_pages * 16 // 6 == 8424


def test_launches_of_s_lora_s_copies_hold_its_loop():
    profile = PROFILES["a10g-s-lora"]
    launches, transfers = CostModel(profile, {}).load(64 << 20, copies=2)
    assert launches == pytest.approx(0.0045)
    assert transfers == pytest.approx(2 * (64 << 20) / 25.8e9)
