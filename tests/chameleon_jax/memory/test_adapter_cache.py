from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterInfo, AdapterTier
from chameleon_jax.memory.page_pool import PagePool
from tests.properties import examples

PAGES = {"a": 2, "b": 3, "c": 5, "d": 6}
CAPACITY = 17
NAMES = st.sampled_from(sorted(PAGES))


def info(name: str, pages: int = 3) -> AdapterInfo:
    return AdapterInfo(name, rank=8, num_pages=pages, num_bytes=pages * 100)


class Cache(RuleBasedStateMachine):
    """Random use, from a pool that may be nearly full, against sets of the names that are registered, pinned and in use."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(CAPACITY + 1)
        self.forgotten: list[str] = []
        self.cache = AdapterCache(self.pool, on_forget=self.forgotten.append)
        self.now = 0.0
        self.known: set[str] = set()
        self.named: set[str] = set()
        self.pinned: set[str] = set()
        self.running: Counter[str] = Counter()
        self.waiting: Counter[str] = Counter()

    @initialize(resident=st.sets(NAMES))
    def start(self, resident):
        for name in PAGES:
            self.add(name)
        for name in resident:
            self.load(name)
            self.end_load(name, fails=False)

    def tier(self, name: str) -> AdapterTier | None:
        """Tier of an adapter that the cache knows."""
        self.now += 1
        return self.cache.entry(name).tier if name in self.cache else None

    def idle(self) -> dict[str, int]:
        """`name -> pages` of the adapters that may be evicted."""
        used = self.pinned | (+self.running).keys()
        return {name: PAGES[name] for name in PAGES if self.tier(name) is AdapterTier.RESIDENT and name not in used}

    @rule(name=NAMES)
    def add(self, name):
        self.cache.add(info(name, PAGES[name]), self.now)
        self.named.add(name)

    @rule(name=NAMES)
    def load(self, name):
        if self.tier(name) is AdapterTier.HOST and self.cache.reserve(PAGES[name], self.now):
            self.cache.begin_load(name)

    @rule(name=NAMES, fails=st.booleans())
    def end_load(self, name, fails):
        if self.tier(name) is AdapterTier.LOADING:
            (self.cache.fail_load if fails and not self.running[name] else self.cache.finish_load)(name)
            self.sweep()

    @rule()
    def sweep(self):
        self.cache.sweep()

    @rule(name=NAMES)
    def submit_request(self, name):
        if name in self.named:
            self.cache.add_request(name)
            self.waiting[name] += 1

    @rule(name=NAMES)
    def start_request(self, name):
        if self.waiting[name] and self.tier(name) in (AdapterTier.RESIDENT, AdapterTier.LOADING):
            self.cache.acquire(name, self.now)
            self.waiting[name] -= 1
            self.running[name] += 1

    @rule(name=NAMES)
    def preempt_request(self, name):
        if self.running[name]:
            self.cache.release(name, self.now)
            self.running[name] -= 1
            self.waiting[name] += 1

    @rule(name=NAMES)
    def end_request(self, name):
        self.preempt_request(name)
        if self.waiting[name]:
            self.cache.remove_request(name)
            self.waiting[name] -= 1

    @rule(name=NAMES)
    def remove(self, name):
        if name in self.cache:
            self.cache.remove(name)
            self.named.discard(name)
            self.pinned.discard(name)

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name, pinned):
        if name in self.named:
            self.cache.pin(name, pinned)
            (self.pinned.add if pinned else self.pinned.discard)(name)

    @rule(pages=st.integers(1, CAPACITY), wanted=st.sets(NAMES), keep=st.sets(NAMES))
    def reserve(self, pages, wanted, keep):
        idle, free = self.idle(), self.pool.num_free
        may_leave = {name: count for name, count in idle.items() if name not in keep}
        before = self.cache.counters.evictions
        ok = self.cache.reserve(pages, self.now, keep=keep, wanted=wanted)
        gone = {name: count for name, count in idle.items() if self.tier(name) is not AdapterTier.RESIDENT}
        assert ok == (free + sum(may_leave.values()) >= pages)
        assert gone.keys() <= may_leave.keys() and self.cache.counters.evictions == before + len(gone)
        assert self.pool.num_free == free + sum(gone.values())
        if gone:  # as few as needed, and a wanted one after all others
            assert ok and pages <= self.pool.num_free < pages + max(gone.values())
            assert not gone.keys() & wanted or may_leave.keys() - wanted <= gone.keys()

    @rule(keep=st.sets(NAMES))
    def evict_idle(self, keep):
        leave = self.idle().keys() - keep
        assert self.cache.evict_idle(keep) == len(leave)
        assert all(self.tier(name) is not AdapterTier.RESIDENT for name in leave)

    @invariant()
    def books_are_true(self):
        entries = {e.info.content_hash: e for e in self.cache.entries()}
        loading = {name for name, e in entries.items() if e.tier is AdapterTier.LOADING}
        assert entries.keys() >= self.named | (+self.running).keys() | (+self.waiting).keys()
        assert entries.keys() - self.named - (+self.running).keys() - (+self.waiting).keys() <= loading
        assert sorted(self.forgotten) == sorted(self.known - entries.keys())
        self.forgotten.clear()
        self.known = set(entries)
        idle = self.idle()
        assert {name for name in PAGES if self.cache.is_idle(name)} == idle.keys()
        assert self.cache.idle_pages == sum(idle.values()) and self.cache.num_loading == len(loading)
        assert {name for name, entry in entries.items() if entry.pinned} == self.pinned
        assert self.cache.pinned_pages("a") == sum(PAGES[name] for name in self.pinned - {"a"})
        owned = {name: len(entry.pages) for name, entry in entries.items()}
        assert owned == {name: 0 if e.tier is AdapterTier.HOST else PAGES[name] for name, e in entries.items()}
        assert sum(owned.values()) + self.pool.num_free == self.pool.capacity


Cache.TestCase.settings = examples(80, stateful_step_count=60)
TestCache = Cache.TestCase


def resident(cache: AdapterCache, *names: str) -> None:
    for now, name in enumerate(names):
        cache.add(info(name), now)
        cache.begin_load(name)
        cache.finish_load(name)
        cache.acquire(name, now)
        cache.release(name, now)


def test_the_least_recently_used_leaves_first_and_the_wanted_last():
    cache = AdapterCache(PagePool(10), "lru")
    resident(cache, "a", "b", "c")
    assert cache.reserve(3, 10.0, wanted={"a"})
    assert [e.tier for e in cache.entries()] == [AdapterTier.RESIDENT, AdapterTier.HOST, AdapterTier.RESIDENT]
    assert not cache.reserve(7, 10.0, keep={"a"})
    assert cache.reserve(6, 10.0, wanted={"a"})
    assert cache.entry("a").tier is AdapterTier.RESIDENT
    assert cache.reserve(9, 10.0, wanted={"a"}) and cache.counters.evictions == 3
    resident(cache, "a")
    assert [e.loads for e in cache.entries()] == [2, 1, 1] and cache.counters.loads == 4


def test_states_that_do_not_follow_are_refused():
    cache = AdapterCache(PagePool(10), "lru")
    cache.add(info("a"), 0.0)
    with pytest.raises(ValueError, match="is host, neither"):
        cache.acquire("a", 0.0)
    cache.begin_load("a")
    with pytest.raises(ValueError, match="is loading already"):
        cache.begin_load("a")
    with pytest.raises(ValueError, match="eviction is 'random'; allowed: lru"):
        AdapterCache(PagePool(10), "random")


def test_an_adapter_that_gets_a_name_again_stays_when_its_requests_end():
    forgotten: list[str] = []
    cache = AdapterCache(PagePool(10), on_forget=forgotten.append)
    cache.add(info("a"), 0.0)
    cache.add_request("a")
    cache.remove("a")
    cache.add(info("a"), 1.0)
    cache.remove_request("a")
    assert "a" in cache and forgotten == []
    cache.remove("a")
    assert "a" not in cache and forgotten == ["a"]


def test_a_pool_s_content_is_lost_only_when_no_request_uses_it():
    cache = AdapterCache(PagePool(10))
    resident(cache, "a")
    cache.add(info("b"), 1.0)
    cache.begin_load("b")
    cache.acquire("a", 1.0)
    with pytest.raises(ValueError, match="adapter a has 1 references; allowed: 0"):
        cache.lose()
    cache.release("a", 2.0)
    cache.lose()
    assert [e.tier for e in cache.entries()] == [AdapterTier.HOST] * 2 and cache.pool.num_free == cache.pool.capacity
    assert cache.num_loading == cache.idle_pages == 0


def test_the_policy_learns_of_uses_and_of_evictions():
    """GDSF: an adapter counts from the uses of the adapter that was evicted before it."""
    cache = AdapterCache(PagePool(10), "gdsf")

    def use(name: str) -> None:
        cache.acquire(name, 10.0)
        cache.release(name, 10.0)

    resident(cache, "a", "b")
    for name in ("a", "a", "b"):
        use(name)
    assert cache.reserve(6, 20.0) and cache.is_idle("a") and not cache.is_idle("b")
    resident(cache, "c")
    use("c")
    assert cache.reserve(6, 20.0) and cache.is_idle("c") and not cache.is_idle("a")  # 3 uses, against 2 and 2


def test_what_runs_long_is_not_taken_for_what_is_used_often():
    cache = AdapterCache(PagePool(10))
    resident(cache, "long", "often")
    cache.acquire("long", 10.0)
    for now in range(10, 1210, 200):
        cache.acquire("often", float(now))
        cache.release("often", now + 1.0)
    cache.release("long", 1210.0)
    rates = [entry.use.rate(1210.0) for entry in cache.entries()]
    assert rates[0] < rates[1]
