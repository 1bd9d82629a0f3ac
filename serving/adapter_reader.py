"""Adapters read and packed a few at a time while requests run, and one after the other for each name."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor

from chameleon_jax.errors import QueueFull, RequestFailed
from chameleon_jax.serving.adapters import PackedAdapter


class AdapterReader:
    """Reads adapters on threads of its own, beside the engine's.

    Args:
        at_once: Adapters that are read and packed at a time.
        max_queue: Adapters that may wait for that.

    Attributes:
        turns: Turns of the callers that change a name.
    """

    def __init__(self, at_once: int, max_queue: int):
        self.turns = Turns()
        self._most = at_once + max_queue
        self._reads: set[Future[PackedAdapter]] = set()
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="lora-reader")

    def __len__(self) -> int:
        """Adapters that are being read, or wait for it."""
        return len(self._reads)

    async def read(self, name: str, job: Callable[[], PackedAdapter]) -> PackedAdapter:
        """Read and pack an adapter.

        Args:
            name: Name of the adapter, for errors.
            job: Reads and packs it.

        Raises:
            ValueError: It cannot be served.
            QueueFull: Too many adapters wait already.
            RequestFailed: This server has failed, for want of memory say.
        """
        if len(self) >= self._most:
            raise QueueFull(f"{len(self)} adapters are being loaded (max_lora_queue)")
        reading = self._threads.submit(job)
        self._reads.add(reading)
        reading.add_done_callback(self._reads.discard)  # also where its caller has left
        try:
            return await asyncio.wrap_future(reading)
        except ValueError:
            raise
        except Exception as error:  # no memory to pack it in, say
            raise RequestFailed(f"adapter {name!r} cannot be loaded: {error!r}") from error

    def close(self) -> None:
        """End the threads after the adapters that they read now."""
        self._threads.shutdown(cancel_futures=True)


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
