"""The queue against sorted(), and classes in it."""

from __future__ import annotations

from unittest import mock

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import request_queue
from chameleon_jax.scheduler.request_queue import MAX_PASSES, RequestQueue
from tests.properties import examples

KEYS = st.sampled_from([0.0, 1.0, 2.5, -3.0])
FEW_PASSES = 2
PRIORITIES = st.sampled_from([0, 0, 7, -(2**63), 2**63 - 1])


def request(order: int, priority: int = 0) -> Request:
    return Request(f"r{order}", [1], SamplingParams(), arrival_time=0.0, seed=0, order=order, priority=priority)


class Queue(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.queue = RequestQueue()
        self.items: list[tuple[float, int, Request]] = []
        self.gone: list[tuple[float, Request]] = []
        self.orders = 0
        self.passes = 0
        self.patch = mock.patch.object(request_queue, "MAX_PASSES", FEW_PASSES)
        self.patch.start()

    def teardown(self):
        self.patch.stop()

    @rule(key=KEYS, priority=PRIORITIES)
    def add(self, key, priority):
        self.orders += 1
        self.put(key, request(self.orders, priority))

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

    @precondition(lambda self: self.items)
    @rule(place=st.sampled_from([0, 0, 0, 1, 2]))
    def start(self, place):
        first = min(self.items, key=lambda entry: entry[:2])
        entry = next(e for e in self.items if e[2] is self.queue.first(place + 1)[-1])
        self.items.remove(entry)
        self.queue.remove(entry[2], entry[0], starts=True)
        self.passes = 0 if entry is first else self.passes + (entry[2].priority < first[2].priority)

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
        entries = sorted(self.items, key=lambda entry: (entry[2].priority, *entry[:2]))
        if self.passes >= FEW_PASSES:
            first = min(self.items, key=lambda entry: entry[:2], default=None)
            entries = sorted(entries, key=lambda entry: entry is not first)
        expected = [item for _, _, item in entries]
        assert list(self.queue) == expected and len(self.queue) == len(expected)
        assert self.queue.first(3) == expected[:3] and self.queue.first(10**6) == expected
        for place in range(len(expected) + 2):
            assert self.queue.at(place) is (expected[place] if place < len(expected) else None)


Queue.TestCase.settings = examples(50, stateful_step_count=50)
TestQueue = Queue.TestCase


def test_a_tenth_of_the_starts_is_in_the_order_without_classes():
    queue = RequestQueue()
    for order in range(1, 4):
        queue.add(request(order, priority=5))
    started = []
    for order in range(4, 34):
        queue.add(request(order, priority=-1))
        (first,) = queue.first(1)
        queue.remove(first, starts=True)
        started.append(first.order)
    assert MAX_PASSES == 9 and [started.index(order) for order in (1, 2, 3)] == [9, 19, 29]
    assert [order for order in started if order > 3] == list(range(4, 31))


def test_a_class_without_another_keeps_its_own_order():
    queue = RequestQueue()
    for order in range(1, 40):
        queue.add(request(order, priority=3), key=float(order % 5))
    started = []
    while len(queue):
        passing = queue.first(2)[-1]  # the first waits for its adapter
        queue.remove(passing, float(passing.order % 5), starts=True)
        started.append(passing.order)
    expected = sorted(range(1, 40), key=lambda order: (order % 5, order))
    assert started == expected[1:] + expected[:1]
