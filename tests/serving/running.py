"""A whole server in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from chameleon_jax.serving.async_llm import AsyncLLM
from chameleon_jax.serving.server import Server, listen
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.service.service import Service
from chameleon_jax.serving.telemetry.metrics import Metrics

TIMEOUT = 120


class Running:
    """Attributes: url: of HTTP; target: of gRPC."""

    def __init__(self, llm: AsyncLLM, config: ServerConfig):
        self._ready = threading.Event()
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(llm, config))
        self._thread.start()
        assert self._ready.wait(TIMEOUT)
        if self._failed is not None:
            self._thread.join(TIMEOUT)
            raise self._failed

    def _run(self, llm: AsyncLLM, config: ServerConfig) -> None:
        try:
            asyncio.run(self._serve(llm, config))
        except BaseException as error:
            self._failed = error
        finally:
            self._ready.set()

    async def _serve(self, llm: AsyncLLM, config: ServerConfig) -> None:
        self._loop = asyncio.get_running_loop()
        observers = list(llm.observers)
        metrics = Metrics()
        self.service = Service(llm, config)
        await self.service.load_named({})
        self.server = Server(self.service, listen(config), metrics)
        await self.server.start()
        scheme = "http" if config.tls_cert is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.server.port}"
        self.target = f"127.0.0.1:{self.server.grpc_port}"
        self._ready.set()
        await self.server.run()
        metrics.close()
        llm.observers[:] = observers

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self.server.stop)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive() and self._failed is None


@contextlib.contextmanager
def running(llm: AsyncLLM, config: ServerConfig) -> Iterator[Running]:
    server = Running(llm, config)
    try:
        yield server
    finally:
        server.stop()
        llm.draining = False  # the next server has the same engine
