"""Section `smoke`: a model of two layers, one prompt and one decode step, without adapters and with one, against the reference.

It takes seconds, and says at once whether a kernel does not compile or computes something else.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.device.bench_engine import random_weights
from benchmarks.device.correct_ops import worst
from benchmarks.device.correct_steps import BFLOAT16_LIMIT, Sequences
from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import Scale, on_gpu

LAYERS = 2
RANKS = (16,)


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    shallow = dataclasses.replace(scale, config=dataclasses.replace(scale.config, num_layers=LAYERS), ranks=RANKS)
    checks = {"decode": (1, False), "prompt": (0, False), "decode with LoRA": (1, True), "prompt with LoRA": (0, True)}
    return [Case(name, functools.partial(check, shallow, name, *which), 60.0) for name, which in checks.items()]


def check(scale: Scale, name: str, step: int, adapted: bool) -> list[Row]:
    """The kernels in bfloat16 against the reference in float32, with the same weights."""
    backend = "triton" if on_gpu() else "blocked"
    sequences = Sequences(scale, adapted)
    model = random_weights(scale.config, jnp.dtype("bfloat16"))
    graph, params = nnx.split(model)
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), params)
    hidden = {}
    for dtype, used, weights in (("float32", "reference", wide), ("bfloat16", backend, params)):
        program = {step > 0: sequences.compile(graph, params, dtype, used, step > 0)}
        head = nnx.merge(graph, weights).output_matrix
        hidden[used] = sequences.run(program, weights, head, dtype, None, (step,)).hidden[0]
    right = hidden["reference"]
    error = float(np.linalg.norm(hidden[backend] - right) / np.linalg.norm(right))
    facts: Row = {"check": f"{name}, {LAYERS} layers, bfloat16 {backend} against float32 reference", "error": f"{error:.1e}"}
    worst_row = f"{worst(hidden[backend], right):.1e}"
    return [{**facts, "worst row": worst_row, "limit": BFLOAT16_LIMIT, "ok": error < BFLOAT16_LIMIT}]
