"""Head starts of the boosted queue."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.single_queue import BOOST_TAIL, MAX_BOOST, Boost

SLO = 5.0


def request(work: float, arrival: float = 0.0) -> Request:
    made = Request("r", [1], SamplingParams(), arrival, seed=0)
    made.size = work
    return made


def boost(waits: list[float]) -> Boost:
    made = Boost(lambda request: request.size, SLO)
    for seconds in waits:
        made.waited(seconds)
    return made


@given(works=st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), wait=st.floats(0, 1e3))
def test_less_work_is_a_larger_head_start_within_the_bound(works, wait):
    key = boost([wait] * 300)
    small, large = sorted(works)
    assert -MAX_BOOST * SLO <= key(request(small)) <= key(request(large)) <= 0


def test_without_waits_the_order_is_first_come_first_served():
    key = boost([])
    assert key(request(10.0, arrival=0.0)) < key(request(1e-3, arrival=0.01))


def test_the_longer_others_wait_the_larger_is_the_head_start_up_to_what_the_target_allows():
    keys = [boost([wait] * 500)(request(0.01)) for wait in (0.01, 0.1, 0.5, 1.0)]
    assert keys == sorted(keys, reverse=True) and keys[0] > -0.02
    slowest = -math.log(BOOST_TAIL) / SLO
    expected = math.log1p(-math.exp(-slowest * 0.1)) / slowest
    for wait in (2.5, 100.0):
        assert boost([wait] * 1000)(request(0.1)) == pytest.approx(expected)


def test_head_starts_follow_waits_that_grow_and_fall():
    key = boost([1.0] * 500)
    high = key(request(0.01))
    for _ in range(500):
        key.waited(0.0)
    assert high < key(request(0.01)) and key(request(0.01)) > -0.02
