"""Which requests fit the pool together. Asks what they need exactly, and evicts only once that is known."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from typing import Protocol

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.request import Request

MAX_LOADS = 4
"""Adapter transfers under way at once."""


class Verdict(enum.Enum):
    """What became of an offer."""

    STARTS = enum.auto()
    WAITS = enum.auto()  # for its adapter, or for tokens of it that are in flight; others may pass
    NO_ADAPTER_MEMORY = enum.auto()  # its tokens fit, its adapter does not
    NO_MEMORY = enum.auto()
    FULL = enum.auto()  # no slot, or the next step has prompts enough


class Batch:
    """The requests that start in this step, and the adapters that are loaded for them. Grows while everything in it fits
    together.

    Attributes:
        starts: requests that start.
        await_adapters: requests whose turn it was, but for their adapter.
        loads: adapters that are loaded.
        lacks_memory: whether a request that could start did not fit.

    Args:
        slots: requests that may start.
        prompt_room: what the next step can prefill beside what has started, in tokens or seconds; the request that uses it up
            is the last, so that what has started is what is computed next and the order of the others is still open.
        prompt_of: what a request takes of it.
        overlap_loads: a request starts when its adapter is there; otherwise it starts at once and its step waits for the load.
    """

    def __init__(
        self,
        pool: PagePool,
        cache: AdapterCache,
        slots: int,
        prompt_room: float,
        prompt_of: Callable[[Request], float],
        overlap_loads: bool,
    ):
        self.starts: list[Request] = []
        self.await_adapters: list[Request] = []
        self.loads: list[str] = []
        self.lacks_memory = False
        self._pool = pool
        self._cache = cache
        self._slots = slots
        self._prompt_room = prompt_room
        self._prompt_of = prompt_of
        self._overlap_loads = overlap_loads
        self._pages = 0
        self._kept: set[str] = set()  # idle adapters that it uses
        self._kept_pages = 0
        self._held = 0  # pages for the tokens of one that waits for its adapter

    @property
    def pages(self) -> int:
        """Pages that have to be free when it is committed."""
        return self._pages

    @property
    def keep(self) -> Collection[str]:
        return self._kept

    def room(self) -> int:
        """Pages that are free or can be freed beyond what the batch needs."""
        return self._pool.num_free + self._cache.idle_pages - self._kept_pages - self._pages - self._held

    def offer(self, request: Request, kv_pages: int) -> Verdict:
        """Takes the request in where it fits."""
        if len(self.starts) >= self._slots or self._prompt_room <= 0:
            return Verdict.FULL
        if request.num_in_flight:
            return Verdict.WAITS
        adapter, load_pages, kept_pages = request.adapter, 0, 0
        if adapter is not None:
            entry = self._cache.entry(adapter)
            there = entry.tier is AdapterTier.RESIDENT
            if request.metrics.adapter_was_resident is None:
                request.metrics.adapter_was_resident = there
            absent = entry.tier is AdapterTier.HOST and adapter not in self.loads
            if self._overlap_loads and not there:
                return self._wait_for_load(request, adapter, entry.info.num_pages if absent else 0, kv_pages)
            load_pages = entry.info.num_pages if absent else 0
            if self._cache.is_idle(adapter) and adapter not in self._kept:
                kept_pages = entry.info.num_pages
        room = self.room()
        if kv_pages + load_pages + kept_pages > room:
            self.lacks_memory = True
            return Verdict.NO_ADAPTER_MEMORY if load_pages and kv_pages <= room else Verdict.NO_MEMORY
        if adapter is not None:
            if load_pages:
                self.loads.append(adapter)
            if kept_pages:
                self._kept.add(adapter)
        self._kept_pages += kept_pages
        self._pages += kv_pages + load_pages
        self._prompt_room -= self._prompt_of(request)
        self.starts.append(request)
        return Verdict.STARTS

    def _wait_for_load(self, request: Request, adapter: str, load_pages: int, kv_pages: int) -> Verdict:
        """The first that waits for its adapter keeps the pages it will start with from those who pass it."""
        held = 0 if self._held else kv_pages
        if load_pages + held > self.room():
            self.lacks_memory = True
            return Verdict.NO_ADAPTER_MEMORY if held <= self.room() else Verdict.NO_MEMORY
        self._held += held
        self.await_adapters.append(request)
        if load_pages and self._cache.num_loading + len(self.loads) < MAX_LOADS:
            self._pages += load_pages
            self.loads.append(adapter)
        return Verdict.WAITS


class QueuePolicy(Protocol):
    """Owns the waiting requests, and says which start next."""

    def add(self, request: Request, now: float, new: bool = True) -> None:
        """A request waits: it is new, or was squashed or measured anew. Its `predicted_output_len` and `size` are set."""

    def remove(self, request: Request) -> None:
        """A waiting request went away."""

    def admit(self, batch: Batch, running: Collection[Request], now: float) -> None:
        """Offers requests to the batch, best first, and forgets those that start."""

    def ended(self, request: Request, now: float) -> None:
        """A request that had started ended, or was squashed."""

    def victim(self, room: int) -> Request | None:
        """A running request that has to go so that one which waits longer can start; `room` pages are free or can be freed."""

    def upcoming(self, count: int) -> list[Request]:
        """Waiting requests in the order in which they will likely start."""
