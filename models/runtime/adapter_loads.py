"""Loads of adapters from host memory into their pages of the pool.

A load's block is fetched, at once or from disk. Its pieces are sent to the device one by one, the oldest load first. A program
that runs between steps copies each piece that has arrived into its pages. Only `poll(wait=True)` waits here, and no step ever
waits for a transfer: all that is dispatched has arrived. `link_pace` explains when pieces are sent, and how many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from chameleon_jax.executor import LoadResult
from chameleon_jax.models.adapters.host_store import HostStore
from chameleon_jax.models.adapters.transfers import MIN_TRANSFER_BYTES, PinnedBlock
from chameleon_jax.models.runtime.link_pace import LinkPace
from chameleon_jax.models.runtime.model_runner import ModelRunner


@dataclasses.dataclass(eq=False)
class _Load:
    """One adapter's load.

    Attributes:
        unsent: Pieces and their pages; None until the block is in host memory.
        num_bytes: Bytes sent so far.
        ended: None of it is sent or written any more. Pieces on their way are dropped.
    """

    content_hash: str
    pages: list[int]
    block: Future[PinnedBlock]
    began: float
    unsent: deque[tuple[jax.Array | np.ndarray, list[int]]] | None = None
    num_bytes: int = 0
    ended: bool = False


@dataclasses.dataclass(eq=False)
class _Transfer:
    """A piece on its way, or arrived and not written."""

    load: _Load
    piece: Any  # a jax.Array, whose type does not tell of is_ready
    pages: list[int]

    def arrived(self) -> bool:
        """Whether the piece is on the device. Raises the transfer's error where it failed."""
        if not self.piece.is_ready():
            return False
        self.piece.block_until_ready()
        return True


class AdapterLoads:
    """Loads under way. Not thread-safe.

    Args:
        clock: Seconds, monotonic.

    Attributes:
        copies: Times that each piece is sent and written; the last counts.
    """

    def __init__(self, runner: ModelRunner, store: HostStore, clock: Callable[[], float] = time.perf_counter):
        self._runner = runner
        self.restart()
        self._store = store
        self._clock = clock
        self._loads: dict[str, _Load] = {}  # in the order in which they began
        self._on_the_way: deque[_Transfer] = deque()  # in the order in which they were sent; also of loads that ended
        self._writes: deque[tuple[Any, int]] = deque()  # dispatched copies and their bytes, until they were executed
        self._results: dict[str, LoadResult] = {}  # not reported yet: an interrupt may come before

    def restart(self, copies: int = 1) -> None:
        """Send each piece `copies` times from now on, and forget the pace of steps."""
        self.copies = copies
        self.pace = LinkPace(self._runner.link_rate, self._runner.pieces.device_bytes)

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def bytes_on_the_way(self) -> int:
        """Bytes that were sent and are not yet written. A piece of a load that was given up counts until it has arrived."""
        return sum(transfer.piece.nbytes for transfer in self._on_the_way)

    @property
    def bytes_on_device(self) -> int:
        """Device memory that pieces take: those on the way, and those whose write was not yet executed."""
        return self.bytes_on_the_way + sum(size for _, size in self._writes)

    def begin(self, content_hash: str, pages: list[int]) -> None:
        """Start a load. Its pieces wait for the next `send`."""
        self._loads[content_hash] = _Load(content_hash, list(pages), self._store.fetch(content_hash), self._clock())

    def send_beside_step(self) -> None:
        """Send as much as the link moves in a step. Call it after a step's inputs were sent and before its programs."""
        self.pace.dispatched(self._clock())
        self._send(self.pace.step_bytes, self.pace.window)

    def send(self) -> None:
        """Keep the link busy while no step is dispatched whose successor's inputs would wait.

        128 MiB at a time are enough, as every arrival makes room for more. A request that arrives now waits 2 to 5 ms for them.
        """
        self.pace.paused()
        self._send(MIN_TRANSFER_BYTES, MIN_TRANSFER_BYTES)

    def poll(self, wait: bool = False, idle: bool = False) -> list[LoadResult]:
        """Write the pieces that have arrived, and return the loads that ended.

        Args:
            wait: Wait until one has, if any is under way. The device is idle meanwhile.
            idle: No step is in flight, so pieces are sent from here.
        """
        self._advance(wait or idle)
        while wait and self._loads and not self._results:
            self._wait()
            self._advance(send=True)
        results, self._results = self._results, {}
        return list(results.values())

    def cancel(self, content_hash: str) -> None:
        """Cancel a load that `poll` has not returned: no piece of it is written any more."""
        load = self._loads.pop(content_hash, None)
        if load is not None:
            load.ended = True
        self._results.pop(content_hash, None)

    def reset(self) -> None:
        """Cancel all loads, and drop the pieces that were sent or written."""
        for content_hash in list(self._loads):
            self.cancel(content_hash)
        self._results.clear()
        self._on_the_way.clear()
        self._writes.clear()

    def _advance(self, send: bool) -> None:
        """Write, send and end loads. The next call completes one that was interrupted."""
        self._write()
        if send:
            self.send()
        unwritten = {transfer.load.content_hash for transfer in self._on_the_way if not transfer.load.ended}
        for load in list(self._loads.values()):
            if load.unsent is not None and not load.unsent and load.content_hash not in unwritten:
                self._end(load)

    def _write(self) -> None:
        """Dispatch the copies of the pieces that have arrived, in the order of arrival."""
        for transfer in list(self._on_the_way):
            load, size = transfer.load, transfer.piece.nbytes
            try:
                if not transfer.arrived():
                    continue
                if not load.ended:
                    self._writes.append((self._runner.write_adapter(transfer.piece, transfer.pages), size))
            except Exception as error:  # any error is one for the requests that wait for the adapter
                self._end(load, error)
            self._on_the_way.remove(transfer)

    def _send(self, budget: int, window: int) -> None:
        """Send pieces, the oldest load first. A load whose block is still on disk delays no other.

        Args:
            budget: Bytes to send, or one piece where that is more.
            window: Bytes that may be on the way.
        """
        while self._writes and self._writes[0][0].is_ready():
            self._writes.popleft()
        sent = 0
        for load in list(self._loads.values()):
            if load.unsent is None and not load.block.done():
                continue
            try:
                if load.unsent is None:
                    load.unsent = self._assign(load)
                while load.unsent:
                    piece, pages = load.unsent[0]
                    if (sent and sent + piece.nbytes > budget) or not self._has_room(piece.nbytes, window):
                        return
                    self._on_the_way.append(_Transfer(load, self._runner.put(piece), pages))
                    load.unsent.popleft()
                    load.num_bytes += piece.nbytes
                    sent += piece.nbytes
            except Exception as error:  # as above
                self._end(load, error)

    def _has_room(self, size: int, window: int) -> bool:
        """Whether a piece may be sent. One that is larger than all bounds may when it is alone.

        One bound covers the pieces on the way and those whose write waits, as a piece keeps its memory from the one to the
        other. With a bound for each, half of the reserved memory would idle most of the time.
        """
        on_the_way, on_device = self.bytes_on_the_way, self.bytes_on_device
        if on_the_way and on_the_way + size > window:
            return False
        return not on_device or on_device + size <= self._runner.pieces.device_bytes

    def _assign(self, load: _Load) -> deque[tuple[jax.Array | np.ndarray, list[int]]]:
        """Pieces of a load with their pages, each as often as it is sent. Raises the fetch's error where it failed."""
        block, pages = load.block.result(), iter(load.pages)
        if block.num_pages != len(load.pages):
            raise ValueError(f"adapter {load.content_hash[:12]} has {block.num_pages} pages; it was given {len(load.pages)}")
        pieces = [(piece, [next(pages) for _ in range(piece.shape[1])]) for piece in block.pieces]
        return deque(piece for piece in pieces for _ in range(self.copies))

    def _end(self, load: _Load, error: Exception | None = None) -> None:
        if load.ended:
            return
        seconds = self._clock() - load.began
        self._results[load.content_hash] = LoadResult(load.content_hash, error, load.num_bytes, seconds)
        self._loads.pop(load.content_hash, None)
        load.ended = True

    def _wait(self) -> None:
        """Sleep until one more piece has arrived, or a write has made room, or a block is there."""
        if self._on_the_way:
            awaited = self._on_the_way[0].piece
        elif self._writes and any(load.unsent for load in self._loads.values()):
            awaited = self._writes[0][0]
        else:
            futures.wait([load.block for load in self._loads.values()], return_when=futures.FIRST_COMPLETED)
            return
        with contextlib.suppress(Exception):  # `_write` meets the error again, and knows its load
            awaited.block_until_ready()
