"""Closing of connections without losing the answer, and without waiting forever for clients that do not read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

WRITE_TIMEOUT_S = 60.0
"""Seconds after which a connection is aborted whose client reads nothing of the data waiting for it."""

LINGER_S = 3.0
"""Seconds for which data that a client still sends after an early answer is received and dropped."""

LINGER_BYTES = 64 << 20
"""Bytes dropped at most before the connection is aborted."""


class LingeringTransport:
    """Transport whose `close` loses no answer and ends in bounded time.

    The kernel resets a socket that is closed with unread data, and the client may lose an answer that it has not read yet. So,
    as in nginx, `close` ends only the writing side while the client still sends, and leaves the closing to the client.

    Args:
        is_sending: Whether the client still sends.

    Attributes:
        lingers: Closed for writing. Received data must go to `drop`.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, is_sending: Callable[[], bool]):
        self._transport, self._loop, self._is_sending = transport, loop, is_sending
        self.write = transport.write
        self.lingers = False
        self._num_dropped = 0
        self._num_waiting = 0
        self._linger_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if self._is_sending():
            self.lingers = True
            self._linger_timer = self._loop.call_later(LINGER_S, self._transport.abort)
            self._transport.resume_reading()
            if self._transport.can_write_eof():  # TLS cannot, but the length of the answer shows where it ends
                self._transport.write_eof()
        else:
            self._transport.close()  # after all waiting data is written
            self.watch_writes()

    def drop(self, num_bytes: int) -> None:
        """Count received data that is not read. Aborts the connection above LINGER_BYTES."""
        self._num_dropped += num_bytes
        if self._num_dropped > LINGER_BYTES:
            self._transport.abort()

    def watch_writes(self) -> None:
        """Abort the connection unless the client reads some of the waiting data in time. Nothing may be written meanwhile."""
        self._num_waiting = self._transport.get_write_buffer_size()
        if self._num_waiting and self._write_timer is None:
            self._write_timer = self._loop.call_later(WRITE_TIMEOUT_S, self._check_writes)

    def on_writable(self) -> None:
        """Note that the client has read enough for more to be written."""
        self._write_timer = cancel_timer(self._write_timer)
        if self.is_closing():
            self.watch_writes()

    def connection_lost(self) -> None:
        self._linger_timer = cancel_timer(self._linger_timer)
        self._write_timer = cancel_timer(self._write_timer)

    def _check_writes(self) -> None:
        self._write_timer = None
        if self._transport.get_write_buffer_size() < self._num_waiting:
            self.watch_writes()
        else:
            self._transport.abort()


def cancel_timer(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, if there is one. Returns None, to be stored in its place."""
    if timer is not None:
        timer.cancel()
    return None
