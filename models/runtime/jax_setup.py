"""Settings of JAX that must be made before it first uses the device."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

WRITE_S = 1.0
"""Seconds within which a compiled program is written to the compilation cache."""


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user chose a place or switched the cache off."""
    settings: Any = jax.config  # its fields are made at run time
    if settings.jax_compilation_cache_dir is None and settings.jax_enable_compilation_cache:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(home / "chameleon_jax" / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def close_compilation_cache() -> None:
    """Keep no further program, and wait for those that are being written: a process that ends meanwhile would tear them.

    Nothing mends a torn entry. Each start that reads it compiles the program anew.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    time.sleep(WRITE_S)


def take_device_memory(share: float) -> None:
    """Let JAX take a share of a GPU's memory when it first uses the device, unless the user set one.

    Args:
        share: Share of the memory, above 0 and at most 1.
    """
    names = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")
    if not any(name in os.environ for name in names):
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(share)
