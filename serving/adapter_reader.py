"""Adapters read and packed a few at a time while requests run, and one after the other for each name."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from chameleon_jax.errors import QueueFull, RequestFailed
from chameleon_jax.sampling_params import LoRAMix, LoRARequest
from chameleon_jax.serving.adapters import PackedAdapter
from chameleon_jax.serving.engine import LLMEngine
from chameleon_jax.serving.engine_thread import EngineThread
from chameleon_jax.serving.turns import Turns


class AdapterReader:
    """Reads adapters on threads of its own, beside the engine's, which gives them their names.

    Args:
        thread: Owner of the engine.
        at_once: Adapters that are read and packed at a time.
        max_queue: Adapters that may wait for that.

    Attributes:
        turns: Turns of the callers that change a name.
    """

    def __init__(self, thread: EngineThread, at_once: int, max_queue: int):
        self.turns = Turns()
        self._engine, self._call = thread.engine, thread.call
        self._most = at_once + max_queue
        self._reads: set[Future[PackedAdapter]] = set()
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="lora-reader")

    def __len__(self) -> int:
        """Adapters that are being read, or wait for it."""
        return len(self._reads)

    async def add(
        self, name: str, job: Callable[[], PackedAdapter], path: str | Path | None, pinned: bool | None, load_inplace: bool
    ) -> bool:
        """Read an adapter and give it a name, once every earlier caller of the name is done.

        Args:
            name: A new name, or one that gets new content.
            job: Reads and packs it.
            path: Place that it is read from; None for memory.
            pinned: See `AsyncLLM.add_lora`.
            load_inplace: See `AsyncLLM.add_lora`.

        Returns:
            Whether the name had that very content already.
        """
        async with self.turns.of(name):
            return await self._add(name, job, path, pinned, load_inplace)

    async def add_missing(self, name: str, path: str | Path) -> bool:
        """Read an adapter and give it a name, unless the name has one when its turn comes. Returns whether it was read."""
        async with self.turns.of(name):
            missing = self._engine.adapters.get(name) is None
            if missing:
                await self._add(name, self._engine.packer.job(name, path), path)
        return missing

    async def prepare(self, lora: LoRARequest) -> None:
        """Read or mix what a request's adapter lacks, once for all requests that wait for it."""
        for member, _ in lora.members:
            if self._engine.must_read(member):
                async with self.turns.of(member.name):
                    if self._engine.must_read(member):
                        await self._add(member.name, self._engine.packer.job(member.name, member.path), member.path)
        if isinstance(lora, LoRAMix):
            async with self.turns.of(lora.name):
                await self._mix(lora)

    async def _add(
        self,
        name: str,
        job: Callable[[], PackedAdapter],
        path: str | Path | None,
        pinned: bool | None = None,
        load_inplace: bool = True,
    ) -> bool:
        packed = await self._read(name, job)
        naming = self._call(lambda engine: engine.name_lora(name, packed, path, pinned, load_inplace))
        return await asyncio.wrap_future(naming)

    async def _mix(self, lora: LoRAMix) -> None:
        while (job := await asyncio.wrap_future(self._call(lambda engine: engine.mix_job(lora)))) is not None:
            packed = await self._read(lora.name, functools.partial(self._engine.packer.mix, job))
            await asyncio.wrap_future(self._call(functools.partial(LLMEngine.add_mix, job=job, packed=packed)))
            # and again: where a member was replaced meanwhile, the mix is another one

    async def _read(self, name: str, job: Callable[[], PackedAdapter]) -> PackedAdapter:
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
