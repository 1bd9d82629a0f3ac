"""Connections with bounds: with httptools, uvicorn bounds neither what is read beside bodies, nor how long anything takes.

What is wrong with a connection is answered as errors are, unless another answer is under way: then that is the last one.
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
from chameleon_jax.serving.http.lingering import LingeringTransport, cancelled

HEAD_TIMEOUT_S = 20.0
"""Seconds within which the head of a request must be there once the connection is open, or the last response is sent and the
next head has begun."""

BODY_TIMEOUT_S = 60.0
"""Seconds within which the body must be there once the head is."""

FRAMING_PER_BYTE = 8
"""Bytes of framing that a chunked body may have for each byte of content: chunks of one byte have five."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `scope["state"]` gets `above_limit`: it came when there were `max_connections`, and there still are."""

    def __init__(self, *args: Any, max_header_bytes: int, max_connections: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._max_header_bytes, self._max_connections = max_header_bytes, max_connections
        self._in_head = self._in_body = False
        self._keep_alive = False  # after the request whose body comes
        self._refused = False  # nothing more is read
        self._begun, self._body_received = False, 0  # in what was received last
        self._body_bytes = self._other_bytes = 0  # of the last message
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._lingering = LingeringTransport(transport, self.loop, lambda: self._in_body or self._refused)
        super().connection_made(self._lingering)  # type: ignore[arg-type]
        self._came_late = len(self.connections) > self._max_connections
        self._expect(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer = cancelled(self._timer)
        self._lingering.lost()
        for cycle in self._unanswered:  # uvicorn tells only the last
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
        if self._in_head or not self._begun:  # a head that began and ended in this data was measured
            self._other_bytes += len(data) - self._body_received
        if self._other_bytes > self._max_header_bytes + FRAMING_PER_BYTE * self._body_bytes:
            if self._in_head:
                self._refuse_head()
            else:
                self._refuse(400, "the body's chunks have too much around them")
        elif self._timer is None and (self._in_head or self._in_body or not self._unanswered):
            self._expect(BODY_TIMEOUT_S if self._in_body else HEAD_TIMEOUT_S)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._timer = cancelled(self._timer)
        self._in_head = True
        self._begun = True
        self._body_bytes = self._other_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            self._refuse(400, "the body has trailers; allowed: none")
            raise ValueError("trailers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._timer = cancelled(self._timer)
        self._in_head = False
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._max_header_bytes:
            self._refuse_head()
            raise ValueError("the head is too large")
        above_limit = self._came_late and len(self.connections) > self._max_connections
        self.scope["state"]["above_limit"] = above_limit
        super().on_headers_complete()
        self._in_body = True
        self._unanswered.append(self.cycle)
        self._keep_alive = self.cycle.keep_alive and not above_limit
        self.cycle.keep_alive = False  # an answer before the body's end ends the connection, and says so

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._body_received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._timer = cancelled(self._timer)
        self._in_body = False
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keep_alive
        super().on_message_complete()

    def _expect(self, seconds: float) -> None:
        self._timer = self.loop.call_later(seconds, self._late, seconds)

    def _late(self, seconds: float) -> None:
        self._timer = None
        if self.flow.read_paused:  # it is not the client that is late
            self._expect(seconds)
        elif self._in_head or self._in_body:
            self._refuse(408, f"the request has not come within {seconds:g} s")
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
        self._lingering.resumed()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse_head(self) -> None:
        self._refuse(431, f"the head of the request is too large; allowed: {self._max_header_bytes} bytes")

    def _refuse(self, status: int, message: str) -> None:
        """Reads nothing more, and ends the connection after the answers that are under way, or with this one."""
        if self._refused:
            return
        self._refused = True
        self._timer = cancelled(self._timer)
        others = list(self._unanswered)
        begun = False
        if self._in_body:  # so its request has been given to the application
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
    """What of `uvicorn.Config` decides how a connection is read.

    Args:
        max_connections: those that come above it are told so by `Edge`, and may still ask for the server's health; uvicorn's
            `limit_concurrency` is neither JSON nor lets them.
    """
    protocol = functools.partial(LimitedProtocol, max_header_bytes=max_header_bytes, max_connections=max_connections)
    return {"http": protocol, "ws": "none", "lifespan": "off", "proxy_headers": False}
