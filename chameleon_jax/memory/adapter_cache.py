"""Residency of adapters in the pool. The cache takes pages that KV does not use: it grows into free ones and gives them back.

An adapter that a running request uses is referenced and never leaves; neither does a pinned one. The others are idle. When
pages are needed they leave by the policy's score, adapters of waiting requests last.

Idle adapters and their pages are counted as adapters change state, so asking for room costs the same however many there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from chameleon_jax.memory.adapters import AdapterInfo, AdapterTier
from chameleon_jax.memory.eviction import AdapterUse, make_policy
from chameleon_jax.memory.page_pool import PagePool


@dataclasses.dataclass
class CacheEntry:
    """One registered adapter.

    Attributes:
        pages: Its pages of the pool while LOADING or RESIDENT.
        references: Running requests that use it.
        requests: Unfinished requests that came with it, running or waiting. It is not forgotten while there are any.
        loads: Times it was brought into the pool.
        removed: No name has it any more.
    """

    info: AdapterInfo
    use: AdapterUse
    tier: AdapterTier = AdapterTier.HOST
    pages: list[int] = dataclasses.field(default_factory=list)
    references: int = 0
    requests: int = 0
    loads: int = 0
    pinned: bool = False
    removed: bool = False


@dataclasses.dataclass
class CacheCounters:
    """Counts since the engine started.

    Attributes:
        hits: Requests whose adapter was resident when their turn came.
        misses: Requests whose adapter was not.
        loads: Adapters that were brought into the pool.
        evictions: Adapters that left it for others' pages.
        bytes_loaded: Bytes of the pool that loads filled.
        bytes_sent: Bytes that loads sent to the device.
        load_seconds: Time from the begin of each load until its adapter could be used, summed.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    evictions: int = 0
    bytes_loaded: int = 0
    bytes_sent: int = 0
    load_seconds: float = 0.0


class AdapterCache:
    """Adapters in a `PagePool`, by content hash.

    Args:
        eviction: Name of the policy; see `eviction.POLICIES`.
        on_forget: Told the content hash of an adapter that no name and no request has any more.

    Attributes:
        num_loading: Adapters that are LOADING.
        idle_pages: Pages that eviction can free.
    """

    def __init__(
        self, pool: PagePool, eviction: str = "chameleon", on_forget: Callable[[str], None] = lambda content_hash: None
    ):
        self.pool = pool
        self.counters = CacheCounters()
        self.num_loading = 0
        self._on_forget = on_forget
        self._policy = make_policy(eviction)
        self._entries: dict[str, CacheEntry] = {}
        self._idle: dict[str, CacheEntry] = {}  # resident, not referenced, not pinned
        self.idle_pages = 0
        self._removed: set[str] = set()  # to be forgotten once their requests and loads have ended
        self._pinned: set[str] = set()

    def __contains__(self, content_hash: str) -> bool:
        return content_hash in self._entries

    def entry(self, content_hash: str) -> CacheEntry:
        return self._entries[content_hash]

    def entries(self) -> list[CacheEntry]:
        return list(self._entries.values())

    def add(self, info: AdapterInfo, now: float) -> CacheEntry:
        """Register an adapter, or one that was removed again."""
        entry = self._entries.get(info.content_hash)
        if entry is None:
            entry = self._entries[info.content_hash] = CacheEntry(info, AdapterUse(info.num_pages, info.num_bytes, now))
        entry.removed = False
        self._removed.discard(info.content_hash)
        return entry

    def remove(self, content_hash: str) -> None:
        """Unpin an adapter, and forget it as soon as no request needs it."""
        entry = self._entries[content_hash]
        entry.removed = True
        self._removed.add(content_hash)
        self.pin(content_hash, False)
        self._forget_if_free(entry)

    def pin(self, content_hash: str, pinned: bool = True) -> None:
        """Keep an adapter in the pool once it is resident, or stop to."""
        entry = self._entries[content_hash]
        entry.pinned = pinned
        (self._pinned.add if pinned else self._pinned.discard)(content_hash)
        self._count_idle(entry)

    def pinned_pages(self, *besides: str | None) -> int:
        """Pages that pinned adapters take, or will, `besides` left out."""
        return sum(self._entries[name].info.num_pages for name in self._pinned if name not in besides)

    def add_request(self, content_hash: str) -> None:
        """Keep the adapter for a request that was submitted with it."""
        self._entries[content_hash].requests += 1

    def remove_request(self, content_hash: str) -> None:
        """Release the adapter of a request that has ended."""
        entry = self._entries[content_hash]
        entry.requests -= 1
        self._forget_if_free(entry)

    def acquire(self, content_hash: str, now: float) -> None:
        """Count a running request. Its adapter is resident, or will be before the request's first step."""
        entry = self._entries[content_hash]
        if entry.tier is AdapterTier.HOST:
            raise ValueError(f"adapter {content_hash[:12]} is host, neither loading nor resident")
        entry.references += 1
        entry.use.use(now)
        self._policy.used(entry.use, now)
        self._count_idle(entry)

    def release(self, content_hash: str, now: float) -> None:
        """Drop the reference of a request that stops running. The adapter stays where it is."""
        entry = self._entries[content_hash]
        entry.references -= 1
        entry.use.last_used = now
        self._count_idle(entry)

    def is_idle(self, content_hash: str) -> bool:
        return content_hash in self._idle

    def reserve(self, pages: int, now: float, *, keep: Collection[str] = (), wanted: Collection[str] = ()) -> bool:
        """Evict idle adapters until `pages` pages are free, adapters outside `wanted` first and those in `keep` never.

        Where that would not be enough it evicts nothing and returns False.
        """
        missing = pages - self.pool.num_free
        if missing <= 0:
            return True
        if self.idle_pages < missing:
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
        """Take HOST to LOADING, and return the adapter's pages. Raises OutOfPages where `reserve` was not asked first."""
        entry = self._entries[content_hash]
        if entry.tier is not AdapterTier.HOST:
            raise ValueError(f"adapter {content_hash[:12]} is {entry.tier.value} already")
        entry.pages = self.pool.allocate_adapter(content_hash, entry.info.num_pages)
        entry.tier = AdapterTier.LOADING
        self.num_loading += 1
        return entry.pages

    def finish_load(self, content_hash: str, bytes_sent: int = 0, seconds: float = 0.0) -> None:
        """Take LOADING to RESIDENT."""
        entry = self._entries[content_hash]
        entry.tier = AdapterTier.RESIDENT
        entry.loads += 1
        self._count_idle(entry)
        self.num_loading -= 1
        self.counters.loads += 1
        self.counters.bytes_loaded += entry.info.num_bytes
        self.counters.bytes_sent += bytes_sent
        self.counters.load_seconds += seconds

    def fail_load(self, content_hash: str) -> None:
        """Take LOADING to HOST: the load failed or was cancelled. Its pages are free again."""
        self.num_loading -= 1
        self._to_host(self._entries[content_hash])

    def evict_idle(self, keep: Collection[str] = ()) -> int:
        """Evict every idle adapter but `keep`; return how many left."""
        idle = [entry for content_hash, entry in self._idle.items() if content_hash not in keep]
        for entry in idle:
            self._evict(entry)
        return len(idle)

    def lose(self) -> None:
        """Take every adapter to HOST, as the pool's content is lost. Raises ValueError while one is referenced."""
        for entry in self._entries.values():
            if entry.references:
                raise ValueError(f"adapter {entry.info.content_hash[:12]} has {entry.references} references; allowed: 0")
            if entry.tier is not AdapterTier.HOST:
                self.num_loading -= entry.tier is AdapterTier.LOADING
                self._to_host(entry)

    def _count_idle(self, entry: CacheEntry) -> None:
        """Keep `_idle` true after a change of state."""
        content_hash = entry.info.content_hash
        idle = entry.tier is AdapterTier.RESIDENT and not entry.references and not entry.pinned
        if idle and content_hash not in self._idle:
            self._idle[content_hash] = entry
            self.idle_pages += len(entry.pages)
        elif not idle and content_hash in self._idle:
            del self._idle[content_hash]
            self.idle_pages -= entry.info.num_pages

    def _evict(self, entry: CacheEntry) -> None:
        self._to_host(entry)
        self.counters.evictions += 1

    def _to_host(self, entry: CacheEntry) -> None:
        self.pool.free_adapter(entry.info.content_hash)
        entry.pages, entry.tier = [], AdapterTier.HOST
        self._count_idle(entry)

    def sweep(self) -> None:
        """Forget removed adapters whose load has ended since."""
        for content_hash in list(self._removed):
            self._forget_if_free(self._entries[content_hash])

    def _forget_if_free(self, entry: CacheEntry) -> None:
        """Forget a removed adapter that no request needs; one that is loading waits for `sweep`."""
        if not entry.removed or entry.requests or entry.tier is AdapterTier.LOADING:
            return
        if entry.tier is AdapterTier.RESIDENT:
            self._to_host(entry)
        content_hash = entry.info.content_hash
        del self._entries[content_hash]
        self._removed.discard(content_hash)
        self._on_forget(content_hash)
