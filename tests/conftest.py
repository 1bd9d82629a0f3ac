"""Settings of all tests: the folder of compiled programs, and the check of shapes in signatures of `chameleon_jax.models`."""

import os
from pathlib import Path

from tests import shape_checks

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

shape_checks.switch_on()
