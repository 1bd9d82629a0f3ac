"""A link to a device, and a host store, on which everything happens when a test says so."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest

from chameleon_jax.executor import LoadResult
from chameleon_jax.models.adapters.transfers import MIN_TRANSFER_BYTES, PieceSizes, PinnedBlock
from chameleon_jax.models.runtime.adapter_loads import AdapterLoads

LOAD_PAGES = 8
PAGE_BYTES = MIN_TRANSFER_BYTES // 32  # four full pieces on the way to an idle device
PIECE_BYTES = LOAD_PAGES * PAGE_BYTES
SIZES = PieceSizes(PAGE_BYTES, LOAD_PAGES, max_bytes=8 * PIECE_BYTES)
LINK_RATE = 25e9


class Event:
    """What a device array tells of itself. Who blocks on it makes it happen."""

    def __init__(self, piece: np.ndarray | None = None):
        self.piece = piece
        self.nbytes = 0 if piece is None else piece.shape[1] * PAGE_BYTES
        self.happened = False
        self.error: Exception | None = None
        self.blocked = 0

    def is_ready(self) -> bool:
        return self.happened

    def block_until_ready(self) -> None:
        self.blocked += not self.happened
        self.happened = True
        if self.error is not None:
            raise self.error


class Staged(np.ndarray):
    """`[1, pages, 1]`, the adapter's name and the page's number, which claims to be as large as its pages."""

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return self.shape[1] * PAGE_BYTES


class FakeDevice:
    """Transfers wait on `link`, copies in `writes`; `memory` is the pages' content."""

    def __init__(self, pieces: PieceSizes = SIZES, link_rate: float = LINK_RATE):
        self.pieces, self.link_rate = pieces, link_rate
        self.link: list[Event] = []  # all that was ever put, in order
        self.writes: list[Event] = []
        self.memory: dict[int, float] = {}
        self.written: list[float] = []
        self.most_writing = 0
        self.put_error: Exception | None = None

    def put(self, piece: np.ndarray) -> Event:
        if self.put_error is not None:
            raise self.put_error
        self.link.append(Event(piece))
        return self.link[-1]

    def write_adapter(self, event: Event, pages: list[int]) -> Event:
        if not event.happened or event.error is not None:
            pytest.fail("the pool is written from what is not there")  # not an Exception, which would be the load's
        content = np.asarray(event.piece)[0, :, 0].tolist()
        self.memory |= dict(zip(pages, content, strict=True))
        self.written += content
        write = Event(event.piece)
        self.writes.append(write)
        self.most_writing = max(self.most_writing, sum(w.nbytes for w in self.writes if not w.happened))
        return write

    def arrive(self, count: int = 1) -> None:
        for event in [event for event in self.link if not event.happened][:count]:
            event.happened = True

    def run(self) -> None:
        for write in self.writes:
            write.happened = True

    @property
    def held(self) -> int:
        """Bytes of pieces that were sent and whose write was not executed, cancelled loads included."""
        executed = sum(write.nbytes for write in self.writes if write.happened)
        return sum(event.nbytes for event in self.link) - executed


class FakeStore:
    """Adapter i has as many pages as `begin` said, each with i + page / 1000 in it."""

    def __init__(self):
        self.blocks: dict[str, PinnedBlock] = {}
        self.on_disk: dict[str, Future[PinnedBlock]] = {}

    def fetch(self, name: str) -> Future[PinnedBlock]:
        if name in self.on_disk:
            return self.on_disk[name]
        future: Future[PinnedBlock] = Future()
        if name in self.blocks:
            future.set_result(self.blocks[name])
        else:
            future.set_exception(KeyError(name))
        return future


def content(number: int, num_pages: int) -> list[float]:
    return [number + page / 1000 for page in range(num_pages)]


class Bench:
    """Loads over a fake device and a fake store, with pages that are handed out once.

    `begin` and `poll` are what the executor does on an idle device, `step` what it does around a step. `now` is the time.
    """

    def __init__(self, copies: int = 1, pieces: PieceSizes = SIZES, link_rate: float = LINK_RATE):
        self.device, self.store, self.now = FakeDevice(pieces, link_rate), FakeStore(), 1.0
        self.loads = AdapterLoads(self.device, self.store, lambda: self.now)  # type: ignore[arg-type]
        self.loads.copies = copies
        self.pages: dict[str, list[int]] = {}
        self._next = 1

    def begin(self, number: int, num_pages: int) -> str:
        name = self.begin_beside_steps(number, num_pages)
        self.loads.send()
        return name

    def begin_beside_steps(self, number: int, num_pages: int) -> str:
        name = self.stage(number, num_pages)
        self.loads.begin(name, self.pages[name])
        return name

    def stage(self, number: int, num_pages: int) -> str:
        """Puts an adapter into the store, and finds pages for it."""
        name = str(number)
        array = np.array(content(number, num_pages)).reshape(1, -1, 1)
        ends = np.cumsum(self.device.pieces.split(num_pages))
        self.store.blocks[name] = PinnedBlock(tuple(p.view(Staged) for p in np.split(array, ends[:-1], axis=1)))
        self.pages[name] = list(range(self._next, self._next + num_pages))
        self._next += num_pages
        return name

    def poll(self, wait: bool = False) -> list[LoadResult]:
        return self.loads.poll(wait, idle=True)

    def step(self, seconds: float) -> list[LoadResult]:
        """Polls and dispatches a step, `seconds` after the one before."""
        self.now += seconds
        ended = self.loads.poll()
        self.loads.send_beside_step()
        return ended

    def check(self, name: str, number: int) -> None:
        pages = self.pages[name]
        assert [self.device.memory[page] for page in pages] == content(number, len(pages))

    def names(self, results) -> list[str]:
        assert all(result.error is None for result in results)
        return [result.content_hash for result in results]
