"""No GPU is looked for, and none is needed to choose matrix products; what is compiled cannot be loaded, so no cache."""

from __future__ import annotations

import os

import jax

jax.config.update("jax_platforms", "cpu")
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
jax.config.update("jax_enable_compilation_cache", False)
