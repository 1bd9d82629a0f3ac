"""One process, two protocols: HTTP and gRPC over one service, from the first connection to a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from chameleon_jax.serving.http.app import make_app
from chameleon_jax.serving.http.connection import uvicorn_settings
from chameleon_jax.serving.http.status import status_router
from chameleon_jax.serving.rpc.server import RpcServer
from chameleon_jax.serving.service.server_config import ServerConfig
from chameleon_jax.serving.service.service import Service
from chameleon_jax.serving.telemetry.metrics import Metrics
from chameleon_jax.serving.telemetry.recent import RecentRequests

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
CLOSE_TIMEOUT_S = 5
"""Seconds that connections are given to take the end of their last response."""


def listen(config: ServerConfig) -> socket.socket:
    """The socket of HTTP, so that a port that is taken is found before a model is loaded; so is one of gRPC, and a certificate
    that cannot be used. Raises OSError."""
    check_tls(config)
    listener = _bind(config.host, config.port, "port")
    if config.grpc_port:
        try:
            _bind(config.host, config.grpc_port, "grpc_port").close()
        except OSError:
            listener.close()
            raise
    return listener


def check_tls(config: ServerConfig) -> None:
    """Raises OSError where the certificate and its key cannot be used."""
    if config.tls_cert is None or config.tls_key is None:
        return
    for field, file in (("tls_cert", config.tls_cert), ("tls_key", config.tls_key)):
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise OSError(f"{field} is {file!r}: {error.strerror}") from error
    try:  # the empty password keeps it from asking the terminal for one
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password="")
    except ssl.SSLError as error:
        what = f"tls_cert is {config.tls_cert!r} and tls_key is {config.tls_key!r}"
        raise OSError(f"{what}: {error}; allowed: a certificate and its key, as PEM and not encrypted") from error


def _bind(host: str, port: int, field: str) -> socket.socket:
    """Args: field: what `port` is called. Raises OSError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # the latter where a name is too long
        raise OSError(f"host is {host!r}: {error}; allowed: an address or a name of this machine") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"{field} is {port}: cannot listen on {host}:{port}: {error.strerror}") from error
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
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
                log_config=None,
                access_log=False,
                server_header=False,
                **uvicorn_settings(config.max_header_bytes, config.max_connections),
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @property
    def grpc_port(self) -> int | None:
        return None if self._rpc is None else self._rpc.port

    async def start(self) -> None:
        """Returns once both protocols answer. Raises OSError where a port cannot be had."""
        if (error := self._service.chat_error) is not None:
            logger.warning("conversations are refused, completions are not: %s", error)
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

        Raises:
            OSError: HTTP ended though nobody stopped it; everything else has then ended too.
        """
        assert self._serving is not None, "not started"
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # not the main thread
                loop.add_signal_handler(number, self._signalled, number)
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([stopping, self._serving], return_when=asyncio.FIRST_COMPLETED)
        told = self._stopping.is_set()
        stopping.cancel()
        if not told:
            logger.error("HTTP ended though nobody stopped it")
        service = self._service
        logger.info("stopping: running requests have %g s", service.config.drain_timeout)
        if self._rpc is not None:
            await self._rpc.set_not_serving()
        finished = await service.llm.drain(service.config.drain_timeout)
        self._http.should_exit = True
        if self._rpc is not None:
            await self._rpc.stop(CLOSE_TIMEOUT_S)
        await self._serving
        if not told:
            raise OSError("HTTP ended though nobody stopped it")
        logger.info("stopped")
        return finished

    def _signalled(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            os._exit(128 + number)
        self.stop()
