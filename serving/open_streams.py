"""Streams of unfinished requests, updated by the engine's thread."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Sequence

from chameleon_jax.errors import DuplicateRequest, EngineDead
from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.serving.observers import Observers
from chameleon_jax.serving.request_stream import RequestStream


class OpenStreams(dict[str, RequestStream]):
    """Streams by the id of their request.

    Attributes:
        observers: Told of requests and loads, as the engine's thread tells these streams.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observers = Observers()

    def add(self, streams: Sequence[RequestStream]) -> None:
        """Add streams, or none of them. Raises DuplicateRequest where a stream of such an id is open."""
        for stream in streams:
            if stream.request_id in self:
                raise DuplicateRequest(f"request_id is {stream.request_id!r}; a request of that id is running")
        self.update({stream.request_id: stream for stream in streams})

    def remove(self, stream: RequestStream) -> bool:
        """Remove a stream. Returns whether it was open."""
        is_open = self.get(stream.request_id) is stream
        if is_open:
            del self[stream.request_id]
        return is_open

    # -- told by the engine's thread ------------------------------------------------------------------------------------

    def updated(self, snapshots: list[OutputSnapshot]) -> None:
        """Hand on snapshots of requests that have new tokens or ended."""
        self.observers.updated(snapshots)
        by_loop: dict[asyncio.AbstractEventLoop, deque[tuple[RequestStream, OutputSnapshot]]] = {}
        for snapshot in snapshots:
            request = snapshot.request
            stream = self.get(request.request_id)
            if stream is not None and stream.request is request:  # not one before it of the same id
                pairs = by_loop.setdefault(stream.loop, deque())
                if snapshot.num_tokens and not stream.has_begun:
                    stream.has_begun = True
                    self.observers.first_token(request)
                    pairs.appendleft((stream, snapshot))  # a first token waits for no other request's tokens
                else:
                    pairs.append((stream, snapshot))
            if snapshot.finished:
                self.observers.finished(request)
        for loop, pairs in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed, and with it every reader
                loop.call_soon_threadsafe(self._deliver, pairs)

    def engine_died(self, error: EngineDead) -> None:
        """End every stream with the cause of the engine's death. Any thread may tell it."""
        left = list(self.values())  # also of requests that ended in the step that failed, which nothing has told
        self.observers.engine_died(error, [stream.lora for stream in left])
        for stream in left:
            with contextlib.suppress(RuntimeError):
                stream.loop.call_soon_threadsafe(stream.fail, error)

    def _deliver(self, pairs: Iterable[tuple[RequestStream, OutputSnapshot]]) -> None:
        for stream, snapshot in pairs:
            stream.deliver(snapshot)
            if snapshot.finished:
                self.remove(stream)
