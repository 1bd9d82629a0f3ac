"""Several systems against the same workloads on one engine, forth and back, beside simulations of the same runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.outcome import Outcome
from benchmarks.serving import calibrate
from benchmarks.serving.calibrate import Calibration, TimedEngine, Timings
from benchmarks.serving.engine import BenchmarkEngine
from benchmarks.serving.measure import serve, summarise
from benchmarks.simulator.simulate import step_tokens
from benchmarks.workload import Workload
from chameleon_jax.config import EngineConfig

LENGTH_STEP = 64
"""Divisor of the engine's longest request, which is rounded up, tokens."""
MEMORY_POINTS = 240
"""Samples of memory that a result keeps of a run, at most."""
RATIOS = ("ttft_p50_ms", "ttft_p99_ms", "tbt_p99_ms", "e2e_p50_ms", "tokens_per_s")
PREDICTED = ("ttft_p50_ms", "ttft_p90_ms", "ttft_p99_ms", "e2e_p50_ms", "e2e_p99_ms", "tokens_per_s", "hit_rate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings that every run has in common; for `batched_tokens` see `simulate.step_tokens`."""

    predictor: str
    length_factor: float
    ttft_slo: float
    tbt_slo: float
    batched_tokens: int
    max_num_seqs: int


@dataclasses.dataclass
class Comparison:
    """Runs by system, one a pass.

    Attributes:
        predicted: Simulations by the calibrated cost model.
        adjusted: Simulations by the calibrated cost model, slowed to the machine's speed during the run.
        slowness: Seconds of the run's steps over their seconds by the calibration.
        calibration: The calibration. None if nothing was simulated.
    """

    measured: dict[str, list[Outcome]]
    predicted: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    adjusted: dict[str, list[Outcome]] = dataclasses.field(default_factory=dict)
    slowness: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    calibration: Calibration | None = None


def build_engine(
    model: str, workloads: list[Workload], systems: list[str], settings: Settings, config: dict[str, Any]
) -> TimedEngine:
    """Build an engine for the longest request of all workloads, with the workloads' adapters in host memory.

    The length is rounded up, so that later engines find the programs in the compilation cache.
    """
    longest = max(int(w.input_tokens.max() + max(v.output_tokens.max() for v in workloads)) for w in workloads)
    ranks = workloads[0].ranks.tolist()
    settled: dict[str, Any] = {"max_model_len": -(-longest // LENGTH_STEP) * LENGTH_STEP, "compile_programs": "ahead"}
    engine = TimedEngine(
        model,
        EngineConfig(
            max_lora_rank=max(ranks),
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=max(step_tokens(system, settings.batched_tokens) for system in systems),
            **settled | config,
        ),
        progress=lambda done, total: print(f"\rprograms {done}/{total}", end="" if done < total else "\n", flush=True),
    )
    engine.add_random_loras(ranks)
    return engine


def run(engine: TimedEngine, workload: Workload, system: str, settings: Settings) -> tuple[Outcome, Timings]:
    timings = engine.measure()
    measured = serve(
        engine,
        workload,
        system,
        predictor=settings.predictor,
        length_factor=settings.length_factor,
        max_num_batched_tokens=step_tokens(system, settings.batched_tokens),
        ttft_slo=settings.ttft_slo,
        tbt_slo=settings.tbt_slo,
        predicted_output_len=max(1, round(211 * settings.length_factor)),
    )
    return measured, timings


def compare(
    engine: TimedEngine,
    systems: list[str],
    workloads: list[Workload],
    calibration_workload: Workload | None,
    settings: Settings,
) -> Comparison:
    """Serve each workload in a pass over the systems, every second pass backwards.

    Each pass first times steps to calibrate with, since a shared machine is not equally fast all the time.
    """
    result = Comparison({system: [] for system in systems})
    timings: dict[str, list[Timings]] = {system: [] for system in systems}
    others = Timings()
    for i, workload in enumerate(workloads):
        for system in systems if calibration_workload is not None else ():
            assert calibration_workload is not None
            others.add(run(engine, calibration_workload, system, settings)[1])
        for system in systems if i % 2 == 0 else reversed(systems):
            outcome, timed = run(engine, workload, system, settings)
            result.measured[system].append(outcome)
            timings[system].append(timed)
            p50, p99 = np.percentile(outcome.ttft, [50, 99])
            print(
                f"pass {i + 1}, {system}: TTFT p50 {p50:.3f} s, p99 {p99:.3f} s; ended after {outcome.finished_s:.1f} s",
                flush=True,
            )
    if calibration_workload is not None:
        result.calibration = calibration = calibrate.fit(others)
        for system in systems:
            slowness = result.slowness[system] = [calibrate.slowness(calibration, timed) for timed in timings[system]]
            for predicted, factors in ((result.predicted, [1.0] * len(workloads)), (result.adjusted, slowness)):
                predicted[system] = [
                    predict(engine, workload, system, settings, calibration.slowed(factor))
                    for workload, factor in zip(workloads, factors)
                ]
    return result


def predict(engine: BenchmarkEngine, workload: Workload, system: str, settings: Settings, calibration: Calibration) -> Outcome:
    return calibrate.predict(
        engine,
        calibration,
        workload,
        system,
        predictor=settings.predictor,
        length_factor=settings.length_factor,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.batched_tokens,
        ttft_slo=settings.ttft_slo,
        tbt_slo=settings.tbt_slo,
    )


def tables(comparison: Comparison, ttft_slo: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Make rows to print, and every figure of every pass by system."""
    rows: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    for system, runs in comparison.measured.items():
        summaries = [summarise(outcome, ttft_slo) for outcome in runs]
        details[system] = {"passes": summaries}
        rows.append({"system": system} | {name: spread([s[name] for s in summaries]) for name in summaries[0]})
    for title, predictions in (("predicted", comparison.predicted), ("at the run's speed", comparison.adjusted)):
        for system, runs in predictions.items():
            summaries = [summarise(outcome, ttft_slo) for outcome in runs]
            details[system] |= {title: summaries, "slowness": comparison.slowness[system]}
            row: dict[str, Any] = {title: system}
            for name in PREDICTED:
                expected = float(np.mean([s[name] for s in summaries]))
                seen = float(np.mean([s[name] for s in details[system]["passes"]]))
                row[name] = f"{number(expected)} ({expected / seen - 1:+.0%})" if seen else number(expected)
            rows.append(row | {"slowness": spread(comparison.slowness[system])})
    return rows, details


def ratios(details: dict[str, Any]) -> list[dict[str, Any]]:
    """Ratios of each system's figures to the last system's, pass by pass: geometric mean, 95 % interval by Student's t."""
    *systems, base = details
    rows = []
    for system in systems:
        row: dict[str, Any] = {f"over {base}": system}
        for name in RATIOS:
            with np.errstate(divide="ignore", invalid="ignore"):  # a figure may be 0
                ours, theirs = (np.log([run[name] for run in details[s]["passes"]]) for s in (system, base))
                logs = ours - theirs
                half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
                low, mean, high = np.exp([logs.mean() - half, logs.mean(), logs.mean() + half])
            row[name] = f"{mean:.3f} ({low:.3f} to {high:.3f})"
        rows.append(row)
    return rows


def orders(comparison: Comparison) -> dict[str, str]:
    """Systems from the lowest TTFT p99 to the highest, by the mean of the passes, measured and predicted."""
    groups = {"measured": comparison.measured, "predicted": comparison.predicted, "at the run's speed": comparison.adjusted}
    result = {}
    for title, runs_by_system in groups.items():
        p99 = {system: np.mean([np.percentile(run.ttft, 99) for run in runs]) for system, runs in runs_by_system.items()}
        if p99:
            result[title] = ", ".join(sorted(p99, key=lambda system: p99[system]))
    return result


def spread(values: list[float]) -> str:
    """Mean of some values, and half their range if there are several."""
    return number(float(np.mean(values))) + (f" ± {number((max(values) - min(values)) / 2)}" if len(values) > 1 else "")


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def memory_over_time(outcome: Outcome) -> dict[str, list[float]]:
    """Columns of the memory, with the first sample of each of MEMORY_POINTS equal stretches of time."""
    stretch = (outcome.memory[:, 0] * MEMORY_POINTS / outcome.finished_s).astype(int)
    seconds, *pages = outcome.memory[np.unique(stretch, return_index=True)[1]].T
    names = ("kv_pages", "adapter_pages", "free_pages")
    return {"seconds": seconds.round(2).tolist()} | {name: p.astype(int).tolist() for name, p in zip(names, pages)}
