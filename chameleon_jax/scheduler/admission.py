"""Requests that start together. The batch first computes the pages that they need; only then are adapters evicted."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.request import Request

MAX_LOADS = 4
"""Adapter transfers under way at once."""


class Verdict(enum.Enum):
    """Answer of a batch to one request."""

    STARTS = enum.auto()
    WAITS = enum.auto()  # for its adapter, or for its own tokens in flight; others may pass
    NO_ADAPTER_MEMORY = enum.auto()  # its tokens fit, its adapter does not
    NO_MEMORY = enum.auto()
    FULL = enum.auto()  # no slot, or the next step has prompts enough


class AdmissionBatch:
    """Requests that start in one step, and the adapters loaded for them.

    The batch grows while everything in it fits the pool together.

    Attributes:
        starts: requests that start.
        await_adapters: requests whose turn came before their adapter was resident.
        loads: content hashes of adapters that start to load.
        lacks_memory: whether a request that could start did not fit.

    Args:
        pool: free pages.
        cache: adapters in the pool, some of which can be evicted.
        slots: requests that may start.
        prompt_room: prompt work that the next step has room for, in tokens or seconds. The request that uses it up is the
            last to start, so that everything started is computed next and the order of the others stays open.
        prompt_of: work of a request's prompt, in the unit of `prompt_room`.
        overlap_loads: True starts a request once its adapter is resident. False starts it at once, and its step waits for the
            load.
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
        self._kept: set[str] = set()  # idle adapters that the batch uses
        self._kept_pages = 0
        self._held_pages = 0  # for the tokens of the first request that waits for its adapter

    @property
    def pages(self) -> int:
        """Pages that must be free when the batch starts."""
        return self._pages

    @property
    def keep(self) -> Collection[str]:
        """Content hashes of idle adapters that must not be evicted for the batch."""
        return self._kept

    def room(self) -> int:
        """Pages that are free or can be freed beyond those the batch needs."""
        return self._pool.num_free + self._cache.idle_pages - self._kept_pages - self._pages - self._held_pages

    def try_admit(self, request: Request, kv_pages: int) -> Verdict:
        """Add a request to the batch if it fits.

        Args:
            request: a waiting request.
            kv_pages: pages for its tokens.
        """
        if len(self.starts) >= self._slots or self._prompt_room <= 0:
            return Verdict.FULL
        if request.num_in_flight:
            return Verdict.WAITS
        adapter = request.adapter
        if adapter is None:
            return self._start(request, kv_pages)
        entry = self._cache.entry(adapter)
        resident = entry.tier is AdapterTier.RESIDENT
        if request.metrics.adapter_was_resident is None:
            request.metrics.adapter_was_resident = resident
        load_pages = entry.info.num_pages if entry.tier is AdapterTier.HOST and adapter not in self.loads else 0
        if self._overlap_loads and not resident:
            return self._await_load(request, adapter, load_pages, kv_pages)
        kept_pages = entry.info.num_pages if self._cache.is_idle(adapter) and adapter not in self._kept else 0
        return self._start(request, kv_pages, load_pages, kept_pages)

    def _start(self, request: Request, kv_pages: int, load_pages: int = 0, kept_pages: int = 0) -> Verdict:
        if kv_pages + load_pages + kept_pages > self.room():
            return self._refuse(load_pages, kv_pages)
        if request.adapter is not None:
            if load_pages:
                self.loads.append(request.adapter)
            if kept_pages:
                self._kept.add(request.adapter)
        self._kept_pages += kept_pages
        self._pages += kv_pages + load_pages
        self._prompt_room -= self._prompt_of(request)
        self.starts.append(request)
        return Verdict.STARTS

    def _await_load(self, request: Request, adapter: str, load_pages: int, kv_pages: int) -> Verdict:
        """Let a request wait for its adapter; the first such keeps the pages it will start with from those that pass it."""
        held_pages = 0 if self._held_pages else kv_pages
        if load_pages + held_pages > self.room():
            return self._refuse(load_pages, held_pages)
        self._held_pages += held_pages
        self.await_adapters.append(request)
        if load_pages and self._cache.num_loading + len(self.loads) < MAX_LOADS:
            self._pages += load_pages
            self.loads.append(adapter)
        return Verdict.WAITS

    def _refuse(self, load_pages: int, kv_pages: int) -> Verdict:
        self.lacks_memory = True
        return Verdict.NO_ADAPTER_MEMORY if load_pages and kv_pages <= self.room() else Verdict.NO_MEMORY
