"""Engine whose device is a clock: the host's work for a step stays, and the GPU's is waited for."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from chameleon_jax.executor import LoadResult, SampledToken
from chameleon_jax.scheduler import StepPlan
from chameleon_jax.serving.engine import LLMEngine

VOCAB = 4096
"""Bound of the token ids."""


class PacedExecutor:
    """Executor that takes `step_s` seconds for a step and no processor time, one step after another as a device would.

    Tokens are random; adapters are loaded at once.
    """

    num_compiled = 0

    def __init__(self, step_s: float, vocab_size: int):
        self._step_s = step_s
        self._tokens = np.random.default_rng(0).integers(0, min(VOCAB, vocab_size), 1 << 16).tolist()
        self._drawn = 0
        self._busy_until = 0.0
        self._loaded: list[LoadResult] = []

    def dispatch(self, plan: StepPlan) -> Any:
        self._busy_until = max(time.perf_counter(), self._busy_until) + self._step_s
        rows = [chunk.request for chunk in plan.prefills if chunk.samples] + list(plan.decodes)
        return self._busy_until, rows

    def draw(self, handle: Any) -> None:
        pass

    def collect(self, handle: Any) -> list[SampledToken]:
        end, rows = handle
        time.sleep(max(0.0, end - time.perf_counter()))
        begin, self._drawn = self._drawn, (self._drawn + len(rows)) % (len(self._tokens) - 1024)
        return [SampledToken(request, token) for request, token in zip(rows, self._tokens[begin : begin + len(rows)])]

    def begin_load(self, content_hash: str, pages: list[int]) -> None:
        self._loaded.append(LoadResult(content_hash))

    def poll_loads(self, wait: bool = False) -> list[LoadResult]:
        ended, self._loaded = self._loaded, []
        return ended

    def cancel_load(self, content_hash: str) -> None:
        self._loaded = [load for load in self._loaded if load.content_hash != content_hash]

    def forget(self, content_hash: str) -> None:
        pass

    def reset(self) -> None:
        self._loaded.clear()


def pace(engine: LLMEngine, step_s: float) -> None:
    """Replace the device of an engine that has not run."""
    engine.loop.executor = PacedExecutor(step_s, engine.model_config.vocab_size)
