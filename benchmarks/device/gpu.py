"""The GPU as its driver tells of it: JAX is not asked, as it would take the device."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys

import jax.numpy as jnp

from benchmarks.device.scale import Scale
from benchmarks.machine import gpu_name
from chameleon_jax.models.page_layout import PageLayout

SECONDS = 60.0
"""Patience with the driver, and with JAX."""
SHARE = 0.92
"""Of the device's memory that JAX takes."""


def is_there() -> bool:
    if gpu_name() is not None:
        return True
    probe = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return "gpu" in subprocess.run(probe, capture_output=True, text=True, timeout=SECONDS).stdout
    return False


def free_bytes() -> int | None:
    """Free memory of the first GPU; None: the driver does not say."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    with contextlib.suppress(subprocess.TimeoutExpired, ValueError, IndexError):
        told = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS)
        return int(told.stdout.splitlines()[0]) << 20 if told.returncode == 0 else None
    return None


def needed_bytes(scale: Scale) -> dict[str, int]:
    """Weights, scratch, and the least pool: one that holds the largest decode step at the shortest context."""
    itemsize = jnp.dtype(scale.dtype).itemsize
    layout = PageLayout.for_model(scale.config)
    pages = 1 + max(scale.rows) * layout.pages_for_tokens(min(scale.contexts))
    return {
        "weights": scale.config.num_params * itemsize,
        "the pool": pages * layout.page_bytes(itemsize),
        "scratch": scale.scratch_bytes,
    }


def lack_of_memory(scale: Scale) -> str:
    """Why the scale does not fit the GPU; empty: it does, or the driver does not say."""
    free, needed = free_bytes(), needed_bytes(scale)
    whole = sum(needed.values()) / SHARE
    if free is None or free >= whole:
        return ""
    parts = ", ".join(f"{size / 2**30:.1f} for {name}" for name, size in needed.items())
    return f"the GPU has {free / 2**30:.1f} GiB free and {whole / 2**30:.1f} are needed ({parts}); --small needs little"
