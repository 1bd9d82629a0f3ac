"""Connections with limits on sizes and times, which uvicorn has none of with httptools.

The protocol here adds the limits by overriding uvicorn's httptools protocol, which is no public API: it reads and sets
`cycle.keep_alive`, `cycle.disconnected`, `cycle.message_event`, `cycle.response_started`, `flow.read_paused` and
`server_state.default_headers`. The public settings would not do: they time only idle connections, refuse in plain text and
let no health check through to a full server. So pyproject.toml pins uvicorn to the minor version of the tests.

A connection at fault gets a JSON error, unless another answer is under way: then that one is the last.
"""

from __future__ import annotations

import asyncio
import functools
import http
import json
from collections import deque
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from chameleon_jax.serving.http.errors import error_body
from chameleon_jax.serving.http.lingering import LingeringTransport, cancel_timer

HEAD_TIMEOUT_S = 20.0
"""Seconds for the head of a request to arrive. They count from the opening of the connection, and for later requests from the
time when the last response is sent and the head has begun."""

BODY_TIMEOUT_S = 60.0
"""Seconds for the body to arrive after the head."""

FRAMING_PER_BYTE = 8
"""Bytes of framing allowed in a chunked body for each byte of content. Chunks of one byte have five."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection.

    Sets `above_limit` in `scope["state"]`: whether the connection was opened above `max_connections` and the server is still
    full. `RequestMiddleware` then refuses the request.
    """

    def __init__(self, *args: Any, max_header_bytes: int, max_connections: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._max_header_bytes, self._max_connections = max_header_bytes, max_connections
        self._in_head = self._in_body = False
        self._keep_alive = False  # for the response to the request whose body is arriving
        self._refused = False  # nothing more is read from the client
        self._begun, self._body_received = False, 0  # within the data received last
        self._body_bytes = self._other_bytes = 0  # of the current message
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._lingering = LingeringTransport(transport, self.loop, lambda: self._in_body or self._refused)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        self._opened_above_limit = len(self.connections) > self._max_connections
        self._start_timer(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer = cancel_timer(self._timer)
        self._lingering.connection_lost()
        for cycle in self._unanswered:  # uvicorn notifies only the last
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._keep_alive = False
        super().shutdown()

    # -- reading --------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused or self._lingering.lingers:
            self._lingering.drop(len(data))
            return
        self._begun, self._body_received = False, 0
        super().data_received(data)
        if self._refused:
            return
        if self._in_head or not self._begun:  # a head that began and ended in this data was checked when it ended
            self._other_bytes += len(data) - self._body_received
        if self._other_bytes > self._max_header_bytes + FRAMING_PER_BYTE * self._body_bytes:
            if self._in_head:
                self._refuse_head()
            else:
                self._refuse(400, "the chunked body has too much framing; send larger chunks")
        elif self._timer is None and (self._in_head or self._in_body or not self._unanswered):
            self._start_timer(BODY_TIMEOUT_S if self._in_body else HEAD_TIMEOUT_S)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._timer = cancel_timer(self._timer)
        self._in_head = True
        self._begun = True
        self._body_bytes = self._other_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            self._refuse(400, "the body has trailers; allowed: none")
            raise ValueError("trailers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._timer = cancel_timer(self._timer)
        self._in_head = False
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._max_header_bytes:
            self._refuse_head()
            raise ValueError("the head is too large")
        above_limit = self._opened_above_limit and len(self.connections) > self._max_connections
        self.scope["state"]["above_limit"] = above_limit
        super().on_headers_complete()
        self._in_body = True
        self._unanswered.append(self.cycle)
        self._keep_alive = self.cycle.keep_alive and not above_limit
        self.cycle.keep_alive = False  # an answer before the end of the body closes the connection and says so

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._body_received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._timer = cancel_timer(self._timer)
        self._in_body = False
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keep_alive
        super().on_message_complete()

    def _start_timer(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._on_timeout, seconds)

    def _on_timeout(self, seconds: float) -> None:
        self._timer = None
        if self.flow.read_paused:  # the delay is ours, not the client's
            self._start_timer(seconds)
        elif self._in_head or self._in_body:
            self._refuse(408, f"the request did not arrive within {seconds:g} s")
        else:
            self.transport.close()

    # -- answering ------------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        self._unanswered.popleft()
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._lingering.watch_writes()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._lingering.on_writable()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse_head(self) -> None:
        self._refuse(431, f"the head of the request is too large; allowed: {self._max_header_bytes} bytes")

    def _refuse(self, status: int, message: str) -> None:
        """Stop reading, and close the connection after the answers under way, or after this one if there are none."""
        if self._refused:
            return
        self._refused = True
        self._timer = cancel_timer(self._timer)
        others = list(self._unanswered)
        begun = False
        if self._in_body:  # the application has this request already
            broken = others.pop()
            broken.disconnected = True
            broken.message_event.set()
            begun = broken.response_started
        if others:
            others[-1].keep_alive = False
            return
        if not begun:
            content = json.dumps(error_body(status, message)).encode()
            headers = [
                *self.server_state.default_headers,
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(content)),
                (b"connection", b"close"),
            ]
            head = b"".join(b"%b: %b\r\n" % header for header in headers)
            line = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n"
            self.transport.write(line.encode() + head + b"\r\n" + content)
        self.transport.close()


def uvicorn_settings(max_header_bytes: int, max_connections: int) -> dict[str, Any]:
    """Make the arguments of `uvicorn.Config` that decide how connections are read.

    Args:
        max_header_bytes: Bytes of a request's head.
        max_connections: Connections served at once. Requests on further ones are refused, except health checks. uvicorn's
            `limit_concurrency` would refuse these too, and answer in plain text.
    """
    protocol = functools.partial(LimitedProtocol, max_header_bytes=max_header_bytes, max_connections=max_connections)
    return {"http": protocol, "ws": "none", "lifespan": "off", "proxy_headers": False}
