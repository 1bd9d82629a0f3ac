from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from chameleon_jax.memory.page_pool import OutOfPages, PagePool
from tests.properties import examples


class Pool(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.pool = PagePool(40)
        self.kv: dict[str, list[int]] = {}
        self.adapters: dict[str, list[int]] = {}

    @rule(owner=st.sampled_from("abcdef"), pages=st.integers(0, 12))
    def extend(self, owner, pages):
        if not self.pool.can_allocate(pages):
            free = self.pool.num_free
            with pytest.raises(OutOfPages):
                self.pool.extend_kv(owner, pages)
            assert self.pool.num_free == free
        else:
            self.kv.setdefault(owner, []).extend(self.pool.extend_kv(owner, pages))

    @rule(owner=st.sampled_from("uvwxyz"), pages=st.integers(1, 12))
    def load(self, owner, pages):
        if owner in self.adapters:
            with pytest.raises(ValueError, match="has pages already"):
                self.pool.allocate_adapter(owner, pages)
        elif self.pool.can_allocate(pages):
            self.adapters[owner] = self.pool.allocate_adapter(owner, pages)

    @rule(owner=st.sampled_from("abcdef"))
    def free_kv(self, owner):
        self.pool.free_kv(owner)
        self.kv.pop(owner, None)

    @rule(owner=st.sampled_from("uvwxyz"))
    def free_adapter(self, owner):
        if owner in self.adapters:
            self.pool.free_adapter(owner)
            del self.adapters[owner]

    @invariant()
    def every_page_has_one_owner(self):
        owned = [p for pages in (*self.kv.values(), *self.adapters.values()) for p in pages]
        assert len(owned) == len(set(owned)) and 0 not in owned
        assert self.pool.num_free + len(owned) == self.pool.capacity
        usage = self.pool.usage()
        assert (usage.kv, usage.adapters) == (sum(map(len, self.kv.values())), sum(map(len, self.adapters.values())))


Pool.TestCase.settings = examples(60, stateful_step_count=100)
TestPool = Pool.TestCase


def test_a_pool_needs_a_page_beside_the_trash_page():
    with pytest.raises(ValueError, match="num_pages is 1"):
        PagePool(1)
