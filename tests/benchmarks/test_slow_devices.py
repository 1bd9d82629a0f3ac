"""A target for the time between tokens that the device cannot meet costs nothing: the default system keeps up with first come
first served. Simulated: the serving loop under a virtual clock."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.cost_model import PROFILES, Profile
from benchmarks.simulate import simulate
from benchmarks.workload import WorkloadSpec, generate
from chameleon_jax.config import EngineConfig
from chameleon_jax.systems import System, get_system

LENGTH_FACTOR = 0.185
STEP_TOKENS = 512
REQUESTS = 600
SEEDS = (0, 1, 2)
KNEE = {8: 2.4, 64: 4.5}
"""Requests a second by slots, on the device of slowness 1: the most with which first come first served keeps up."""
FULL_STEP_S = 0.11
"""Seconds of a step with 8 decodes and the least of a prompt on the profile that is slowed down."""


def slow_device(slowness: float) -> Profile:
    """A device on which a step without prompts to speak of takes `slowness` times the default target."""
    fast, factor = PROFILES["a40-llama-7b"], slowness * EngineConfig.tbt_slo / FULL_STEP_S
    seconds = ("prefill_overhead", "lora_overhead", "lora_token_rank", "lora_row", "decode_overhead", "host", "link_latency")
    rates = ("bandwidth", "flops", "link_bandwidth")
    slowed = {name: getattr(fast, name) * factor for name in seconds} | {name: getattr(fast, name) / factor for name in rates}
    return dataclasses.replace(fast, name=f"{slowness} times slower", **slowed)


def served(system: str | System, slowness: float, slots: int, load: float) -> tuple[float, float, float]:
    """Requests a second and P99 TTFT, in units of the device's own speed, and P99 token gap in seconds: means over seeds."""
    profile, figures = slow_device(slowness), []
    speed = profile.flops / PROFILES["a40-llama-7b"].flops
    system = get_system(system)
    tokens = STEP_TOKENS // 4 if system.bound_stalls else STEP_TOKENS  # `simulate` gives those four times as many
    for seed in SEEDS:
        rps = KNEE[slots] * load * speed
        workload = generate(WorkloadSpec(rps, REQUESTS / rps, seed, LENGTH_FACTOR))
        result = simulate(
            workload,
            profile,
            system,
            length_factor=LENGTH_FACTOR,
            seed=seed,
            max_num_seqs=slots,
            max_num_batched_tokens=tokens,
            ttft_slo=EngineConfig.ttft_slo,
            tbt_slo=EngineConfig.tbt_slo,
        )
        rate, gap = len(result.ttft) / result.finished_s, float(np.percentile(result.tbt, 99))
        figures.append((rate / speed, result.ttft_percentile(99) * speed, gap))
    rate, p99, gap = np.mean(figures, axis=0).tolist()
    return rate, p99, gap


@pytest.mark.parametrize("slots", [8, 64])
@pytest.mark.parametrize("slowness", [1, 4, 16])
def test_a_target_out_of_reach_costs_neither_throughput_nor_time_to_first_token(slowness, slots):
    for load in (0.5, 1.0, 1.2):
        rate, p99, _ = served("chameleon-plus", slowness, slots, load)
        least_rate, most_p99, _ = served("fifo", slowness, slots, load)
        assert rate >= 0.995 * least_rate, load
        assert p99 <= 1.05 * most_p99, load


def test_a_target_within_reach_is_kept_at_little_cost():
    """Steps of 512 tokens take longer than the target on this device, and those of the default system do not."""
    rate, p99, gap = served("chameleon-plus", 0.5, slots=64, load=0.8)
    least_rate, most_p99, longer_gap = served("fifo", 0.5, slots=64, load=0.8)
    assert gap <= 1.05 * EngineConfig.tbt_slo < longer_gap
    assert rate >= 0.995 * least_rate
    assert p99 <= 1.2 * most_p99
