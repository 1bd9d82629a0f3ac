"""Observations of a running server: its holdings while nothing runs, and the times of its steps."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import numpy as np

from chameleon_jax.serving.async_llm import AsyncLLM


@dataclasses.dataclass(frozen=True)
class Holding:
    """Holdings of a process while nothing runs."""

    kv_pages: int
    adapters: int
    host_bytes: int
    threads: int
    file_descriptors: int
    rss_mib: float

    @classmethod
    async def of(cls, llm: AsyncLLM) -> Holding:
        stats = await llm.stats(max_age=0)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(
            kv_pages=stats.pool.kv,
            adapters=len(stats.adapters),
            host_bytes=stats.host_bytes,
            threads=len(os.listdir("/proc/self/task")),
            file_descriptors=len(os.listdir("/proc/self/fd")),
            rss_mib=round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        )


class StepTimes:
    """Times of steps, and between two steps, while adapters move and while none does.

    An adapter moves from the reading of its files until it is in the pool. The length of a step with prompt tokens depends on
    its chunk, so decode steps are also listed apart.
    """

    def __init__(self, llm: AsyncLLM):
        self.steps: dict[bool, list[float]] = {False: [], True: []}
        self.decodes: dict[bool, list[float]] = {False: [], True: []}
        self.pauses: dict[bool, list[float]] = {False: [], True: []}
        self._llm = llm
        self._loop = llm.engine.loop
        self._step = self._loop.step
        self._ended: float | None = None
        self._loop.step = self._timed  # type: ignore[method-assign]

    def _timed(self, wait: bool = True) -> list:
        loop = self._loop
        moves = len(self._llm.reader) > 0 or loop.cache.num_loading > 0
        begin, prompt_tokens, steps = time.monotonic(), loop.counters.prefill_tokens, loop.counters.steps
        if self._ended is not None:
            self.pauses[moves].append(begin - self._ended)
        updated = self._step(wait)
        end = time.monotonic()
        moves = moves or loop.cache.num_loading > 0
        if loop.counters.steps > steps and self._ended is not None:
            self.steps[moves].append(end - begin)
            if loop.counters.prefill_tokens == prompt_tokens:
                self.decodes[moves].append(end - begin)
        self._ended = end if loop.has_unfinished and not loop.awaits_load else None
        return updated

    def summary(self) -> dict[str, dict[str, float]]:
        """Summary of each kind of interval, milliseconds."""
        out = {}
        for interval, times in (("step", self.steps), ("decode step", self.decodes), ("between steps", self.pauses)):
            for moves, values in times.items():
                p50, p99, most = np.percentile(values, [50, 99, 100]) * 1e3 if values else (np.nan,) * 3
                key = f"{interval}, {'adapters move' if moves else 'none moves'}"
                out[key] = {"count": len(values), "p50": round(p50, 2), "p99": round(p99, 2), "max": round(most, 2)}
        return out
