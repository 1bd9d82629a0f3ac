"""Device ops. Each has a plain reference, and backends that one test suite holds to it."""

from __future__ import annotations

import jax

BACKENDS = ("reference", "blocked", "triton")
"""`reference`: the oracle. `blocked`: plain XLA, for CPUs. `triton`: kernels for NVIDIA GPUs."""


def default_backend() -> str:
    """What the platform runs fastest."""
    return "triton" if jax.default_backend() == "gpu" else "blocked"
