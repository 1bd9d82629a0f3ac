"""Settings without a GPU: JAX looks for none, and XLA chooses products untimed and caches no programs, as they cannot run.

Programs are optimized as in use, unlike in other tests.
"""

from __future__ import annotations

import os

import jax

jax.config.update("jax_platforms", "cpu")
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_disable_most_optimizations", False)
