"""A cost model that was fitted to timed steps of an engine, and the terms in which it counts."""

from __future__ import annotations

import dataclasses

from benchmarks.simulator.cost_model import CostModel, Profile
from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.ops.batched_lora.plan import BLOCK_ROWS, window_tiles
from chameleon_jax.models.runtime.buckets import DECODE_TILE, StepBuckets
from chameleon_jax.request import Request
from chameleon_jax.scheduler import StepPlan

STEP_TERMS = (
    "prefill",
    "prefill token",
    "prefill LoRA block token",
    "prefill key",
    "decode",
    "decode row",
    "decode LoRA block",
    "decode key",
    "load page",
)
"""Terms in which a step's seconds are linear.

Tokens and rows are counted in the compiled shape. A LoRA block is BLOCK_ROWS rank rows of a window of tokens; keys are summed
over tokens; pages are those sent for adapters that were loaded since the step before."""


def step_terms(plan: StepPlan, ranks: dict[str, int], buckets: StepBuckets) -> list[float]:
    """Terms of a plan as it is dispatched, loads excepted: `[STEP_TERMS]`."""
    terms = [0.0] * len(STEP_TERMS)
    if plan.prefills:
        owners: list[Request] = []
        for chunk in plan.prefills:
            owners += [chunk.request] * -(-chunk.num_tokens // buckets.prefill_tile)
            terms[3] += chunk.num_tokens * (chunk.start + chunk.num_tokens / 2)
        tiles = buckets.bucket(len(owners), buckets.prefill_tile)
        window = window_tiles(tiles, buckets.prefill_tile, buckets.decode_window)
        terms[0], terms[1] = 1.0, tiles * buckets.prefill_tile
        terms[2] = lora_blocks(owners, ranks, window) * window * buckets.prefill_tile
    if plan.decodes:
        rows = buckets.bucket(len(plan.decodes), DECODE_TILE)
        terms[4], terms[5] = 1.0, rows
        terms[6] = lora_blocks(plan.decodes, ranks, window_tiles(rows, DECODE_TILE, buckets.decode_window))
        terms[7] = sum([request.num_computed for request in plan.decodes])
    return terms


def lora_blocks(owners: list[Request], ranks: dict[str, int], window: int) -> int:
    """LoRA blocks of a target in a step whose tiles belong to `owners`; see `plan_batch`."""
    blocks = 0
    for first in range(0, len(owners), window):
        present = {request.adapter for request in owners[first : first + window]}
        blocks += -(-sum(ranks[adapter] for adapter in present if adapter is not None) // BLOCK_ROWS)
    return blocks


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Fitted costs in seconds.

    Attributes:
        step: Cost of each of STEP_TERMS.
        load: Cost of a load, and of each page that it sends, from its start until its adapter may be used.
        host: Cost of a dispatch.
        error: Standard deviation of the residual over the mean step, for the steps that were fitted.
    """

    step: tuple[float, ...]
    load: tuple[float, float]
    host: float
    error: float
    num_steps: int
    num_loads: int

    def slowed(self, factor: float) -> Calibration:
        """Calibration of a machine on which everything takes `factor` times as long."""
        step = tuple(seconds * factor for seconds in self.step)
        load = (self.load[0] * factor, self.load[1] * factor)
        return dataclasses.replace(self, step=step, load=load, host=self.host * factor)


class MeasuredCostModel(CostModel):
    """Cost model by a calibration."""

    def __init__(self, profile: Profile, ranks: dict[str, int], calibration: Calibration, buckets: StepBuckets):
        self.profile = profile
        self._ranks = ranks
        self._calibration = calibration
        self.buckets = buckets
        self._loaded_pages = 0

    def step(self, plan: StepPlan) -> float:
        terms = step_terms(plan, self._ranks, self.buckets)
        terms[-1], self._loaded_pages = self._loaded_pages, 0
        return sum(seconds * term for seconds, term in zip(self._calibration.step, terms))

    def load(self, num_bytes: int, copies: int = 1) -> float:
        pages = copies * num_bytes // self.profile.page_bytes
        self._loaded_pages += pages
        return self._calibration.load[0] + self._calibration.load[1] * pages


def measured_profile(
    name: str, model: LlamaConfig, calibration: Calibration, *, itemsize: int, page_tokens: int, num_pages: int
) -> Profile:
    """Profile of a machine that is known by a calibration alone."""
    return Profile(
        name=f"{name}, measured",
        model=model,
        memory=0.0,
        bandwidth=1.0,
        flops=1.0,
        prefill_overhead=0.0,
        lora_overhead=0.0,
        lora_token_rank=0.0,
        lora_row=0.0,
        decode_overhead=0.0,
        host=calibration.host,
        link_bandwidth=1.0,
        link_latency=0.0,
        itemsize=itemsize,
        page_tokens=page_tokens,
        num_pages_override=num_pages,
    )
