"""Which adapters are in the pool. The cache is whatever memory KV does not use: it grows into free pages and gives them back.

An adapter that a request runs with is referenced and never leaves; a pinned one neither. The others are idle and leave, by
the policy's score, when somebody needs their pages; those that a waiting request wants leave last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from chameleon_jax.adapters import AdapterInfo, AdapterTier
from chameleon_jax.eviction import POLICIES, AdapterUse
from chameleon_jax.page_pool import PagePool


@dataclasses.dataclass
class CacheEntry:
    """One known adapter.

    Attributes:
        pages: where it lies while LOADING or RESIDENT.
        references: running requests that use it.
        holders: requests, waiting or running, that will need its weights; it cannot be forgotten while there are any.
    """

    info: AdapterInfo
    use: AdapterUse
    tier: AdapterTier = AdapterTier.HOST
    pages: list[int] = dataclasses.field(default_factory=list)
    references: int = 0
    holders: int = 0
    pinned: bool = False
    removed: bool = False


@dataclasses.dataclass
class CacheCounters:
    """Since the engine started: admissions that found their adapter resident or not, loads, evictions, bytes loaded."""

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    bytes_loaded: int = 0


class AdapterCache:
    """Residency of adapters in a `PagePool`."""

    def __init__(self, pool: PagePool, policy: str = "lru"):
        if policy not in POLICIES:
            raise ValueError(f"eviction_policy is {policy!r}; allowed: {', '.join(POLICIES)}")
        self.pool = pool
        self.counters = CacheCounters()
        self.loads_by_adapter: dict[str, int] = {}
        self.num_loading = 0
        self._policy = POLICIES[policy]
        self._entries: dict[str, CacheEntry] = {}

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._entries

    def entry(self, content_hash: str) -> CacheEntry:
        return self._entries[content_hash]

    def entries(self) -> list[CacheEntry]:
        return list(self._entries.values())

    def add(self, info: AdapterInfo, now: float) -> CacheEntry:
        """Makes an adapter known, or one that was removed known again."""
        entry = self._entries.setdefault(info.content_hash, CacheEntry(info, AdapterUse(info.num_pages, now)))
        entry.removed = False
        return entry

    def remove(self, content_hash: str) -> list[str]:
        """Forgets an adapter as soon as no request needs it. Returns the hashes that are forgotten now."""
        entry = self._entries[content_hash]
        entry.removed, entry.pinned = True, False
        return self._forget_if_free(entry)

    def hold(self, content_hash: str) -> None:
        """A request that will need the adapter was submitted."""
        self._entries[content_hash].holders += 1

    def unhold(self, content_hash: str) -> list[str]:
        """That request ended. Returns the hashes that are forgotten now."""
        entry = self._entries[content_hash]
        entry.holders -= 1
        return self._forget_if_free(entry)

    def acquire(self, content_hash: str, now: float) -> None:
        """A request starts running with a resident adapter."""
        entry = self._entries[content_hash]
        if entry.tier is not AdapterTier.RESIDENT:
            raise ValueError(f"adapter {content_hash[:12]} is {entry.tier.value}, not resident")
        entry.references += 1
        entry.use.last_used, entry.use.uses = now, entry.use.uses + 1

    def release(self, content_hash: str, now: float) -> None:
        """That request stopped running. The adapter stays where it is."""
        entry = self._entries[content_hash]
        entry.references -= 1
        entry.use.last_used = now

    def reclaimable(self, wanted: Collection[str] | None = None) -> int:
        """Pages that eviction can free; with `wanted`, those of adapters outside it."""
        return sum(len(e.pages) for e in self._entries.values() if self._idle(e) and e.info.content_hash not in (wanted or ()))

    def can_reserve(self, pages: int) -> bool:
        """Whether `reserve` would find that many."""
        return pages <= self.pool.num_free or pages <= self.pool.num_free + self.reclaimable()

    def reserve(self, pages: int, now: float, *, keep: Collection[str] = (), wanted: Collection[str] = ()) -> bool:
        """Evicts idle adapters until `pages` pages are free, those outside `wanted` first and those in `keep` never.

        Evicts nothing and returns False where that would not be enough.
        """
        missing = pages - self.pool.num_free
        if missing <= 0:
            return True
        idle = [e for e in self._entries.values() if self._idle(e) and e.info.content_hash not in keep]
        if sum(len(e.pages) for e in idle) < missing:
            return False
        idle.sort(key=lambda e: (e.info.content_hash in wanted, self._policy(e.use, now)))
        for entry in idle:
            if missing <= 0:
                break
            missing -= len(entry.pages)
            self._evict(entry)
        return True

    def begin_load(self, content_hash: str) -> list[int]:
        """HOST -> LOADING: gives the adapter its pages. Raises OutOfPages where `reserve` was not asked first."""
        entry = self._entries[content_hash]
        if entry.tier is not AdapterTier.HOST:
            raise ValueError(f"adapter {content_hash[:12]} is {entry.tier.value} already")
        entry.pages = self.pool.allocate_adapter(content_hash, entry.info.num_pages)
        entry.tier = AdapterTier.LOADING
        self.num_loading += 1
        return entry.pages

    def finish_load(self, content_hash: str) -> None:
        """LOADING -> RESIDENT."""
        entry = self._entries[content_hash]
        entry.tier = AdapterTier.RESIDENT
        self.num_loading -= 1
        self.counters.loads += 1
        self.counters.bytes_loaded += entry.info.num_bytes
        self.loads_by_adapter[content_hash] = self.loads_by_adapter.get(content_hash, 0) + 1

    def fail_load(self, content_hash: str) -> None:
        """LOADING -> HOST: the weights could not be had; the pages are free again."""
        self.num_loading -= 1
        self._to_host(self._entries[content_hash])

    def evict_idle(self) -> int:
        """Empties the cache of what nobody uses; returns how many left."""
        idle = [e for e in self._entries.values() if self._idle(e)]
        for entry in idle:
            self._evict(entry)
        return len(idle)

    def _idle(self, entry: CacheEntry) -> bool:
        return entry.tier is AdapterTier.RESIDENT and entry.references == 0 and not entry.pinned

    def _evict(self, entry: CacheEntry) -> None:
        self._to_host(entry)
        self.counters.evictions += 1

    def _to_host(self, entry: CacheEntry) -> None:
        self.pool.free_adapter(entry.info.content_hash)
        entry.pages, entry.tier = [], AdapterTier.HOST

    def _forget_if_free(self, entry: CacheEntry) -> list[str]:
        """A removed adapter that nobody holds goes, pages and all; one that is loading goes when the load is done."""
        if not entry.removed or entry.holders or entry.tier is AdapterTier.LOADING:
            return []
        if entry.tier is AdapterTier.RESIDENT:
            self._to_host(entry)
        del self._entries[entry.info.content_hash]
        return [entry.info.content_hash]

    def sweep(self) -> list[str]:
        """Forgets removed adapters whose load has ended since; returns their hashes."""
        return [gone for entry in list(self._entries.values()) for gone in self._forget_if_free(entry)]
