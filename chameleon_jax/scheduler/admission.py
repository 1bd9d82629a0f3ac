"""Requests that start together. The batch first computes the pages that they need; only then are adapters evicted."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterTier
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


@dataclasses.dataclass(eq=False)
class AdmissionBatch:
    """Requests that start in one step, and the adapters loaded for them.

    The batch grows while everything in it fits the pool together.

    Attributes:
        cache: adapters in the pool, some of which can be evicted.
        slots: requests that may start.
        prompt_room: prompt work that the next step still has room for, in tokens or seconds. The request that uses it up is the
            last to start, so that everything started is computed next and the order of the others stays open.
        prompt_of: work of a request's prompt, in the unit of `prompt_room`.
        overlap_loads: True starts a request once its adapter is resident. False starts it at once, and its step waits for the
            load.
        starts: requests that start.
        await_adapters: requests whose turn came before their adapter was resident.
        loads: content hashes of adapters that start to load.
        lacks_memory: whether a request that could start did not fit.
        pages: pages that must be free when the batch starts.
        keep: content hashes of idle adapters that the batch uses, so that they must not be evicted for it.
    """

    cache: AdapterCache
    slots: int
    prompt_room: float
    prompt_of: Callable[[Request], float]
    overlap_loads: bool
    starts: list[Request] = dataclasses.field(default_factory=list)
    await_adapters: list[Request] = dataclasses.field(default_factory=list)
    loads: list[str] = dataclasses.field(default_factory=list)
    lacks_memory: bool = False
    pages: int = 0
    keep: set[str] = dataclasses.field(default_factory=set)
    _kept_pages: int = 0
    _held_pages: int = 0  # for the tokens of the first request that waits for its adapter

    def room(self) -> int:
        """Pages that are free or can be freed beyond those the batch needs."""
        return self.cache.pool.num_free + self.cache.idle_pages - self._kept_pages - self.pages - self._held_pages

    def try_admit(self, request: Request, kv_pages: int) -> Verdict:
        """Add a request to the batch if it fits.

        Args:
            request: a waiting request.
            kv_pages: pages for its tokens.
        """
        if len(self.starts) >= self.slots or self.prompt_room <= 0:
            return Verdict.FULL
        if request.num_in_flight:
            return Verdict.WAITS
        adapter = request.adapter
        if adapter is None:
            return self._start(request, kv_pages)
        entry = self.cache.entry(adapter)
        resident = entry.tier is AdapterTier.RESIDENT
        if request.metrics.adapter_was_resident is None:
            request.metrics.adapter_was_resident = resident
        load_pages = entry.info.num_pages if entry.tier is AdapterTier.HOST and adapter not in self.loads else 0
        if self.overlap_loads and not resident:
            return self._await_load(request, adapter, load_pages, kv_pages)
        kept_pages = entry.info.num_pages if self.cache.is_idle(adapter) and adapter not in self.keep else 0
        return self._start(request, kv_pages, load_pages, kept_pages)

    def _start(self, request: Request, kv_pages: int, load_pages: int = 0, kept_pages: int = 0) -> Verdict:
        if kv_pages + load_pages + kept_pages > self.room():
            return self._refuse(load_pages, kv_pages)
        if request.adapter is not None:
            if load_pages:
                self.loads.append(request.adapter)
            if kept_pages:
                self.keep.add(request.adapter)
        self._kept_pages += kept_pages
        self.pages += kv_pages + load_pages
        self.prompt_room -= self.prompt_of(request)
        self.starts.append(request)
        return Verdict.STARTS

    def _await_load(self, request: Request, adapter: str, load_pages: int, kv_pages: int) -> Verdict:
        """Let a request wait for its adapter; the first such keeps the pages it will start with from those that pass it."""
        held_pages = 0 if self._held_pages else kv_pages
        if load_pages + held_pages > self.room():
            return self._refuse(load_pages, held_pages)
        self._held_pages += held_pages
        self.await_adapters.append(request)
        if load_pages and self.cache.num_loading + len(self.loads) < MAX_LOADS:
            self.pages += load_pages
            self.loads.append(adapter)
        return Verdict.WAITS

    def _refuse(self, load_pages: int, kv_pages: int) -> Verdict:
        self.lacks_memory = True
        return Verdict.NO_ADAPTER_MEMORY if load_pages and kv_pages <= self.room() else Verdict.NO_MEMORY
