"""Requests of the engine as answers of HTTP: collected, or event by event, and given up when the client is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from chameleon_jax.errors import ServingError
from chameleon_jax.serving.http.errors import ApiError, api_error
from chameleon_jax.serving.http.requests import StreamOptions
from chameleon_jax.serving.request_stream import RequestStream
from chameleon_jax.serving.updates import Delta

logger = logging.getLogger(__name__)

T = TypeVar("T")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def usage_so_far(options: StreamOptions | None, prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """What an event of a stream says of it."""
    wanted = options is not None and options.continuous_usage_stats
    return {"usage": usage(prompt_tokens, completion_tokens)} if wanted else {}


def note_usage(request: Request, model: str, prompt_tokens: int, completion_tokens: int) -> None:
    """For the access log."""
    counts = {"model": model, "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    request.state.log.update(counts)


def unused_id(prefix: str, request: Request) -> str:
    """What the engine knows a request by: the id that it came with, which a client may give to several at a time."""
    return f"{prefix}-{request.state.request_id}-{uuid.uuid4().hex[:8]}"


def timeout_of(request: Request) -> float | None:
    """Seconds, of the header `X-Request-Timeout`. Raises ApiError."""
    header = request.headers.get("x-request-timeout")
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        name = "x-request-timeout"
        raise ApiError(400, f"{name} is {header[:40]!r}; allowed: above 0 seconds, finite", param=name)
    return seconds


async def merged(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, Delta], None]:
    """`(number of the stream, what is new)`, as it comes."""
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


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns, or None as soon as the client is gone."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        await _cancel(working, gone)


class EventStream(Response):
    """Server-sent events. The streams are closed when the last is sent, or the client is gone.

    Args:
        events: of each delta, what is sent; may be nothing.
        end: what is sent when all have ended.
    """

    def __init__(
        self,
        streams: Sequence[RequestStream],
        events: Callable[[int, Delta], list[dict[str, Any]]],
        begin: Callable[[], list[dict[str, Any]]],
        end: Callable[[], list[dict[str, Any]]],
    ):
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._streams, self._events, self._begin, self._end = streams, events, begin, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            await _cancel(writing, gone)
            for stream in self._streams:
                stream.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

        async def write(events: list[dict[str, Any]], last: bytes = b"", more: bool = True) -> None:
            body = b"".join([b"data: %b\n\n" % json.dumps(event).encode() for event in events]) + last
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": more})

        try:
            await write(self._begin())
            async with contextlib.aclosing(merged(self._streams)) as deltas:
                async for i, delta in deltas:
                    await write(self._events(i, delta))
            await write(self._end(), b"data: [DONE]\n\n", more=False)
        except ServingError as error:  # too late for a status
            await write([api_error(error).body], b"data: [DONE]\n\n", more=False)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(error, Exception):
            logger.debug("given up: %s", error)
