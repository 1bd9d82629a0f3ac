"""Host cost of scheduler and cache for a step, and its growth with the queue."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import Annotated

import numpy as np
import typer

from benchmarks.machine import Out, describe, publish
from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterInfo
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.models.runtime.buckets import StepBuckets
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import Scheduler
from chameleon_jax.scheduler.length_predictor import HistoryPredictor
from chameleon_jax.systems import get_system

RANKS = (8, 16, 32, 64, 128)
STEP_S = 0.03
GOAL_MS = 0.5
SYSTEMS = ("fifo", "chameleon", "chameleon-plus")


def measure(system: str, running: int, queued: int, adapters: int, steps: int = 400, seed: int = 0) -> dict[str, object]:
    """Measure the processor time of `plan`, `ran` and `finish` for a step in a steady state, milliseconds.

    One request in 40 ends each step and is replaced at the end of the queue. The pool is just large enough for the running
    requests, so that adapters are evicted all the time.
    """
    rng = np.random.default_rng(seed)
    pool, now = PagePool(running * 24 + running * 10), 0.0
    config = EngineConfig(system=system, max_num_seqs=running, max_num_batched_tokens=2048)
    cache = AdapterCache(pool, get_system(system).eviction)
    shapes = StepBuckets(running, config.max_num_batched_tokens, 1, max(RANKS), 1).step_shapes
    scheduler = Scheduler(config, 16, cache, HistoryPredictor(64), shapes)
    for i in range(adapters):
        pages = RANKS[i % len(RANKS)] // 4
        cache.add(AdapterInfo(f"a{i}", RANKS[i % len(RANKS)], pages, pages << 23), now)
    numbers = itertools.count()
    popularity = 1 / np.arange(1, adapters + 1)
    popularity /= popularity.sum()

    def arrive() -> None:
        i = next(numbers)
        adapter = f"a{rng.choice(adapters, p=popularity)}"
        request = Request(f"r{i}", range(int(rng.integers(50, 400))), SamplingParams(max_tokens=400), now, 0, adapter=adapter)
        request.order = i
        scheduler.add(request, now)

    for _ in range(running + queued):
        arrive()
    plans: list[float] = []
    looked_at = 0
    for step in range(steps + 200):
        now += STEP_S
        begin = time.thread_time()
        plan = scheduler.plan(now)
        seconds = time.thread_time() - begin
        for content_hash, _ in plan.loads:
            cache.finish_load(content_hash)
        for request in [chunk.request for chunk in plan.prefills if chunk.samples] + plan.decodes:
            request.num_in_flight -= 1
            request.output_token_ids.append(0)
        ended = [r for r in scheduler.running if rng.random() < 0.025 and r.output_token_ids]
        begin = time.thread_time()
        for request in ended:
            request.finish_reason = FinishReason.STOP
            scheduler.finish(request, now)
        scheduler.observe_step(plan, 5e-3 + 2e-5 * sum(chunk.num_tokens for chunk in plan.prefills))
        seconds += time.thread_time() - begin
        for _ in ended:
            arrive()
        if step >= 200:
            plans.append(seconds * 1e3)
            looked_at += len(scheduler.running)
    cuts = statistics.quantiles(plans, n=100)
    return {
        "system": system,
        "running": round(looked_at / len(plans)),
        "queued": scheduler.num_waiting,
        "adapters": adapters,
        "mean ms": round(statistics.mean(plans), 3),
        "p50 ms": round(cuts[49], 3),
        "p99 ms": round(cuts[98], 3),
        "evictions a step": round(cache.counters.evictions / (len(plans) + 200), 2),
    }


def main(
    system: Annotated[
        list[str] | None, typer.Option(help=f"System to measure; repeat for several (default: {', '.join(SYSTEMS)}).")
    ] = None,
    out: Out = None,
) -> None:
    """Measure the processor time of scheduler and cache for one step."""
    names = system or list(SYSTEMS)
    rows = [measure(name, 256, queued, 1000) for name in names for queued in (100, 1000, 10_000)]
    goal = f"mean at most {GOAL_MS} ms at 10,000 queued"
    publish(describe() | {"goal": goal, "table": rows}, out)
