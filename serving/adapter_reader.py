"""Adapters read and packed a few at a time, while requests run."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from chameleon_jax.errors import QueueFull, RequestFailed
from chameleon_jax.serving.adapters import PackedAdapter
from chameleon_jax.serving.engine import LLMEngine


class AdapterReader:
    """Reads adapters on threads of its own, beside the engine's.

    Args:
        at_once: Adapters that are read and packed at a time.
        max_queue: Adapters that may wait for that.
    """

    def __init__(self, engine: LLMEngine, at_once: int, max_queue: int):
        self._engine = engine
        self._most = at_once + max_queue
        self._reads: set[Future[PackedAdapter]] = set()
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="lora-reader")

    def __len__(self) -> int:
        """Adapters that are being read, or wait for it."""
        return len(self._reads)

    async def read(self, name: str, path: str | Path) -> PackedAdapter:
        """Read and pack an adapter.

        Raises:
            ValueError: It cannot be served.
            QueueFull: Too many adapters wait already.
            RequestFailed: This server has failed, for want of memory say.
        """
        if len(self) >= self._most:
            raise QueueFull(f"{len(self)} adapters are being loaded (max_lora_queue)")
        reading = self._threads.submit(self._engine.packer.read, name, path)
        self._reads.add(reading)
        reading.add_done_callback(self._reads.discard)  # also where its caller has left
        try:
            return await asyncio.wrap_future(reading)
        except ValueError:
            raise
        except Exception as error:  # no memory to pack it in, say
            raise RequestFailed(f"adapter {name!r} cannot be loaded: {error!r}") from error

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
