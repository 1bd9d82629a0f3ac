"""Section `smoke`: two layers, a prompt, a decode step and both in one, with and without adapters, against the reference.

It takes seconds, and shows at once whether a kernel does not compile or is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.device.bench_engine import random_weights
from benchmarks.device.compilation import threads
from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import Scale, on_gpu
from benchmarks.device.sections.correctness.ops import worst
from benchmarks.device.sections.correctness.steps import BFLOAT16_LIMIT, MIXED, PROMPTS, Sequences, kind_of

LAYERS = 2
RANKS = (16, 8)
STEPS = {"decode": 1, "prompt": PROMPTS, "both": MIXED}
CHECKS = {f"{name}{' with LoRA' * adapted}": (step, adapted) for adapted in (False, True) for name, step in STEPS.items()}
"""Step of each check, and whether it has adapters."""


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    config = dataclasses.replace(scale.config, num_layers=LAYERS)
    smoke = Smoke(dataclasses.replace(scale, config=config, ranks=RANKS))
    return [Case(name, functools.partial(smoke.check, name), 50.0) for name in CHECKS]


class Smoke:
    """Programs, compiled side by side when the first is asked for."""

    def __init__(self, scale: Scale):
        self._scale = scale
        self._sequences = {adapted: Sequences(scale, adapted) for adapted in (False, True)}

    @functools.cached_property
    def _runs(self) -> list[tuple[str, str]]:
        return [("float32", "reference"), ("bfloat16", "triton" if on_gpu() else "blocked")]

    @functools.cached_property
    def _model(self) -> Any:
        return random_weights(self._scale.config, jnp.dtype("bfloat16"))

    @functools.cached_property
    def _programs(self) -> dict[tuple[str, str], Future[Any]]:
        """Programs by check and backend."""
        graph, params = nnx.split(self._model)
        pool = threads()
        programs = {
            (name, backend): pool.submit(self._sequences[adapted].compile, graph, params, dtype, backend, kind_of(step))
            for name, (step, adapted) in CHECKS.items()
            for dtype, backend in self._runs
        }
        pool.shutdown(wait=False)
        return programs

    def check(self, name: str) -> list[Row]:
        """Check the kernels in bfloat16 against the reference in float32, with the same weights."""
        step, adapted = CHECKS[name]
        graph, params = nnx.split(self._model)
        hidden = []
        for dtype, backend in self._runs:
            program = {kind_of(step): self._programs[name, backend].result()}
            weights = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), params)
            head = nnx.merge(graph, weights).output_matrix
            hidden.append(self._sequences[adapted].run(program, weights, head, dtype, None, (step,)).hidden[0])
        right, out = hidden
        error = float(np.linalg.norm(out - right) / np.linalg.norm(right))
        return [
            {
                "check": f"{name}, {LAYERS} layers, bfloat16 {self._runs[1][1]} against float32 reference",
                "error": f"{error:.1e}",
                "worst row": f"{worst(out, right):.1e}",
                "limit": BFLOAT16_LIMIT,
                "ok": error < BFLOAT16_LIMIT,  # NaN is not less than anything
            }
        ]
