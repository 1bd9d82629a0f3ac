"""The queue against sorted()."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.request_queue import RequestQueue
from tests.properties import examples

KEYS = st.sampled_from([0.0, 1.0, 2.5, -3.0])


def request(order: int) -> Request:
    return Request(f"r{order}", [1], SamplingParams(), arrival_time=0.0, seed=0, order=order)


class Queue(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.queue = RequestQueue()
        self.items: list[tuple[float, int, Request]] = []
        self.gone: list[tuple[float, Request]] = []
        self.orders = 0

    @rule(key=KEYS)
    def add(self, key):
        self.orders += 1
        self.put(key, request(self.orders))

    @precondition(lambda self: self.gone)
    @rule(key=KEYS, data=st.data())
    def add_again(self, key, data):
        _, back = self.gone.pop(data.draw(st.integers(0, len(self.gone) - 1)))
        self.put(key, back)

    def put(self, key, item):
        self.queue.add(item, key)
        self.items.append((key, item.order, item))

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def remove(self, data):
        key, _, item = self.items.pop(data.draw(st.integers(0, len(self.items) - 1)))
        self.queue.remove(item, key)
        self.gone.append((key, item))

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def remove_what_is_not_there(self, data):
        key, item = data.draw(st.sampled_from(self.gone))
        with pytest.raises(KeyError, match=item.request_id):
            self.queue.remove(item, key)

    @precondition(lambda self: self.items)
    @rule(data=st.data())
    def remove_with_another_key(self, data):
        key, _, item = data.draw(st.sampled_from(self.items))
        with pytest.raises(KeyError, match=item.request_id):
            self.queue.remove(item, key + 0.25)

    @invariant()
    def it_is_sorted(self):
        expected = [item for _, _, item in sorted(self.items, key=lambda entry: entry[:2])]
        assert list(self.queue) == expected and len(self.queue) == len(expected)
        assert self.queue.first(3) == expected[:3] and self.queue.first(10**6) == expected
        for place in range(len(expected) + 2):
            assert self.queue.at(place) is (expected[place] if place < len(expected) else None)


Queue.TestCase.settings = examples(50, stateful_step_count=50)
TestQueue = Queue.TestCase
