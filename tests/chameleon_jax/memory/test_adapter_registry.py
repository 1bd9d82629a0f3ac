from __future__ import annotations

import functools

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chameleon_jax.config import EngineConfig
from chameleon_jax.memory import adapter_registry
from chameleon_jax.memory.adapters import AdapterMix, AdapterTier
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import RequestState
from tests.chameleon_jax.loop_traffic import adapter, expected, make_loop, make_request, run
from tests.properties import examples

PAGES = {"c0": 1, "c1": 3, "c2": 4, "c3": 6, "c4": 9}
CAPACITY = 31
NAMES = st.sampled_from(["x", "y", "z"])
CONTENTS = st.sampled_from(list(PAGES))


def info(content: str):
    return adapter(content, PAGES[content])


class Names(RuleBasedStateMachine):
    """Names, contents, pins, reloads and requests against two dictionaries and a list."""

    def __init__(self):
        super().__init__()
        self.loop, self.executor, self.forgotten = make_loop(CAPACITY + 1, load_polls=2, system="chameleon-plus")
        self.names = self.loop.adapters
        self.content: dict[str, str] = {}
        self.pinning: set[str] = set()
        self.mixes: dict[str, AdapterMix] = {}
        self.requests: list = []

    def pinned(self, content: dict[str, str], pinning: set[str]) -> set[str]:
        return {content[name] for name in pinning}

    def fits(self, content: dict[str, str], pinning: set[str], added: str) -> bool:
        taken = sum(PAGES[c] for c in self.pinned(content, pinning))
        needs = [self.need(r) for r in self.unfinished() if r.adapter != added]
        return taken <= CAPACITY // 2 and taken + max(needs, default=0) <= CAPACITY

    def need(self, request) -> int:
        """Pages that a request may take, its adapter's among them."""
        return -(-request.max_total_tokens // 4) + PAGES[request.adapter]

    def unfinished(self):
        return [r for r in self.requests if r.state is not RequestState.FINISHED]

    @rule(name=NAMES, content=CONTENTS, pinned=st.sampled_from([None, None, True, False]), load_inplace=st.booleans())
    def set(self, name, content, pinned, load_inplace):
        after = self.content | {name: content}
        pins = name in self.pinning if pinned is None else pinned
        pinning = self.pinning | {name} if pins else self.pinning - {name}
        already = self.content.get(name) == content
        call = functools.partial(self.names.add, name, info(content), f"/{content}", pinned, load_inplace)
        if name in self.content and not already and not load_inplace:
            with pytest.raises(ValueError, match="has other content"):
                call()
        elif pins and not self.fits(after, pinning, content):
            with pytest.raises(ValueError, match="pinned adapters would take"):
                call()
        else:
            assert call() == already
            self.content, self.pinning = after, pinning

    @rule(name=NAMES)
    def remove(self, name):
        if name not in self.content:
            with pytest.raises(KeyError, match=f"no adapter is named '{name}'"):
                self.names.remove(name)
            return
        self.names.remove(name)
        del self.content[name]
        self.pinning.discard(name)

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name, pinned):
        if name not in self.content:
            with pytest.raises(KeyError, match=f"no adapter is named '{name}'"):
                self.names.pin(name, pinned)
        elif pinned and not self.fits(self.content, self.pinning | {name}, self.content[name]):
            with pytest.raises(ValueError, match="pinned adapters would take"):
                self.names.pin(name)
        else:
            self.names.pin(name, pinned)
            self.pinning = self.pinning | {name} if pinned else self.pinning - {name}

    @rule(members=st.sets(CONTENTS, min_size=2, max_size=3), weight=st.sampled_from([0.5, 2.0]))
    def add_mix(self, members, weight):
        """A mix comes from another thread, its members named or no more."""
        mix = AdapterMix.of((content, weight) for content in members)
        kept = self.names.add_mix(mix, "mix", adapter(mix.content_hash, 2))
        assert kept == self.names.use_mix(mix) == (members <= set(self.content.values()))
        if kept:
            self.mixes[mix.content_hash] = mix

    @rule(name=NAMES, prompt=st.sampled_from([1, 5, 12, 64]), output=st.integers(1, 12))
    def submit(self, name, prompt, output):
        """A long prompt leaves less room for pins than half of the pool, and pins less for it than it may need."""
        if name not in self.content:
            return
        content = self.content[name]
        request = make_request(len(self.requests), prompt, output, content)
        others = sum(PAGES[c] for c in self.pinned(self.content, self.pinning) - {content})
        if self.need(request) + others > CAPACITY:
            with pytest.raises(ValueError, match=f"{others} hold other pinned adapters"):
                self.loop.submit(request)
        else:
            self.loop.submit(request)
            self.requests.append(request)

    @rule(steps=st.integers(1, 6))
    def step(self, steps):
        for _ in range(steps):
            self.loop.step()

    @rule(which=st.integers(0, 40))
    def abort(self, which):
        if self.unfinished():
            request = self.unfinished()[which % len(self.unfinished())]
            self.loop.abort(request.request_id)

    @invariant()
    def the_loop_knows_what_names_and_requests_need(self):
        entries = {e.info.content_hash: e for e in self.loop.cache.entries()}
        gone = PAGES.keys() - set(self.content.values())
        self.mixes = {key: mix for key, mix in self.mixes.items() if not any(map(mix.has, gone))}
        needed = {*self.content.values(), *self.mixes, *(r.adapter for r in self.unfinished())}
        assert needed <= entries.keys()
        assert all(entries[c].tier is AdapterTier.LOADING and entries[c].removed for c in entries.keys() - needed)
        assert {c for c, e in entries.items() if e.pinned} == self.pinned(self.content, self.pinning)
        assert {n: self.names.named(n).content_hash for n in self.names.names()} == self.content
        assert {n: self.names.path(n) for n in self.content} == {n: f"/{c}" for n, c in self.content.items()}

    def teardown(self):
        run(self.loop)
        for request in self.requests:
            right = expected(self.executor, request)
            if request.finish_reason is FinishReason.ABORT:
                right = right[: len(request.output_token_ids)]
            assert request.output_token_ids == right  # of the content that it came with
        for name in list(self.content):
            self.remove(name)
        assert self.loop.cache.entries() == [] and self.loop.pool.num_free == self.loop.pool.capacity
        assert self.loop.cache.pinned_pages() == 0


Names.TestCase.settings = examples(70, stateful_step_count=50)
TestNames = Names.TestCase


def test_a_content_of_two_names_goes_with_the_second():
    loop, _, forgotten = make_loop(20)
    names = loop.adapters
    names.add("x", info("c1"), pinned=True)
    names.add("y", info("c1"))
    names.remove("x")
    assert forgotten == [] and not loop.cache.entry("c1").pinned
    names.add("y", info("c2"))
    assert forgotten == ["c1"]


def test_a_pin_leaves_room_for_the_largest_request_of_other_content():
    loop, _, _ = make_loop(CAPACITY + 1)
    for content in PAGES:
        loop.adapters.add(content, info(content))
    loop.submit(make_request(0, 64, 12, "c4"))
    with pytest.raises(ValueError, match=r"would take 4 of 31 pages; .* \(the largest needs 28\)"):
        loop.adapters.pin("c2")
    loop.adapters.pin("c1")
    loop.adapters.pin("c4")
    assert loop.cache.pinned_pages() == 12


def test_new_content_takes_the_place_of_a_pin_that_no_other_name_holds():
    loop, _, _ = make_loop(CAPACITY + 1)
    names = loop.adapters
    names.add("x", info("c4"), pinned=True)
    names.add("y", info("c4"), pinned=True)
    with pytest.raises(ValueError, match="would take 16 of 31 pages"):
        names.add("x", adapter("c5", 7))
    names.add("x", info("c3"))
    assert loop.cache.pinned_pages() == 15
    names.add("x", info("c4"))
    names.pin("y", False)
    names.add("x", adapter("c5", 7))
    assert loop.cache.pinned_pages() == 7


def test_a_mix_does_not_depend_on_the_order_of_its_members():
    one, other = (AdapterMix.of(members) for members in ([("c1", 0.5), ("c2", 2.0)], [("c2", 2.0), ("c1", 0.5)]))
    assert one.content_hash == other.content_hash != AdapterMix.of([("c1", 2.0), ("c2", 0.5)]).content_hash
    assert AdapterMix.of([("c1", 1.0)]).content_hash == "c1" != AdapterMix.of([("c1", 2.0)]).content_hash


def test_a_mix_outlives_others_while_a_request_has_it(monkeypatch):
    monkeypatch.setattr(adapter_registry, "MAX_MIXES", 1)
    loop, _, forgotten = make_loop(20)
    names = loop.adapters
    names.add("x", info("c1"))
    mixes = [AdapterMix.of([("c1", weight)]) for weight in (2.0, 3.0)]
    hashes = [mix.content_hash for mix in mixes]
    assert not names.use_mix(mixes[0])
    names.add_mix(mixes[0], "2*x", adapter(hashes[0], 1))
    assert names.use_mix(mixes[0]) and names.names_by_hash()[hashes[0]] == ["2*x"]
    request = make_request(0, 4, 4, hashes[0])
    loop.submit(request)
    names.add_mix(mixes[1], "3*x", adapter(hashes[1], 1))
    assert not names.use_mix(mixes[0]) and names.use_mix(mixes[1]) and forgotten == []
    run(loop)
    assert forgotten == [hashes[0]] and request.finish_reason is FinishReason.LENGTH
    names.remove("x")
    assert sorted(forgotten) == sorted([*hashes, "c1"]) and names.names_by_hash() == {}


def test_the_mix_that_was_not_used_longest_is_forgotten_first(monkeypatch):
    monkeypatch.setattr(adapter_registry, "MAX_MIXES", 2)
    loop, _, _ = make_loop(20)
    names = loop.adapters
    names.add("x", info("c1"))
    one, two, three = (AdapterMix.of([("c1", weight)]) for weight in (2.0, 3.0, 4.0))
    for mix in (one, two):
        names.add_mix(mix, "x", adapter(mix.content_hash, 1))
    assert names.use_mix(one)
    names.add_mix(three, "x", adapter(three.content_hash, 1))
    assert [names.use_mix(mix) for mix in (one, two, three)] == [True, False, True]


def test_names_go_over_to_another_pool_of_which_pins_take_half_at_most():
    loop, _, _ = make_loop(CAPACITY + 1)
    loop.adapters.add("x", info("c4"), "/c4", pinned=True)
    loop.adapters.add("y", info("c1"))
    loop.adapters.check_restart(EngineConfig(num_pages=19))
    with pytest.raises(ValueError, match="num_pages is 18; allowed: more than 18, as pinned adapters take 9"):
        loop.adapters.check_restart(EngineConfig(num_pages=18))
    other, _, _ = make_loop(19)
    loop.adapters.copy_to(other.adapters)
    assert other.adapters.names() == ["x", "y"] and other.adapters.path("x") == "/c4"
    assert [other.adapters.is_pinned(name) for name in "xy"] == [True, False] and other.cache.pinned_pages() == 9
