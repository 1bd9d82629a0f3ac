"""Device ops. Each has a plain reference, and backends that one test suite holds to it."""

from __future__ import annotations

from typing import Any

import jax

BACKENDS = ("reference", "blocked", "triton")
"""`reference`: the oracle. `blocked`: plain XLA, for CPUs. `triton`: kernels for NVIDIA GPUs."""

INSIDE: Any = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
"""Keywords of `array.at[...].get` for indices that need no check."""
FORWARD: Any = {"allow_negative_indices": False}
"""Keywords of `lax.dynamic_slice` for indices that do not count from the end, which would take several operations more."""


def default_backend() -> str:
    """Name the platform's fastest backend."""
    return "triton" if jax.default_backend() == "gpu" else "blocked"
