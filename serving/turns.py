"""Turns of callers who change one thing, by its name."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future


class Turns:
    """First come, first served for each name, from any asyncio loop. (A lock of asyncio belongs to one loop.)"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[str, Future[None]] = {}  # done when the name's last caller is

    def __len__(self) -> int:
        """Count the names with a caller that runs or waits."""
        return len(self._last)

    @contextlib.asynccontextmanager
    async def of(self, name: str) -> AsyncIterator[None]:
        """Run the body once every earlier caller of the name is done."""
        mine: Future[None] = Future()
        with self._lock:
            before, self._last[name] = self._last.get(name), mine

        def leave(_: object = None) -> None:
            with self._lock:
                if self._last.get(name) is mine:
                    del self._last[name]
            mine.set_result(None)

        try:
            if before is not None:
                await asyncio.shield(asyncio.wrap_future(before))
            yield
        finally:
            if before is None:
                leave()
            else:  # a caller that was cancelled leaves when its turn would have come
                before.add_done_callback(leave)
