"""Setting that all figures share, and its answers to them: measured points and knees."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.paper.runs import Run, Runner
from benchmarks.paper.statistics import Estimate, change, estimate, find_knees, search_knee
from benchmarks.paper.summary import SLO_S, Summary
from benchmarks.paper.tables import Row, Table
from benchmarks.simulator.cost_model import LENGTH_FACTOR
from benchmarks.workload import WorkloadSpec
from chameleon_jax.systems import System

K = TypeVar("K", bound=Hashable)
A40 = "a40-llama-7b"
LOW, MEDIUM, HIGH = 6.0, 8.0, 9.0
"""The paper's loads on the A40, requests a second."""
RELATIVE = {"low": 0.7, "medium": 0.93, "high": 1.05}
"""The paper's loads as shares of the baseline's knee, for hardware to which absolute loads do not transfer."""
BASELINES = ("s-lora", "s-lora-published")
KEPT = ("ttft_p50", "ttft_p99", "tbt_p99", "hit_rate")
"""Values that the results list for every seed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Extent of a reproduction.

    Attributes:
        duration_s: Seconds for which requests arrive in a run.
        loads: Loads of the curves, requests a second.
        tolerance: Relative width to which a knee is bracketed.
        trace: File with the lengths. None takes the generator's.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    duration_s: float = 600.0
    loads: tuple[float, ...] = (4, 5, 6, 6.5, 7, 7.5, 8, 8.5, 9, 9.5, 10, 10.5, 11, 11.5, 12)
    tolerance: float = 0.02
    trace: Path | None = None


QUICK = Settings(seeds=(0, 1), duration_s=300.0, loads=(4, 5, 6, 7, 8, 8.5, 9, 10, 11, 12), tolerance=0.025)


class Point:
    """Summaries of one run under each seed."""

    def __init__(self, summaries: list[Summary]):
        self.summaries = summaries

    def values(self, name: str) -> np.ndarray:
        return np.array([summary[name] for summary in self.summaries], np.float64)

    def __getitem__(self, name: str) -> Estimate:
        return estimate(self.values(name))

    def mean(self, name: str) -> float:
        return float(self.values(name).mean())

    def line(self, name: str) -> list[float]:
        """Mean over seeds of a line over time, NaN where no seed has a value."""
        values = [[np.nan if value is None else value for value in summary[name]] for summary in self.summaries]
        bins = [[value for value in bin if not np.isnan(value)] for bin in zip(*values, strict=True)]
        return [float(np.mean(bin)) if bin else float("nan") for bin in bins]

    def change(self, base: Point, name: str = "ttft_p99") -> Estimate:
        """Change of a value against another point, percent."""
        return change(self.values(name), base.values(name))


class Study:
    """Runs that figures declare, with their results."""

    def __init__(self, settings: Settings, runner: Runner):
        self.settings = settings
        self.runner = runner
        self.points: dict[Run, Point] = {}

    def case(
        self,
        system: str | System,
        rps: float = 1.0,
        *,
        profile: str = A40,
        predictor: str = "proxy-0.8",
        timeline: bool = False,
        batch_tokens: int | None = None,
        **spec: Any,
    ) -> Run:
        """Run of the calibrated workload with the fields of `spec` changed."""
        fields = {"length_factor": LENGTH_FACTOR, "trace": self.settings.trace} | spec
        return Run(system, WorkloadSpec(rps, self.settings.duration_s, **fields), profile, predictor, timeline, batch_tokens)

    def measure(self, runs: Mapping[K, Run]) -> dict[K, Point]:
        """Measure every run under every seed."""
        seeds = self.settings.seeds
        self.runner.run(run.at(seed=seed) for run in runs.values() for seed in seeds)
        found = {key: Point([self._summary(run.at(seed=seed)) for seed in seeds]) for key, run in runs.items()}
        self.points.update((run, found[key]) for key, run in runs.items())
        return found

    def _summary(self, run: Run) -> Summary:
        summary = self.runner.cache.get(run)
        assert summary is not None, "the runner leaves none out"
        return summary

    def knees(self, runs: Mapping[K, Run], start: float = 8.0) -> dict[K, float]:
        """Highest loads whose P99 TTFT, mean over seeds, meets the paper's target, requests a second."""

        def measure(loads: dict[K, float]) -> dict[K, float]:
            points = self.measure({key: runs[key].at(rps=round(rps, 3)) for key, rps in loads.items()})
            return {key: point.mean("ttft_p99") for key, point in points.items()}

        return find_knees({key: search_knee(start, SLO_S, self.settings.tolerance) for key in runs}, measure)

    def near_knee(self) -> float:
        """Load just below the fair baseline's knee, where queues neither vanish nor grow without end, requests a second."""
        return round(0.97 * self.knees({"s-lora": self.case("s-lora")})["s-lora"], 1)

    def table(self, title: str, rows: Sequence[Row], note: str = "", profile: str = A40) -> Table:
        settings = self.settings
        seeds = ", ".join(map(str, settings.seeds))
        lengths = "the generator's" if settings.trace is None else f"those of {settings.trace.name}"
        setting = (
            f"Simulated, not measured on hardware. Profile {profile}; seeds {seeds}; arrivals for {settings.duration_s:g} s; "
            f"lengths {lengths} x {LENGTH_FACTOR}. In brackets: 95 % t-intervals over seeds."
        )
        return Table(title, rows, setting, note)

    def record(self) -> list[dict[str, Any]]:
        """Per-seed values of all points, for JSON."""
        return [
            run.describe() | {name: [float(f"{value:.4g}") for value in point.values(name)] for name in KEPT}
            for run, point in self.points.items()
        ]

    def speed(self) -> dict[str, float]:
        """Rates of the simulator in one process, by wall time."""
        summaries = [summary for point in self.points.values() for summary in point.summaries]
        total = {name: sum(s[name] for s in summaries) for name in ("wall_s", "steps", "tokens", "requests", "simulated_s")}
        wall = max(total["wall_s"], 1e-9)
        return {
            "runs": len(summaries),
            "simulated_hours": round(total["simulated_s"] / 3600, 2),
            "steps_per_s": round(total["steps"] / wall),
            "tokens_per_s": round(total["tokens"] / wall),
            "requests_per_s": round(total["requests"] / wall),
            "times_faster_than_the_clock": round(total["simulated_s"] / wall),
        }
