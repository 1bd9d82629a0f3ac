"""Systems on devices that cannot meet the target for the time between tokens, under a virtual clock."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import typer

from benchmarks.machine import Out, describe, publish
from benchmarks.simulator.cost_model import LENGTH_FACTOR, PROFILES, Profile
from benchmarks.simulator.simulate import simulate
from benchmarks.workload import WorkloadSpec, generate
from chameleon_jax.config import EngineConfig
from chameleon_jax.systems import get_system

FAST = PROFILES["a40-llama-7b-one-pass"]
FULL_STEP_S = 0.073
"""Seconds of a step with 8 decodes and the least of a prompt on that profile."""
KNEE = {8: 3.1, 64: 8.2}
"""Load with which first come first served keeps up on that profile, requests a second, by slots: 0.9 of the most that it
serves."""
REQUESTS = 600
SECONDS = ("prefill_overhead", "lora_overhead", "lora_token_rank", "lora_row", "decode_overhead", "host", "link_latency")
RATES = ("bandwidth", "flops", "link_bandwidth")


@dataclasses.dataclass(frozen=True)
class Served:
    """Means over seeds, in units of the device's own speed, so that devices can be compared.

    Attributes:
        rate: Requests a second times seconds of the device's step.
        p50: Median TTFT, in steps of the device.
        p99: 99th percentile of the TTFT, in steps of the device.
        gap: 99th percentile of the time between tokens, seconds.
    """

    rate: float
    p50: float
    p99: float
    gap: float


def step_seconds(slowness: float) -> float:
    """Seconds of a step with next to no prompts, `slowness` times the default target."""
    return slowness * EngineConfig.tbt_slo


def slow_device(slowness: float) -> Profile:
    """Device with the A40's costs, all slower by the same factor."""
    factor = step_seconds(slowness) / FULL_STEP_S
    slowed = {name: getattr(FAST, name) * factor for name in SECONDS} | {name: getattr(FAST, name) / factor for name in RATES}
    return dataclasses.replace(FAST, name=f"{slowness:g} times slower", **slowed)


def serve(system: str, slowness: float, slots: int, load: float, step_tokens: int, seeds: Sequence[int]) -> Served:
    """Serve `load` times the knee with the default targets; all systems have the same `step_tokens`."""
    profile, step, figures = slow_device(slowness), step_seconds(slowness), []
    rps = KNEE[slots] * load * FULL_STEP_S / step
    if get_system(system).bound_stalls:
        step_tokens //= 4  # `simulate` gives those four times as many
    for seed in seeds:
        result = simulate(
            generate(WorkloadSpec(rps, REQUESTS / rps, seed, LENGTH_FACTOR)),
            profile,
            system,
            seed=seed,
            max_num_seqs=slots,
            max_num_batched_tokens=step_tokens,
            ttft_slo=EngineConfig.ttft_slo,
            tbt_slo=EngineConfig.tbt_slo,
        )
        p50, p99 = result.ttft_percentile(50), result.ttft_percentile(99)
        rate, gap = len(result.ttft) / result.finished_s, float(np.percentile(result.tbt, 99))
        figures.append((rate * step, p50 / step, p99 / step, gap))
    return Served(*np.mean(figures, axis=0).tolist())


def main(
    system: Annotated[str, typer.Option(help="System to compare with fifo, first come first served.")] = str(
        EngineConfig.system
    ),
    seeds: Annotated[int, typer.Option(help="Workloads to simulate for each row of the table.")] = 3,
    step_tokens: Annotated[int, typer.Option(help="Prompt tokens a step at most, for both systems.")] = 512,
    out: Out = None,
) -> None:
    """Compare a system with first come first served on slow devices, simulated.

    Loads are from half to 1.2 of the knee.
    """
    rows = []
    for slots in KNEE:
        for slowness in (0.25, 0.5, 0.7, 1, 4, 16):
            for load in (0.5, 0.8, 1.0, 1.2):
                ours = serve(system, slowness, slots, load, step_tokens, range(seeds))
                theirs = serve("fifo", slowness, slots, load, step_tokens, range(seeds))
                rows.append(
                    {
                        "slots": slots,
                        "step / target": slowness,
                        "load / knee": load,
                        "fifo TTFT p99, steps": f"{theirs.p99:.1f}",
                        "TTFT p99": f"{ours.p99 / theirs.p99 - 1:+.1%}",
                        "TTFT p50": f"{ours.p50 / theirs.p50 - 1:+.1%}",
                        "served": f"{ours.rate / theirs.rate - 1:+.2%}",
                        "gap p99, s": f"{ours.gap:.3f}",
                        "fifo's": f"{theirs.gap:.3f}",
                    }
                )
    about = {"simulated": f"{system} against fifo", "requests": f"{REQUESTS} x {seeds} seeds"}
    publish(describe() | about | {"table": rows}, out)
