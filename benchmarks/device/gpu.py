"""Facts of the GPU, asked of its driver because JAX would take the device."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time

import jax.numpy as jnp

from benchmarks.device import MEMORY_SHARE
from benchmarks.device.scale import Scale
from benchmarks.machine import gpu_name
from chameleon_jax.models.page_layout import PageLayout

SECONDS = 60.0
"""Patience with the driver, and with JAX."""
FREED_SECONDS = 15.0
"""Patience until the memory of a process that has ended is free again."""
SLACK_BYTES = 512 << 20
"""Free memory differs by less than this while nothing uses the device."""


def is_there() -> bool:
    return gpu_name() is not None or jax_has_it()


def jax_has_it() -> bool:
    """Return whether JAX computes on a GPU, asked in a process of its own."""
    probe = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    with contextlib.suppress(subprocess.TimeoutExpired):
        return "gpu" in subprocess.run(probe, capture_output=True, text=True, timeout=SECONDS).stdout
    return False


def free_bytes() -> int | None:
    """Free memory of the first GPU in bytes; None if the driver does not say."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits", "--id=0"]
    with contextlib.suppress(subprocess.TimeoutExpired, ValueError, IndexError):
        told = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS)
        return int(told.stdout.splitlines()[0]) << 20 if told.returncode == 0 else None
    return None


def wait_until_free(num_bytes: int | None) -> None:
    """Wait until about `num_bytes` are free, but not for long; None does not wait."""
    end = time.monotonic() + FREED_SECONDS
    while num_bytes is not None and time.monotonic() < end:
        free = free_bytes()
        if free is None or free >= num_bytes - SLACK_BYTES:
            return
        time.sleep(0.3)


def needed_bytes(scale: Scale) -> dict[str, int]:
    """Bytes of weights, scratch, and the least pool, which holds the largest decode step at the shortest context."""
    itemsize = jnp.dtype(scale.dtype).itemsize
    layout = PageLayout.for_model(scale.config)
    pages = 1 + max(scale.rows) * layout.pages_for_tokens(min(scale.contexts))
    return {
        "weights": scale.config.num_params * itemsize,
        "the pool": pages * layout.page_bytes(itemsize),
        "scratch": scale.scratch_bytes,
    }


def lack_of_memory(scale: Scale) -> str:
    """Reason why the scale does not fit the GPU, empty if it does or the driver does not say."""
    free, needed = free_bytes(), needed_bytes(scale)
    whole = sum(needed.values()) / MEMORY_SHARE
    if free is None or free >= whole:
        return ""
    parts = ", ".join(f"{size / 2**30:.1f} for {name}" for name, size in needed.items())
    return f"the GPU has {free / 2**30:.1f} GiB free and {whole / 2**30:.1f} are needed ({parts}); --small needs little"
