"""Settings and fixtures of all tests: the folder of compiled programs, hypothesis' profiles, shapes, and engines to borrow."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from chameleon_jax import LLM
    from tests.engines import Engines

from tests import shape_checks
from tests.properties import load_profiles

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
"""Of machine code, as compiling it takes longer than the tests' steps. 0 compiles as in use; `make parity` does."""
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and importlib.metadata.version("jaxlib") < "0.11":
    # XLA's older code generator, in one piece: an engine's programs take 9 processor seconds to compile, not 20. Later jaxlibs
    # have only the newer one, and end at a flag that they do not know.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

load_profiles()
shape_checks.switch_on()


def pytest_collection_finish() -> None:
    """Spare the garbage collector the modules and the collected tests, which live to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Engines to borrow, kept until the end."""
    from tests.engines import Engines  # here, as many tests need no JAX

    engines = Engines()
    yield engines
    engines.close()


@pytest.fixture
def make_llm(engines: Engines) -> Callable[..., contextlib.AbstractContextManager[LLM]]:
    """Makes an LLM over a borrowed engine: `with make_llm(model, num_pages=64) as llm`."""
    from chameleon_jax import LLM

    @contextlib.contextmanager
    def make(model: str | Path, **settings: Any) -> Iterator[LLM]:
        with engines.borrow(model, **settings) as engine, LLM(engine) as llm:
            yield llm

    return make


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model with a tokenizer."""
    from tests import reference_models

    return reference_models.save_model(tmp_path_factory.mktemp("text-model") / "gqa", "gqa", text=True)
