"""Connections that end without losing an answer, and end though a client takes none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

WRITE_TIMEOUT_S = 60.0
"""Seconds after which a client that takes nothing of what waits for it is given up."""

LINGER_S = 3.0
"""Seconds for which a connection that was answered early goes on to take, and drop, what its client still sends."""

LINGER_BYTES = 64 << 20
"""What is dropped at most of a connection of which nothing more is read."""


class LingeringTransport:
    """A transport, but for `close`, which loses no answer and does not wait for ever.

    A socket that is closed while something waits to be read is reset, and the client may lose the answer that it was about to
    read. So, as in nginx, only writing ends where the client still sends; then it is the client's turn to close.

    Args:
        sending: whether the client still sends.

    Attributes:
        lingers: closed for those who write; what is received is to be dropped.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, sending: Callable[[], bool]):
        self._transport, self._loop, self._sending = transport, loop, sending
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
        if self._sending():
            self.lingers = True
            self._linger_timer = self._loop.call_later(LINGER_S, self._transport.abort)
            self._transport.resume_reading()
            if self._transport.can_write_eof():  # TLS cannot; there the length of the answer says where it ends
                self._transport.write_eof()
        else:
            self._transport.close()  # once all is written
            self.watch_writes()

    def drop(self, num_bytes: int) -> None:
        """Counts what was received and is not read."""
        self._num_dropped += num_bytes
        if self._num_dropped > LINGER_BYTES:
            self._transport.abort()

    def watch_writes(self) -> None:
        """Gives the connection up if the client takes nothing; while nothing is added to what waits."""
        self._num_waiting = self._transport.get_write_buffer_size()
        if self._num_waiting and self._write_timer is None:
            self._write_timer = self._loop.call_later(WRITE_TIMEOUT_S, self._check_writes)

    def resumed(self) -> None:
        """The client has taken enough for more to be written."""
        self._write_timer = cancelled(self._write_timer)
        if self.is_closing():
            self.watch_writes()

    def lost(self) -> None:
        self._linger_timer = cancelled(self._linger_timer)
        self._write_timer = cancelled(self._write_timer)

    def _check_writes(self) -> None:
        self._write_timer = None
        if self._transport.get_write_buffer_size() < self._num_waiting:
            self.watch_writes()
        else:
            self._transport.abort()


def cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancels it. Returns what takes its place."""
    if timer is not None:
        timer.cancel()
    return None
