"""No GPU is looked for, and none is needed to choose between matrix products. What is compiled cannot be loaded, so not cached."""

from __future__ import annotations

import os

import jax

jax.config.update("jax_platforms", "cpu")
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
jax.config.update("jax_enable_compilation_cache", False)
