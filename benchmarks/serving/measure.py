"""One open-loop run of a workload on the engine.

Requests arrive by the clock, whether or not earlier ones are done.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np

from benchmarks.outcome import Outcome, Recorder
from benchmarks.serving.engine import BenchmarkEngine
from benchmarks.simulator.simulate import make_predictor
from benchmarks.workload import Workload
from chameleon_jax.request import Request
from chameleon_jax.systems import System

SAMPLE_S = 0.05
"""Seconds between samples of memory, at least; a step may take longer."""
PERCENTILES = (50, 90, 99)


def serve(
    engine: BenchmarkEngine,
    workload: Workload,
    system: str | System,
    *,
    predictor: str,
    length_factor: float,
    **settings: Any,
) -> Outcome:
    """Serve a workload of random prompts to its end, in one thread; `settings` as in `LLMEngine.restart`."""
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

    engine.start_run(lengths, system=system, clock=clock, predictor=predict, **settings)
    loop = engine.loop
    begin = time.perf_counter()
    requests: list[Request] = []
    recorder = Recorder(loop, SAMPLE_S)
    while len(requests) < len(arrivals) or loop.has_unfinished:
        now = clock()
        while len(requests) < len(arrivals) and arrivals[i := len(requests)] <= now:
            requests.append(engine.submit_drawn(f"r{i}", prompts[i], max(outputs), adapters[i], arrivals[i]))
        if loop.has_unfinished:
            updated = loop.step()
            recorder.stepped(updated, clock())
        else:
            time.sleep(max(0.0, min(arrivals[len(requests)] - clock(), SAMPLE_S)))
        recorder.sample(clock())
    return Outcome(**recorder.measured(requests, workload, clock()))


def summarise(outcome: Outcome, ttft_slo: float) -> dict[str, float]:
    """Summarise a run in milliseconds, rates a second and mebibytes.

    `met_per_s` counts requests that had their first token within `ttft_slo` seconds.
    """
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
        "preemptions": outcome.preemptions,
        "steps": outcome.steps,
        "finished_s": outcome.finished_s,
    }
