"""Reads adapters and packs them, a few at a time, while requests run."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from chameleon_jax.errors import QueueFull, RequestFailed
from chameleon_jax.serving.engine import Engine, PackedAdapter


class AdapterReader:
    """Its own threads read; the engine's is not asked.

    Args:
        at_once: adapters that are read and packed at once.
        max_queue: adapters that may wait for that.
    """

    def __init__(self, engine: Engine, at_once: int, max_queue: int):
        self._engine = engine
        self._most = at_once + max_queue
        self._reads: set[Future[PackedAdapter]] = set()
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="lora-reader")

    def __len__(self) -> int:
        """Adapters that are read, or wait for it."""
        return len(self._reads)

    async def read(self, name: str, path: str | Path) -> PackedAdapter:
        """Raises ValueError where it cannot be served, QueueFull where too many wait, RequestFailed where this server fails."""
        if len(self) >= self._most:
            raise QueueFull(f"{len(self)} adapters are being loaded (max_lora_queue)")
        reading = self._threads.submit(self._engine.read_lora, name, path)
        self._reads.add(reading)
        reading.add_done_callback(self._reads.discard)  # also where whoever wanted it has left
        try:
            return await asyncio.wrap_future(reading)
        except ValueError:
            raise
        except Exception as error:  # no memory to pack it in, say
            raise RequestFailed(f"adapter {name!r} cannot be loaded: {error!r}") from error

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
