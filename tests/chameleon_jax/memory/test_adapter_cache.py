from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.adapters import AdapterInfo, AdapterTier
from chameleon_jax.memory.page_pool import PagePool

NAMES = st.sampled_from("abcdef")


def info(name: str, pages: int = 3) -> AdapterInfo:
    return AdapterInfo(name, rank=8, num_pages=pages, num_bytes=pages * 100)


class Cache(RuleBasedStateMachine):
    """Random use; what is in use must never lose its pages."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(24)
        self.cache = AdapterCache(self.pool)
        self.now = 0.0

    def known(self, name):
        self.now += 1
        return name in self.cache

    @rule(name=NAMES)
    def add(self, name):
        self.cache.add(info(name, 1 + ord(name) % 6), self.now)

    @rule(name=NAMES)
    def load(self, name):
        if self.known(name) and self.cache.entry(name).tier is AdapterTier.HOST:
            if self.cache.reserve(self.cache.entry(name).info.num_pages, self.now):
                self.cache.begin_load(name)

    @rule(name=NAMES, fails=st.booleans())
    def end_load(self, name, fails):
        if self.known(name) and self.cache.entry(name).tier is AdapterTier.LOADING:
            (self.cache.fail_load if fails else self.cache.finish_load)(name)

    @rule(name=NAMES)
    def start_request(self, name):
        if self.known(name) and self.cache.entry(name).tier is AdapterTier.RESIDENT:
            self.cache.add_request(name)
            self.cache.acquire(name, self.now)

    @rule(name=NAMES)
    def end_request(self, name):
        if self.known(name) and self.cache.entry(name).references:
            self.cache.release(name, self.now)
            self.cache.remove_request(name)

    @rule(name=NAMES)
    def remove(self, name):
        if self.known(name):
            self.cache.remove(name)

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name, pinned):
        if self.known(name):
            self.cache.pin(name, pinned)

    @rule(pages=st.integers(1, 23), wanted=st.sets(NAMES), keep=st.sets(NAMES))
    def reserve(self, pages, wanted, keep):
        entries = self.cache.entries()
        safe = {e.info.content_hash: list(e.pages) for e in entries if e.references or e.pinned or e.info.content_hash in keep}
        safe |= {e.info.content_hash: list(e.pages) for e in entries if e.tier is AdapterTier.LOADING}
        unwanted = [e for e in entries if self.cache.is_idle(e.info.content_hash) and e.info.content_hash not in wanted | keep]
        enough = self.pool.num_free + sum(len(e.pages) for e in unwanted) >= pages
        before = {e.info.content_hash: e.tier for e in entries}
        ok = self.cache.reserve(pages, self.now, keep=keep, wanted=wanted)
        for name, kept in safe.items():
            assert self.cache.entry(name).pages == kept
        if ok:
            assert self.pool.num_free >= pages
        else:
            assert before == {e.info.content_hash: e.tier for e in self.cache.entries()}
        if enough:
            assert ok
            assert all(self.cache.entry(n).tier is before[n] for n in wanted & before.keys())

    @invariant()
    def pages_add_up(self):
        owned = sum(len(e.pages) for e in self.cache.entries())
        assert owned + self.pool.num_free == self.pool.capacity
        for entry in self.cache.entries():
            assert len(entry.pages) == (0 if entry.tier is AdapterTier.HOST else entry.info.num_pages)

    @precondition(lambda self: self.cache.entries())
    @rule()
    def removed_ones_go_when_nothing_holds_them(self):
        self.cache.sweep()
        for entry in self.cache.entries():
            assert not entry.removed or entry.requests or entry.tier is AdapterTier.LOADING


Cache.TestCase.settings = settings(max_examples=120, stateful_step_count=80, derandomize=True, deadline=None)
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
