"""A whole server on the small model, and a check that fuzzing left it intact. `make fuzz` runs many more inputs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.service.server_config import ServerConfig
from tests import reference_models as reference
from tests.engines import Engines
from tests.serving.running import Running
from tests.serving.running import running as running_server

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "200"))
"""Inputs for each of the two protocols."""

TIMEOUT = 120


@pytest.fixture(scope="session")
def running(engines: Engines, text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("fuzz")
    for i, rank in enumerate((2, 8, 16, 40)):
        reference.save_adapter(folder / "adapters" / f"a{i}", reference.CONFIGS["gqa"], rank, seed=i)
    config = ServerConfig(port=0, grpc_port=0, adapter_dirs=(str(folder / "adapters"),))
    with (
        engines.borrow(text_model) as engine,
        contextlib.closing(AsyncLLM(engine)) as llm,
        running_server(llm, config) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def undisturbed(running: Running) -> Iterator[None]:
    """Check that answers after all inputs equal those before, and that no request is left."""

    def ask(model: str) -> str:
        body = {"model": model, "prompt": "love is", "max_tokens": 24, "temperature": 0}
        response = httpx.post(f"{running.url}/v1/completions", json=body, timeout=TIMEOUT)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def load() -> None:
        body = {"lora_name": "canary", "lora_path": "a1"}
        assert httpx.post(f"{running.url}/v1/load_lora_adapter", json=body, timeout=TIMEOUT).status_code == 200

    load()
    before = [ask("gqa"), ask("canary")]
    yield
    load()
    assert [ask("gqa"), ask("canary")] == before
    status = httpx.get(f"{running.url}/status.json", timeout=TIMEOUT).json()
    assert status["error"] is None and not status["draining"]
    stats = status["stats"]
    assert (stats["running"], stats["waiting"], stats["loop"]["faults"]) == (0, 0, 0)
