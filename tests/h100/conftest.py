"""Before jax is imported: no GPU is looked for, and none is needed to choose between matrix products."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
