"""A cost model of the engine on this machine, fitted to steps and loads that it timed itself while it served.

The steps come from a run on other requests of the same kind. On a CPU a load is work for the cores that compute, so besides the
time until the adapter is there it has a cost that lengthens the next step.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.cost_model import CostModel, Profile
from benchmarks.serving.engine import BenchmarkEngine, EndingExecutor
from benchmarks.simulate import Result, simulate
from benchmarks.workload import Workload
from chameleon_jax.executor import LoadResult, SampledToken
from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.ops.batched_lora.plan import BLOCK_ROWS, window_tiles
from chameleon_jax.models.runtime.model_runner import ModelRunner
from chameleon_jax.models.runtime.steps import DECODE_TILE, StepBuckets
from chameleon_jax.request import Request
from chameleon_jax.scheduler import StepPlan
from chameleon_jax.systems import System

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
"""What a step's seconds are linear in. Tokens and rows are those of the compiled shape; a LoRA block is BLOCK_ROWS rank rows of
a window of tokens; keys are summed over tokens; pages are those sent for adapters that were loaded since the step before."""


def step_terms(plan: StepPlan, ranks: dict[str, int], buckets: StepBuckets) -> list[float]:
    """`[STEP_TERMS]` of a plan as it is dispatched, loads excepted."""
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
    """Blocks of a target in a step whose tiles belong to `owners`; see `plan_batch`."""
    blocks = 0
    for first in range(0, len(owners), window):
        present = {request.adapter for request in owners[first : first + window]}
        blocks += -(-sum(ranks[adapter] for adapter in present if adapter is not None) // BLOCK_ROWS)
    return blocks


@dataclasses.dataclass
class Timings:
    """What a `TimingExecutor` saw: a row of STEP_TERMS and the seconds of each step, seconds of each dispatch, and of each
    load that was waited for, pages sent and seconds."""

    steps: list[list[float]] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    dispatch: list[float] = dataclasses.field(default_factory=list)
    loads: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def add(self, other: Timings) -> None:
        self.steps += other.steps
        self.seconds += other.seconds
        self.dispatch += other.dispatch
        self.loads += other.loads


class TimingExecutor(EndingExecutor):
    """Times steps from dispatch, or from the end of the one before, to their tokens' arrival.

    Attributes:
        timings: where it is written down; give the class a new one before a run.
    """

    timings = Timings()

    def __init__(self, engine: ModelRunner, *args: Any):
        super().__init__(engine, *args)
        self._ranks = {name: max(placement.ranks.values()) for name, placement in self._placements.items()}
        self._free = 0.0
        self._loaded = 0

    def dispatch(self, plan: StepPlan) -> Any:
        terms = step_terms(plan, self._ranks, self._engine.buckets)
        terms[-1], self._loaded = self._loaded, 0
        begin = time.perf_counter()
        handle = super().dispatch(plan)
        end = time.perf_counter()
        self.timings.dispatch.append(end - begin)
        return handle, terms, end

    def collect(self, handle: Any) -> list[SampledToken]:
        inner, terms, dispatched = handle
        tokens = super().collect(inner)
        if tokens:  # what samples nothing is not waited for: its time shows in the next step
            now = time.perf_counter()
            self.timings.steps.append(terms)
            self.timings.seconds.append(now - max(dispatched, self._free))
            self._free = now
        return tokens

    def poll_loads(self, wait: bool = False) -> list[LoadResult]:
        ended = super().poll_loads(wait)
        for result in ended:
            pages = result.num_bytes // self._engine.pieces.page_bytes
            self._loaded += pages
            if wait and len(ended) == 1 and not self._loads:
                self.timings.loads.append((pages, result.seconds))
        return ended


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Fitted seconds.

    Attributes:
        step: of each of STEP_TERMS.
        load: of a load, of each page sent: from its start until its adapter may be used.
        host: of a dispatch.
        error: of the steps that were fitted: standard deviation of the residual over the mean step.
    """

    step: tuple[float, ...]
    load: tuple[float, float]
    host: float
    error: float
    num_steps: int
    num_loads: int

    def slowed(self, factor: float) -> Calibration:
        """Of a machine on which everything takes `factor` times as long."""
        step = tuple(seconds * factor for seconds in self.step)
        load = (self.load[0] * factor, self.load[1] * factor)
        return dataclasses.replace(self, step=step, load=load, host=self.host * factor)


def fit(timings: Timings) -> Calibration:
    """Least squares without negative costs."""
    terms, seconds = np.array(timings.steps), np.array(timings.seconds)
    step = _nnls(terms, seconds)
    residual = seconds - terms @ step
    loads = np.array(timings.loads or [(1.0, 0.0)])
    load = _nnls(np.column_stack([np.ones(len(loads)), loads[:, 0]]), loads[:, 1])
    return Calibration(
        step=tuple(step.tolist()),
        load=(float(load[0]), float(load[1])),
        host=float(np.median(timings.dispatch)),
        error=float(residual.std() / seconds.mean()),
        num_steps=len(seconds),
        num_loads=len(timings.loads),
    )


def slowness(calibration: Calibration, timings: Timings) -> float:
    """Seconds of timed steps over what the calibration says of them."""
    return float(np.sum(timings.seconds) / np.sum(np.array(timings.steps) @ np.array(calibration.step)))


def _nnls(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    scale = np.maximum(np.abs(terms).max(axis=0), 1e-12)
    return nnls(terms / scale, seconds)[0] / scale


class MeasuredCostModel(CostModel):
    """`CostModel` by a calibration."""

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
    """The profile of a machine of which only a calibration is known."""
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


def predict(
    engine: BenchmarkEngine, calibration: Calibration, workload: Workload, system: str | System, **settings: Any
) -> Result:
    """`simulate` on what was measured here. `settings` are its keywords."""
    profile = measured_profile(
        engine.model_name,
        engine.model_config,
        calibration,
        itemsize=engine.dtype.itemsize,
        page_tokens=engine.config.page_tokens,
        num_pages=engine.num_pages,
    )

    def cost_model(profile: Profile, ranks: dict[str, int]) -> CostModel:
        return MeasuredCostModel(profile, ranks, calibration, engine.runner.buckets)

    shapes = engine.runner.buckets.prefill_shapes
    return simulate(workload, profile, system, cost_model=cost_model, shapes=shapes, **settings)
