"""Reading of several request streams at once, for as long as the client is connected."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from chameleon_jax.outputs import Delta
from chameleon_jax.serving.request_stream import RequestStream

logger = logging.getLogger(__name__)

T = TypeVar("T")


async def merge(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """Yield `(index of the stream, delta)` as deltas arrive."""
    if len(streams) == 1:
        async for delta in streams[0]:
            yield 0, delta
        return
    reads = {asyncio.ensure_future(stream.__anext__()): i for i, stream in enumerate(streams)}
    try:
        while reads:
            done, _ = await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED)
            for read in done:
                i = reads.pop(read)
                with contextlib.suppress(StopAsyncIteration):
                    yield i, read.result()
                    reads[asyncio.ensure_future(streams[i].__anext__())] = i
    finally:
        for read in reads:
            read.cancel()
        await asyncio.gather(*reads, return_exceptions=True)


async def run_while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Run `work` and return its result. Cancel it and return None when the client disconnects first."""
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _cancel(working, disconnected)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(error, Exception):
            logger.debug("cancelled after the client had gone: %s", error)
