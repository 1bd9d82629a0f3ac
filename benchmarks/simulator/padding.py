"""Systems on devices that pad steps of prompts to few sizes, under a virtual clock."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import typer

from benchmarks.machine import Out, describe, publish
from benchmarks.simulator.calibration import STEP_TERMS, Calibration, MeasuredCostModel, choose_program, measured_profile
from benchmarks.simulator.cost_model import Profile
from benchmarks.simulator.simulate import simulate, step_tokens
from benchmarks.workload import WorkloadSpec, generate
from chameleon_jax.models.config import PRESETS
from chameleon_jax.models.runtime.buckets import StepBuckets
from chameleon_jax.scheduler import StepPlan
from chameleon_jax.scheduler.step_shapes import StepShapes

REQUESTS, TTFT_SLO = 300, 2.5


@dataclasses.dataclass(frozen=True)
class Device:
    """Costs of a device's steps in seconds, and the settings to serve with.

    A cost belongs to one of `calibration.STEP_TERMS`; terms without a field cost nothing.

    Attributes:
        step: Cost of any step.
        prompts: Further cost of a step with prompts.
        token: Cost of a prompt token.
        block_token: Cost of a LoRA block for a prompt token.
        decode: Further cost of a step that decodes.
        block: Cost of a LoRA block for a window of decode rows.
        load_page: Cost of a load, for each page.
        slots: Requests in a step, at most.
        step_tokens: Prompt tokens of a step, as in `simulate`.
        tbt_slo: Target for the time between tokens, seconds.
        length_factor: Scale of Azure's lengths.
        rates: Loads, requests a second.
    """

    step: float
    prompts: float
    token: float
    block_token: float
    decode: float
    block: float
    load_page: float
    tile: int
    pages: int
    slots: int
    step_tokens: int
    tbt_slo: float
    length_factor: float
    rates: tuple[float, ...]

    @property
    def calibration(self) -> Calibration:
        costs = {
            "step": self.step,
            "prompts": self.prompts,
            "prompt token": self.token,
            "prompt LoRA block token": self.block_token,
            "decode": self.decode,
            "decode LoRA block": self.block,
        }
        return Calibration(tuple(costs.get(term, 0.0) for term in STEP_TERMS), (0.0, self.load_page), 2.9e-3, 0.0, 0, 0)

    @property
    def buckets(self) -> StepBuckets:
        most = step_tokens("chameleon-plus", self.step_tokens)
        return StepBuckets(self.slots, most, 32, max_rank=128, max_adapter_pages=128, prefill_tile=self.tile)


DEVICES = {
    "two cores": Device(
        step=0.0144,
        prompts=0.0,
        token=1.52e-3,
        block_token=1.02e-4,
        decode=0.0104,
        block=3.27e-3,
        load_page=6.6e-4,
        tile=32,
        pages=300,
        slots=8,
        step_tokens=128,
        tbt_slo=0.3,
        length_factor=0.03,
        rates=(3.0, 4.5, 5.5),
    ),
    "dear steps": Device(
        step=0.03,
        prompts=0.02,
        token=1e-4,
        block_token=0.0,
        decode=0.0,
        block=0.0,
        load_page=1e-4,
        tile=64,
        pages=20_000,
        slots=32,
        step_tokens=512,
        tbt_slo=0.1,
        length_factor=0.2,
        rates=(6.0, 8.0, 10.0),
    ),
}
"""Two cores: rounded costs that `python -m benchmarks serve --predict` fitted to SmolLM2-135M in float32. There, a
step had a pass for prompts and one for decodes; the smaller fixed cost is here for any step. Dear steps: the fixed cost of
prompts equals 200 tokens, and half of the target is used up without any."""


class UnknownSizes(StepShapes):
    """Shapes of which the scheduler knows no size, only what the largest has room for."""

    def padded(self, tokens: int, tiles: int = 0) -> int:
        return tokens

    def size(self, tokens: int, tiles: int, rows: int, pass_tokens: float) -> int:
        return rows + tokens


class CountingCostModel(MeasuredCostModel):
    """Cost model that counts prompt tokens.

    Attributes:
        asked: Tokens of the plans.
        computed: Tokens with the padding of steps.
    """

    asked = computed = 0

    def step(self, plan: StepPlan) -> float:
        if plan.prefills:
            self.asked += sum(chunk.num_tokens for chunk in plan.prefills)
            self.computed += choose_program(plan, self.buckets).tokens - len(plan.decodes)
        return super().step(plan)


@dataclasses.dataclass(frozen=True)
class Served:
    """Means over seeds.

    Attributes:
        p50: Median TTFT, seconds.
        p99: 99th percentile of the TTFT, seconds.
        gap: 99th percentile of the time between tokens, seconds.
        padding: Additional tokens of steps with prompts, over the tokens that were asked for.
    """

    p50: float
    p99: float
    gap: float
    padding: float


def serve(device: Device, system: str, rps: float, seeds: Sequence[int], sizes_known: bool = True) -> Served:
    """Serve REQUESTS requests with each seed; `sizes_known` says whether the scheduler knows the device's sizes."""
    buckets, calibration = device.buckets, device.calibration
    profile = measured_profile("", PRESETS["smollm2-135m"], calibration, itemsize=4, page_tokens=16, num_pages=device.pages)
    models: list[CountingCostModel] = []

    def cost_model(profile: Profile, ranks: dict[str, int]) -> CountingCostModel:
        models.append(CountingCostModel(profile, ranks, calibration, buckets))
        return models[-1]

    figures = []
    for seed in seeds:
        result = simulate(
            generate(WorkloadSpec(rps, REQUESTS / rps, seed, device.length_factor, num_adapters=30, locality=0.84)),
            profile,
            system,
            length_factor=device.length_factor,
            max_num_seqs=device.slots,
            max_num_batched_tokens=device.step_tokens,
            ttft_slo=TTFT_SLO,
            tbt_slo=device.tbt_slo,
            cost_model=cost_model,
            shapes=buckets.step_shapes if sizes_known else UnknownSizes(buckets.prompts, buckets.prefill_tile),
        )
        times, model = [*np.percentile(result.ttft, [50, 99]), np.percentile(result.tbt, 99)], models[-1]
        figures.append([*times, model.computed / model.asked - 1])
    return Served(*np.mean(figures, axis=0).tolist())


def main(
    seeds: Annotated[int, typer.Option(help="Workloads to simulate for each row of the table.")] = 16, out: Out = None
) -> None:
    """Compare schedulers that know a device's step sizes with schedulers that do not, simulated."""
    rows = []
    for name, device in DEVICES.items():
        for rps, system, known in itertools.product(device.rates, ("chameleon-plus", "fifo"), (False, True)):
            served = serve(device, system, rps, range(seeds), known)
            rows.append(
                {
                    "device": name,
                    "requests a second": rps,
                    "system": system,
                    "sizes": "known" if known else "unknown",
                    "padding": f"{served.padding:.0%}",
                    "TTFT p50, ms": f"{served.p50 * 1e3:.0f}",
                    "TTFT p99, ms": f"{served.p99 * 1e3:.0f}",
                    "gap p99, ms": f"{served.gap * 1e3:.0f}",
                }
            )
    about = {"simulated": ", ".join(DEVICES), "requests": f"{REQUESTS} x {seeds} seeds"}
    publish(describe() | about | {"table": rows}, out)
