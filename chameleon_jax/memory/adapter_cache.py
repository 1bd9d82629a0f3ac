"""Which adapters are in the pool. The cache is whatever memory KV does not use: it grows into free pages and gives them back.

An adapter that a request runs with is referenced and never leaves; a pinned one neither. The others are idle and leave, by
the policy's score, when somebody needs their pages; those that a waiting request wants leave last.

The idle ones and their pages are counted as adapters change state, so that asking for room costs the same however many there
are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from chameleon_jax.memory.adapters import AdapterInfo, AdapterTier
from chameleon_jax.memory.eviction import AdapterUse, make_policy
from chameleon_jax.memory.page_pool import PagePool


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

    def __init__(self, pool: PagePool, eviction: str = "chameleon"):
        self.pool = pool
        self.counters = CacheCounters()
        self.loads_by_adapter: dict[str, int] = {}
        self.num_loading = 0
        self._policy = make_policy(eviction)
        self._entries: dict[str, CacheEntry] = {}
        self._idle: dict[str, CacheEntry] = {}  # resident, not referenced, not pinned
        self._idle_pages = 0
        self._removed: set[str] = set()  # those that are to be forgotten
        self._pinned: set[str] = set()

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._entries

    def entry(self, content_hash: str) -> CacheEntry:
        return self._entries[content_hash]

    def entries(self) -> list[CacheEntry]:
        return list(self._entries.values())

    def add(self, info: AdapterInfo, now: float) -> CacheEntry:
        """Makes an adapter known, or one that was removed known again."""
        entry = self._entries.get(info.content_hash)
        if entry is None:
            entry = self._entries[info.content_hash] = CacheEntry(info, AdapterUse(info.num_pages, info.num_bytes, now))
        entry.removed = False
        self._removed.discard(info.content_hash)
        return entry

    def remove(self, content_hash: str) -> list[str]:
        """Forgets an adapter as soon as no request needs it. Returns the hashes that are forgotten now."""
        entry = self._entries[content_hash]
        entry.removed = True
        self._removed.add(content_hash)
        self.pin(content_hash, False)
        return self._forget_if_free(entry)

    def pin(self, content_hash: str, pinned: bool = True) -> None:
        """A pinned adapter does not leave once it is resident."""
        entry = self._entries[content_hash]
        entry.pinned = pinned
        (self._pinned.add if pinned else self._pinned.discard)(content_hash)
        self._count_idle(entry)

    def pinned_pages(self, *besides: str | None) -> int:
        """Pages that pinned adapters take, or will, `besides` excepted."""
        return sum(self._entries[name].info.num_pages for name in self._pinned if name not in besides)

    def hold(self, content_hash: str) -> None:
        """A request that will need the adapter was submitted."""
        self._entries[content_hash].holders += 1

    def unhold(self, content_hash: str) -> list[str]:
        """That request ended. Returns the hashes that are forgotten now."""
        entry = self._entries[content_hash]
        entry.holders -= 1
        return self._forget_if_free(entry)

    def acquire(self, content_hash: str, now: float) -> None:
        """A request starts running with an adapter that is resident, or will be before the request's first step."""
        entry = self._entries[content_hash]
        if entry.tier is AdapterTier.HOST:
            raise ValueError(f"adapter {content_hash[:12]} is host, neither loading nor resident")
        entry.references += 1
        entry.use.use(now)
        self._policy.used(entry.use, now)
        self._count_idle(entry)

    def release(self, content_hash: str, now: float) -> None:
        """That request stopped running. The adapter stays where it is."""
        entry = self._entries[content_hash]
        entry.references -= 1
        entry.use.last_used = now
        self._count_idle(entry)

    @property
    def idle_pages(self) -> int:
        """Pages that eviction can free."""
        return self._idle_pages

    def is_idle(self, content_hash: str) -> bool:
        return content_hash in self._idle

    def reserve(self, pages: int, now: float, *, keep: Collection[str] = (), wanted: Collection[str] = ()) -> bool:
        """Evicts idle adapters until `pages` pages are free, those outside `wanted` first and those in `keep` never.

        Evicts nothing and returns False where that would not be enough.
        """
        missing = pages - self.pool.num_free
        if missing <= 0:
            return True
        if self._idle_pages < missing:
            return False
        idle = [entry for content_hash, entry in self._idle.items() if content_hash not in keep]
        if sum(len(entry.pages) for entry in idle) < missing:
            return False
        scores = self._policy.scores([entry.use for entry in idle], now)
        order = sorted(range(len(idle)), key=lambda i: (idle[i].info.content_hash in wanted, scores[i]))
        for i in order:
            if missing <= 0:
                break
            missing -= len(idle[i].pages)
            self._evict(idle[i])
            self._policy.evicted(scores[i])
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
        self._count_idle(entry)
        self.num_loading -= 1
        self.counters.loads += 1
        self.counters.bytes_loaded += entry.info.num_bytes
        self.loads_by_adapter[content_hash] = self.loads_by_adapter.get(content_hash, 0) + 1

    def fail_load(self, content_hash: str) -> None:
        """LOADING -> HOST: the weights could not be had or nobody wants them any more; the pages are free again."""
        self.num_loading -= 1
        self._to_host(self._entries[content_hash])

    def evict_idle(self, keep: Collection[str] = ()) -> int:
        """Empties the cache of what nobody uses, `keep` excepted; returns how many left."""
        idle = [entry for content_hash, entry in self._idle.items() if content_hash not in keep]
        for entry in idle:
            self._evict(entry)
        return len(idle)

    def lose(self) -> None:
        """The pool's content is lost and nothing refers to it: every adapter is on the host again."""
        for entry in self._entries.values():
            if entry.references:
                raise ValueError(f"adapter {entry.info.content_hash[:12]} has {entry.references} references; allowed: 0")
            if entry.tier is not AdapterTier.HOST:
                self.num_loading -= entry.tier is AdapterTier.LOADING
                self._to_host(entry)

    def _count_idle(self, entry: CacheEntry) -> None:
        """Keeps `_idle` true after a change of state."""
        content_hash = entry.info.content_hash
        idle = entry.tier is AdapterTier.RESIDENT and not entry.references and not entry.pinned
        if idle and content_hash not in self._idle:
            self._idle[content_hash] = entry
            self._idle_pages += len(entry.pages)
        elif not idle and content_hash in self._idle:
            del self._idle[content_hash]
            self._idle_pages -= entry.info.num_pages

    def _evict(self, entry: CacheEntry) -> None:
        self._to_host(entry)
        self.counters.evictions += 1

    def _to_host(self, entry: CacheEntry) -> None:
        self.pool.free_adapter(entry.info.content_hash)
        entry.pages, entry.tier = [], AdapterTier.HOST
        self._count_idle(entry)

    def _forget_if_free(self, entry: CacheEntry) -> list[str]:
        """A removed adapter that nobody holds goes, pages and all; one that is loading goes when the load is done."""
        if not entry.removed or entry.holders or entry.tier is AdapterTier.LOADING:
            return []
        if entry.tier is AdapterTier.RESIDENT:
            self._to_host(entry)
        del self._entries[entry.info.content_hash]
        self._removed.discard(entry.info.content_hash)
        self.loads_by_adapter.pop(entry.info.content_hash, None)
        return [entry.info.content_hash]

    def sweep(self) -> list[str]:
        """Forgets removed adapters whose load has ended since; returns their hashes."""
        return [gone for name in list(self._removed) for gone in self._forget_if_free(self._entries[name])]
