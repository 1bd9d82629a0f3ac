"""One process, two protocols: HTTP and gRPC over one service, from the first connection to a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from chameleon_jax.serving.http.app import make_app
from chameleon_jax.serving.http.connection import uvicorn_settings
from chameleon_jax.serving.http.status import status_router
from chameleon_jax.serving.rpc.server import RpcServer
from chameleon_jax.serving.server_config import ServerConfig
from chameleon_jax.serving.service import Service
from chameleon_jax.serving.telemetry.metrics import Metrics
from chameleon_jax.serving.telemetry.recent import RecentRequests

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
CLOSE_TIMEOUT_S = 5
"""Seconds that connections are given to take the end of their last response."""


def listen(config: ServerConfig) -> socket.socket:
    """The socket of HTTP, so that a port that is taken is found before a model is loaded. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from error
    return listener


class _HttpServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are `Server`'s


class Server:
    """Serves until `stop` is called or the process is told to end.

    Args:
        listener: of HTTP; taken over.
        metrics: what has counted since before the engine was made; the server goes on with it.

    Attributes:
        port: of HTTP.
        grpc_port: None: there is no gRPC.
    """

    def __init__(self, service: Service, listener: socket.socket, metrics: Metrics):
        config = service.config
        self.port: int = listener.getsockname()[1]
        self._service = service
        self._listener = listener
        self._stopping = asyncio.Event()
        self._rpc = None if config.grpc_port is None else RpcServer(service)
        recent = RecentRequests()
        service.llm.observers += [metrics, recent]
        app = make_app(service)
        app.include_router(status_router(metrics, recent))
        self._http = _HttpServer(
            uvicorn.Config(
                app,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                limit_concurrency=config.max_connections,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
                log_config=None,
                access_log=False,
                server_header=False,
                **uvicorn_settings(config.max_header_bytes),
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def grpc_port(self) -> int | None:
        return None if self._rpc is None else self._rpc.port

    async def start(self) -> None:
        """Returns once both protocols answer. Raises OSError where a port cannot be had."""
        if self._rpc is not None:
            await self._rpc.start()
        self._serving = asyncio.create_task(self._http.serve([self._listener]))
        while not self._http.started:
            if self._serving.done():
                await self._serving
                raise OSError("HTTP could not be started")
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        """Begins the graceful end: `run` returns when it is done."""
        self._stopping.set()

    async def run(self) -> bool:
        """Serves until it is told to stop, then takes nothing in, finishes what runs or gives it up in time, and closes.

        The first SIGTERM or SIGINT stops it, the second ends the process at once.

        Returns:
            Whether every request that was taken in was finished.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # not the main thread
                loop.add_signal_handler(number, self._signalled, number)
        await self._stopping.wait()
        service = self._service
        logger.info("stopping: running requests have %g s", service.config.drain_timeout)
        if self._rpc is not None:
            await self._rpc.set_not_serving()
        finished = await service.llm.drain(service.config.drain_timeout)
        self._http.should_exit = True
        if self._rpc is not None:
            await self._rpc.stop(CLOSE_TIMEOUT_S)
        if self._serving is not None:
            await self._serving
        logger.info("stopped")
        return finished

    def _signalled(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            os._exit(128 + number)
        self.stop()
