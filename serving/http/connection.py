"""Connections whose head has a size and a time: uvicorn bounds neither with httptools."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_TIMEOUT_S = 20.0
"""Seconds within which the head of a request must be there once the connection is open, or the last response is sent and the
next head has begun."""

TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def limited_protocol(max_header_bytes: int) -> type[HttpToolsProtocol]:
    """A protocol for `uvicorn.Config(http=...)` that answers 431 to larger heads, and closes connections whose head is late."""

    class LimitedProtocol(HttpToolsProtocol):
        _head_bytes = 0
        _in_head = True
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

        def connection_lost(self, exc: Exception | None) -> None:
            self._head_is_there()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_head and not self.transport.is_closing():
                self._head_bytes += len(data)  # the first bytes may be the end of a body: not more than is received at once
                if self._head_bytes > max_header_bytes:
                    self._refuse()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._in_head, self._head_bytes = True, 0
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._close)

        def on_headers_complete(self) -> None:
            self._head_is_there()
            self._in_head = False
            if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > max_header_bytes:
                self._refuse()
                raise ValueError("the head is too large")
            super().on_headers_complete()

        def send_400_response(self, msg: str) -> None:
            if not self.transport.is_closing():  # a head that was refused has its answer
                super().send_400_response(msg)

        def _refuse(self) -> None:
            self.transport.write(TOO_LARGE)
            self.transport.close()

        def _head_is_there(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _close(self) -> None:
            self._head_timer = None
            self.transport.close()

    return LimitedProtocol


def uvicorn_settings(max_header_bytes: int) -> dict[str, Any]:
    """What of `uvicorn.Config` decides how a connection is read."""
    return {"http": limited_protocol(max_header_bytes), "ws": "none", "lifespan": "off", "proxy_headers": False}
