"""The server process: HTTP and gRPC over one service, from start to graceful shutdown."""

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
"""Seconds that clients get at shutdown to read the end of their last response."""


def listen(config: ServerConfig) -> socket.socket:
    """Bind the HTTP socket, and check the gRPC port and the certificate, before a model is loaded.

    Raises:
        OSError: A port is taken, the host is unknown, or the certificate cannot be used.
    """
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
    """Raise OSError unless the certificate and its key can be used."""
    if config.tls_cert is None or config.tls_key is None:
        return
    for field, file in (("tls_cert", config.tls_cert), ("tls_key", config.tls_key)):
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise OSError(f"{field} is {file!r}: {error.strerror}") from error
    try:  # the empty password keeps OpenSSL from asking for one at the terminal
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.tls_cert, config.tls_key, password="")
    except ssl.SSLError as error:
        pair = f"tls_cert is {config.tls_cert!r} and tls_key is {config.tls_key!r}"
        raise OSError(f"{pair}: {error}; allowed: a certificate and its key, as PEM and not encrypted") from error


def _bind(host: str, port: int, field: str) -> socket.socket:
    """Bind a socket. Args: field: name of the port's setting, for errors. Raises OSError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:  # UnicodeError: the name is too long
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
        yield  # `Server` handles signals


class Server:
    """HTTP and gRPC server. Serves until `stop` is called or the process gets a signal to end.

    Args:
        service: Service behind both protocols.
        listener: Bound socket for HTTP. The server closes it.
        metrics: Metrics, made before the engine to count its compilations.

    Attributes:
        port: Bound HTTP port.
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
        """Bound gRPC port. None without gRPC, 0 until `start` returns."""
        return None if self._rpc is None else self._rpc.port

    async def start(self) -> None:
        """Start both protocols. Returns once they answer. Raises OSError for a port that is taken."""
        if (error := self._service.chat_error) is not None:
            logger.warning("chat completions are refused, text completions are served: %s", error)
        if self._rpc is not None:
            await self._rpc.start()
        self._serving = asyncio.create_task(self._http.serve([self._listener]))
        while not self._http.started:
            if self._serving.done():
                await self._serving
                raise OSError("HTTP did not start")
            await asyncio.sleep(0.01)

    def stop(self) -> None:
        """Begin a graceful shutdown. `run` returns when it is done."""
        self._stopping.set()

    async def run(self) -> bool:
        """Serve until stopped, then shut down gracefully.

        The first SIGTERM or SIGINT begins the shutdown: new requests are refused, running ones get `drain_timeout` seconds to
        finish, and the rest are aborted. A second signal ends the process at once.

        Returns:
            Whether every admitted request finished.

        Raises:
            OSError: HTTP ended without being stopped. Everything else has been shut down too.
        """
        assert self._serving is not None, "not started"
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):  # not the main thread
                loop.add_signal_handler(number, self._on_signal, number)
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait([stopping, self._serving], return_when=asyncio.FIRST_COMPLETED)
        was_stopped = self._stopping.is_set()
        stopping.cancel()
        if not was_stopped:
            logger.error("HTTP ended without being stopped")
        service = self._service
        logger.info("stopping: running requests get %g s to finish", service.config.drain_timeout)
        if self._rpc is not None:
            await self._rpc.set_not_serving()
        finished = await service.llm.drain(service.config.drain_timeout)
        self._http.should_exit = True
        if self._rpc is not None:
            await self._rpc.stop(CLOSE_TIMEOUT_S)
        await self._serving
        if not was_stopped:
            raise OSError("HTTP ended without being stopped")
        logger.info("stopped")
        return finished

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            os._exit(128 + number)
        self.stop()
