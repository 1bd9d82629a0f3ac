"""Settings without a GPU: JAX looks for none, XLA chooses products untimed, and programs that cannot run are not cached."""

from __future__ import annotations

import os

import jax

jax.config.update("jax_platforms", "cpu")
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
jax.config.update("jax_enable_compilation_cache", False)
