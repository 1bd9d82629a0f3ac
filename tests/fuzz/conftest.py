"""A whole server on the small model, and the proof that a fuzz has disturbed nothing: `make fuzz`."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.server import Server, listen
from chameleon_jax.serving.server_config import ServerConfig
from chameleon_jax.serving.service import Service
from chameleon_jax.serving.telemetry.metrics import Metrics
from tests import reference_models as reference

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "10000"))
"""Inputs to each of the two protocols."""

TIMEOUT = 120
SETTINGS = dict(dtype="float32", max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64, num_pages=1200, max_queue_len=64)


class Running:
    """A server in a thread of its own."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig):
        self._ready = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(llm, config),))
        self._thread.start()
        assert self._ready.wait(TIMEOUT)

    async def _serve(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self._loop = asyncio.get_running_loop()
        service = Service(llm, config)
        await service.load_named({})
        self.server = Server(service, listen(config), Metrics())
        await self.server.start()
        self.url = f"http://127.0.0.1:{self.server.port}"
        self.target = f"127.0.0.1:{self.server.grpc_port}"
        self._ready.set()
        await self.server.run()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(TIMEOUT)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    model = reference.save_model(folder / "gqa", "gqa", text=True)
    for i, rank in enumerate((2, 8, 16, 40)):
        reference.save_adapter(folder / "adapters" / f"a{i}", reference.CONFIGS["gqa"], rank, seed=i)
    llm = AsyncLLM(str(model), progress=lambda done, total: None, **SETTINGS)
    server = Running(llm, ServerConfig(port=0, grpc_port=0, adapter_dirs=(str(folder / "adapters"),)))
    yield server
    server.stop()
    llm.close()


@pytest.fixture(scope="module")
def undisturbed(running: Running) -> Iterator[None]:
    """What is asked after all the inputs is answered as before them, and nothing is left running."""

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
    assert (stats["running"], stats["waiting"], stats["faults"]) == (0, 0, 0)
