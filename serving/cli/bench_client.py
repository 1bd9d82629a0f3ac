"""HTTP client of the load generator: POST requests over kept-alive connections, their bodies handed on as they arrive.

The parser is httptools' and the event loop uvloop's, both of which the server needs anyway. A general client library would be
the bottleneck: for streams of 16 events httpx took 12 times the processor time.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httptools

from chameleon_jax.checks import require

Receive = Callable[[int, bytes], None]
"""Told of each part of a body, with the status of the answer."""


class HttpClient:
    """Client of one server.

    Args:
        base_url: `http://host:port`, or `https`; a path is put before the path of each request.
        headers: Headers of every request.

    Raises:
        ValueError: `base_url` is no such address.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str]):
        allowed = "http://host:port or https://host:port"
        try:
            url = urlsplit(base_url)
            self._port = url.port or (443 if url.scheme == "https" else 80)
        except ValueError as error:
            raise ValueError(f"base_url is {base_url!r}; allowed: {allowed} ({error})") from error
        self._host = url.hostname or ""
        require(url.scheme in ("http", "https") and bool(self._host), "base_url", base_url, allowed)
        self._ssl = ssl.create_default_context() if url.scheme == "https" else None
        self._prefix = url.path.rstrip("/")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in ({"host": url.netloc} | dict(headers)).items())
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, body: bytes, receive: Receive) -> int:
        """Make a request and return the status of its answer, once the answer is whole.

        Raises:
            OSError: The connection cannot be made, which names the server, or broke.
        """
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}content-length: {len(body)}\r\n\r\n".encode()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                try:
                    return await self._ask(connection, head + body, receive)
                except ConnectionResetError:
                    if connection.has_begun:
                        raise  # else the server closed it while it was idle
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        except OSError as error:
            raise ConnectionError(f"{self._host}:{self._port} cannot be reached ({error})") from error
        return await self._ask(connection, head + body, receive)

    async def _ask(self, connection: _Connection, request: bytes, receive: Receive) -> int:
        status = await connection.ask(request, receive)
        if connection.is_open:
            self._idle.append(connection)
        return status

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


class _Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self.is_open = True
        self.has_begun = False
        self._status: asyncio.Future[int] | None = None

    def ask(self, request: bytes, receive: Receive) -> asyncio.Future[int]:
        self.has_begun = False
        self._receive = receive
        self._parser = httptools.HttpResponseParser(self)
        self._status = status = asyncio.get_running_loop().create_future()
        if self.is_open:
            self._transport.write(request)
        else:
            status.set_exception(ConnectionResetError("the server closed the connection"))
        return status

    def close(self) -> None:
        self.is_open = False
        self._transport.close()

    # -- called by the event loop ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport  # uvloop's are no instances of asyncio's classes

    def data_received(self, data: bytes) -> None:
        self.has_begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(ConnectionError(f"the answer is not HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(ConnectionResetError("the server closed the connection"))

    def _fail(self, error: OSError) -> None:
        self.close()
        if self._status is not None and not self._status.done():
            self._status.set_exception(error)

    # -- called by the parser -------------------------------------------------------------------------------------------

    def on_body(self, body: bytes) -> None:
        self._receive(self._parser.get_status_code(), body)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._status is not None and not self._status.done():
            self._status.set_result(self._parser.get_status_code())
