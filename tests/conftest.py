"""Settings of all tests: a cache for compiled programs in the repository's ignored folder, and hypothesis' profiles."""

import os
from pathlib import Path

from tests.properties import load_profiles

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

load_profiles()
