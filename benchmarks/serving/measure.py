"""One open-loop run of a workload on the engine: requests arrive by the clock, whether or not earlier ones are done."""

from __future__ import annotations

import dataclasses
import gc
import time
from typing import Any, Protocol

import numpy as np

from benchmarks.serving.engine import BenchmarkEngine, EndingExecutor
from benchmarks.simulate import make_predictor
from benchmarks.workload import Workload
from chameleon_jax.request import Request
from chameleon_jax.systems import System

SAMPLE_S = 0.05
"""Seconds between samples of memory, at least; a step may take longer."""
PERCENTILES = (50, 90, 99)


class Outcome(Protocol):
    """What a run gave, measured here or simulated (`simulate.Result`); see `Measurement`."""

    ttft: np.ndarray
    tbt: np.ndarray
    e2e: np.ndarray
    output: np.ndarray
    memory: np.ndarray
    hit_rate: float
    bytes_loaded: int
    load_wait: float
    squashes: int
    steps: int
    finished_s: float


@dataclasses.dataclass
class Measurement:
    """Seconds, by the clock that started with the run.

    Attributes:
        ttft, e2e, output: `[requests]` time to first token, time to last token, output tokens, in order of arrival.
        tbt: `[gaps]` between tokens of a request.
        memory: `[samples, 4]`: time, pages of KV, of adapters, free.
        load_wait: for which steps were held back by loads.
        finished_s: when the last request ended.
    """

    ttft: np.ndarray
    tbt: np.ndarray
    e2e: np.ndarray
    output: np.ndarray
    memory: np.ndarray
    hit_rate: float
    bytes_loaded: int
    load_wait: float
    squashes: int
    steps: int
    finished_s: float


def serve(
    engine: BenchmarkEngine,
    workload: Workload,
    system: str | System,
    *,
    predictor: str,
    length_factor: float,
    executor: type[EndingExecutor] = EndingExecutor,
    **settings: Any,
) -> Measurement:
    """Serves a workload to its end, in one thread. Prompts are random tokens; `settings` as in `BenchmarkEngine.restart`."""
    outputs = workload.output_tokens.tolist()
    lengths = {f"r{i}": n for i, n in enumerate(outputs)}
    vocab = engine.model_config.vocab_size
    prompts = [np.random.default_rng(i).integers(3, vocab, n).tolist() for i, n in enumerate(workload.input_tokens.tolist())]
    predict = make_predictor(predictor, lengths, length_factor, 0)
    arrivals, adapters = workload.arrival_s.tolist(), workload.adapter.tolist()
    gc.collect()
    begin = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - begin

    engine.restart(system, clock, lengths=lengths, predictor=predict, executor=executor, **settings)
    loop = engine.loop
    begin = time.perf_counter()
    requests: list[Request] = []
    gaps: list[float] = []
    latest: dict[str, float] = {}
    memory: list[tuple[float, int, int, int]] = []
    next_sample = 0.0
    while len(requests) < len(arrivals) or loop.has_unfinished:
        now = clock()
        while len(requests) < len(arrivals) and arrivals[i := len(requests)] <= now:
            requests.append(engine.submit_drawn(f"r{i}", prompts[i], max(outputs), adapters[i], arrivals[i]))
        if loop.has_unfinished:
            for request in loop.step():
                name, at = request.request_id, clock()
                if name in latest:
                    gaps.append(at - latest[name])
                latest[name] = at
        else:
            time.sleep(max(0.0, min(arrivals[len(requests)] - clock(), SAMPLE_S)))
        if (now := clock()) >= next_sample:
            usage = loop.pool.usage()
            memory.append((now, usage.kv, usage.adapters, usage.free))
            next_sample = now + SAMPLE_S
    finished = clock()
    counters = loop.cache.counters
    return Measurement(
        ttft=np.array([r.metrics.first_token_time for r in requests], np.float64) - workload.arrival_s,
        tbt=np.array(gaps),
        e2e=np.array([r.metrics.finished_time for r in requests], np.float64) - workload.arrival_s,
        output=np.array([len(r.output_token_ids) for r in requests]),
        memory=np.array(memory),
        hit_rate=counters.hits / max(counters.hits + counters.misses, 1),
        bytes_loaded=counters.bytes_loaded,
        load_wait=loop.counters.load_wait,
        squashes=loop.scheduler.num_squashes,
        steps=loop.counters.steps,
        finished_s=finished,
    )


def summarise(outcome: Outcome, ttft_slo: float) -> dict[str, float]:
    """Milliseconds, rates a second, mebibytes; `met` requests had their first token within `ttft_slo` seconds."""
    summary: dict[str, float] = {}
    for name in ("ttft", "tbt", "e2e"):
        values = getattr(outcome, name)
        for q in PERCENTILES:
            summary[f"{name}_p{q}_ms"] = float(np.percentile(values, q)) * 1e3 if len(values) else float("nan")
    return summary | {
        "met_per_s": float(np.sum(outcome.ttft <= ttft_slo)) / outcome.finished_s,
        "tokens_per_s": float(outcome.output.sum()) / outcome.finished_s,
        "hit_rate": outcome.hit_rate,
        "loaded_mib": outcome.bytes_loaded / 2**20,
        "load_wait_s": outcome.load_wait,
        "squashes": outcome.squashes,
        "steps": outcome.steps,
        "finished_s": outcome.finished_s,
    }
