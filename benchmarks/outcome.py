"""Figures of one run over a workload, on the engine or in the simulator, and their recorder."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.workload import Workload
from chameleon_jax.loop import ServingLoop
from chameleon_jax.request import Request


@dataclasses.dataclass
class Outcome:
    """Figures of a run over a workload.

    Times are seconds of the clock that started with the run. Arrays have one element a request, in order of arrival, unless a
    shape is given.

    Attributes:
        ttft: Time to first token.
        queue: Time from arrival to admission.
        e2e: Time to the last token.
        adapter_wait: The part of the TTFT that the load of the request's adapter cost after the request's turn had come.
        tbt: `[gaps]` between the tokens of a request.
        memory: `[samples, 4]`: time, pages of KV, pages of adapters, free pages.
        hit_rate: Share of requests whose adapter was there when their turn came, be it kept or loaded ahead of need.
        load_wait: Time for which steps were held back by loads.
        preemptions: Running requests sent back to wait, for memory or as bypassers.
        finished_s: End of the last request.
    """

    ttft: np.ndarray
    queue: np.ndarray
    e2e: np.ndarray
    output: np.ndarray
    adapter_wait: np.ndarray
    tbt: np.ndarray
    memory: np.ndarray
    hit_rate: float
    loads: int
    bytes_loaded: int
    load_wait: float
    preemptions: int
    steps: int
    finished_s: float


class Recorder:
    """Recorder of a loop while it serves.

    Args:
        sample_s: Seconds between samples of memory, at least; a step may take longer.
    """

    def __init__(self, loop: ServingLoop, sample_s: float):
        self._loop = loop
        self._sample_s = sample_s
        self._gaps: list[float] = []
        self._latest: dict[str, float] = {}
        self._samples: list[tuple[float, int, int, int]] = []
        self._next = 0.0

    def stepped(self, updated: list[Request], now: float) -> None:
        """Record the end of a step that returned the requests `updated`."""
        latest, gaps = self._latest, self._gaps
        for request in updated:
            name = request.request_id
            if name in latest:
                gaps.append(now - latest[name])
            latest[name] = now

    def sample(self, now: float) -> None:
        """Record the memory, unless the sample before is too recent."""
        if now >= self._next:
            usage = self._loop.pool.usage()
            self._samples.append((now, usage.kv, usage.adapters, usage.free))
            self._next = now + self._sample_s

    def measured(self, requests: list[Request], workload: Workload, finished_s: float) -> dict[str, Any]:
        """Fields of `Outcome`; `requests` are in order of arrival."""
        loop, counters = self._loop, self._loop.cache.counters
        metrics = [request.metrics for request in requests]
        return {
            "ttft": np.array([m.first_token_time for m in metrics], np.float64) - workload.arrival_s,
            "queue": np.array([m.first_scheduled_time for m in metrics], np.float64) - workload.arrival_s,
            "e2e": np.array([m.finished_time for m in metrics], np.float64) - workload.arrival_s,
            "output": np.array([len(r.output_token_ids) for r in requests]),
            "adapter_wait": np.array([m.adapter_wait for m in metrics]),
            "tbt": np.array(self._gaps),
            "memory": np.array(self._samples),
            "hit_rate": counters.hits / max(counters.hits + counters.misses, 1),
            "loads": counters.loads,
            "bytes_loaded": counters.bytes_loaded,
            "load_wait": loop.counters.load_wait_s,
            "preemptions": loop.scheduler.counters.preemptions,
            "steps": loop.counters.steps,
            "finished_s": finished_s,
        }
