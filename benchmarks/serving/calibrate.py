"""Calibration of the cost model to this machine, by steps and loads that the engine timed while it served.

The steps come from a run on other requests of the same kind. On a CPU a load is work for the cores that compute, so besides the
time until the adapter is there it has a cost that lengthens the next step.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.serving.engine import BenchmarkEngine, EndingExecutor
from benchmarks.simulator.calibration import Calibration, MeasuredCostModel, measured_profile, step_terms
from benchmarks.simulator.cost_model import CostModel, Profile
from benchmarks.simulator.simulate import Result, simulate
from benchmarks.workload import Workload
from chameleon_jax.executor import LoadResult, SampledToken
from chameleon_jax.models.adapters.transfers import PinnedBlock
from chameleon_jax.models.page_layout import AdapterPlacement
from chameleon_jax.scheduler import StepPlan
from chameleon_jax.systems import System


@dataclasses.dataclass
class Timings:
    """Times that a `TimingExecutor` took.

    Attributes:
        steps: STEP_TERMS of each step.
        seconds: Time of each step.
        dispatch: Time of each dispatch, seconds.
        loads: Pages and seconds of each load that was waited for.
    """

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
    """Executor that times steps from their dispatch, or from the end of the step before, to their tokens' arrival.

    Attributes:
        timings: Record of the times since `measure`.
    """

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._ranks: dict[str, int] = {}
        self.measure()

    def measure(self) -> Timings:
        """Begin a new record of times."""
        self.timings, self._free, self._loaded = Timings(), 0.0, 0
        return self.timings

    def add(self, content_hash: str, placement: AdapterPlacement, block: PinnedBlock) -> None:
        super().add(content_hash, placement, block)
        self._ranks[content_hash] = max(placement.ranks.values())

    def dispatch(self, plan: StepPlan) -> Any:
        terms = step_terms(plan, self._ranks, self._runner.buckets)
        terms[-1], self._loaded = self._loaded, 0
        begin = time.perf_counter()
        handle = super().dispatch(plan)
        end = time.perf_counter()
        self.timings.dispatch.append(end - begin)
        return handle, terms, end

    def draw(self, handle: Any) -> None:
        super().draw(handle[0])

    def collect(self, handle: Any) -> list[SampledToken]:
        inner, terms, dispatched = handle
        tokens = super().collect(inner)
        if tokens:  # a step without samples is not waited for: its time shows in the next one
            now = time.perf_counter()
            self.timings.steps.append(terms)
            self.timings.seconds.append(now - max(dispatched, self._free))
            self._free = now
        return tokens

    def poll_loads(self, wait: bool = False) -> list[LoadResult]:
        ended = super().poll_loads(wait)
        for result in ended:
            pages = result.num_bytes // self._runner.pieces.page_bytes
            self._loaded += pages
            if wait and len(ended) == 1 and not self._loads:
                self.timings.loads.append((pages, result.seconds))
        return ended


class TimedEngine(BenchmarkEngine):
    """Engine that times its steps and loads."""

    _executor: TimingExecutor

    def _make_executor(self) -> TimingExecutor:
        return TimingExecutor(self.runner, self.store)

    def measure(self) -> Timings:
        """Begin a new record of times."""
        return self._executor.measure()


def fit(timings: Timings) -> Calibration:
    """Fit costs by least squares, without negative ones."""
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
    """Seconds of timed steps over their seconds by the calibration."""
    return float(np.sum(timings.seconds) / np.sum(np.array(timings.steps) @ np.array(calibration.step)))


def _nnls(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    scale = np.maximum(np.abs(terms).max(axis=0), 1e-12)
    return nnls(terms / scale, seconds)[0] / scale


def predict(
    engine: BenchmarkEngine, calibration: Calibration, workload: Workload, system: str | System, **settings: Any
) -> Result:
    """Simulate a workload on the calibrated machine; `settings` are keywords of `simulate`."""
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

    shapes = engine.runner.buckets.step_shapes
    return simulate(workload, profile, system, cost_model=cost_model, shapes=shapes, **settings)
