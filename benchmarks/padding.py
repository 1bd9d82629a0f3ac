"""Systems on a device that pads steps of prompts to few sizes: the serving loop under a virtual clock.

python -m benchmarks.padding
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.cost_model import Profile
from benchmarks.machine import describe, publish
from benchmarks.serving.calibrate import STEP_TERMS, Calibration, MeasuredCostModel, measured_profile
from benchmarks.simulate import simulate
from benchmarks.workload import WorkloadSpec, generate
from chameleon_jax.models.config import PRESETS
from chameleon_jax.models.steps import StepBuckets
from chameleon_jax.scheduler import StepPlan
from chameleon_jax.scheduler.prefill_shapes import ANY_SIZE, PrefillShapes

SLOTS, STEP_TOKENS, LENGTH_FACTOR, REQUESTS = 8, 128, 0.03, 300
SECONDS = {
    "prefill": 0.0144,
    "prefill token": 1.52e-3,
    "prefill LoRA block token": 1.02e-4,
    "decode": 0.0248,
    "decode LoRA block": 3.27e-3,
}
"""Of SmolLM2-135M in float32 on two cores, as `benchmarks.serve --predict` fitted them."""
CALIBRATION = Calibration(tuple(SECONDS.get(term, 0.0) for term in STEP_TERMS), (0.0, 6.6e-4), 2.9e-3, 0.0, 0, 0)
PROFILE = measured_profile("two cores", PRESETS["smollm2-135m"], CALIBRATION, itemsize=4, page_tokens=16, num_pages=300)
BUCKETS = StepBuckets(SLOTS, 4 * STEP_TOKENS, table_width=32, max_rank=128, max_adapter_pages=128)


class CountingCostModel(MeasuredCostModel):
    """Attributes: asked, computed: prompt tokens so far, without and with padding."""

    asked = computed = 0

    def step(self, plan: StepPlan) -> float:
        chunks = [chunk.num_tokens for chunk in plan.prefills]
        self.asked += sum(chunks)
        self.computed += BUCKETS.prefill_shapes.step_tokens(chunks)
        return super().step(plan)


@dataclasses.dataclass(frozen=True)
class Served:
    """Means over seeds.

    Attributes:
        p50, p99: TTFT, seconds.
        gap: 99th percentile of the time between tokens, seconds.
        padding: over the prompt tokens that were asked for.
    """

    p50: float
    p99: float
    gap: float
    padding: float


def serve(system: str, rps: float, seeds: Sequence[int], shapes: PrefillShapes = BUCKETS.prefill_shapes) -> Served:
    """Serves requests.

    Args:
        shapes: of the device, as the scheduler knows them; ANY_SIZE: it does not.
    """
    models: list[CountingCostModel] = []

    def cost_model(profile: Profile, ranks: dict[str, int]) -> CountingCostModel:
        models.append(CountingCostModel(profile, ranks, CALIBRATION, BUCKETS))
        return models[-1]

    figures = []
    for seed in seeds:
        result = simulate(
            generate(WorkloadSpec(rps, REQUESTS / rps, seed, LENGTH_FACTOR, num_adapters=30, locality=0.84)),
            PROFILE,
            system,
            length_factor=LENGTH_FACTOR,
            max_num_seqs=SLOTS,
            max_num_batched_tokens=STEP_TOKENS,
            ttft_slo=2.5,
            tbt_slo=0.3,
            cost_model=cost_model,
            shapes=shapes,
        )
        gap, padding = float(np.percentile(result.tbt, 99)), models[-1].computed / models[-1].asked - 1
        figures.append((result.ttft_percentile(50), result.ttft_percentile(99), gap, padding))
    return Served(*np.mean(figures, axis=0).tolist())


def main(
    seeds: int = 16,
    rps: Annotated[list[float] | None, typer.Option(help="One or more; default: 3, 4.5, 5.5.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare schedulers that know the device's sizes with the same that do not."""
    rows = []
    for rate in rps or (3.0, 4.5, 5.5):
        for system in ("chameleon-plus", "fifo"):
            for knows, shapes in ((False, ANY_SIZE), (True, BUCKETS.prefill_shapes)):
                served = serve(system, rate, range(seeds), shapes)
                rows.append(
                    {
                        "requests a second": rate,
                        "system": system,
                        "knows the sizes": "yes" if knows else "no",
                        "padding": f"{served.padding:.0%}",
                        "TTFT p50, ms": f"{served.p50 * 1e3:.0f}",
                        "TTFT p99, ms": f"{served.p99 * 1e3:.0f}",
                        "gap p99, ms": f"{served.gap * 1e3:.0f}",
                    }
                )
    about = describe(f"python -m benchmarks.padding {shlex.join(sys.argv[1:])}".strip())
    publish(
        {
            **about,
            "simulated": "steps cost what they do on two cores",
            "requests": f"{REQUESTS} x {seeds} seeds",
            "table": rows,
        },
        out,
    )


if __name__ == "__main__":
    typer.run(main)
