from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.memory.adapter_cache import AdapterCache
from chameleon_jax.memory.page_pool import PagePool
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.request_size import PageNeeds, RequestSizer
from tests.properties import examples


def request(prompt: int, predicted: int) -> Request:
    made = Request("r", [1] * prompt, SamplingParams(max_tokens=10_000), arrival_time=0.0, seed=0)
    made.predicted_output_len = predicted
    return made


def test_a_prompt_whose_output_is_dropped_takes_no_page_for_it():
    needs, made = PageNeeds(AdapterCache(PagePool(9), "lru", lambda _: None), page_tokens=16), request(32, 1)
    assert needs.kv(made) == 3
    made.prompt_only = True
    assert needs.kv(made) == 2


def test_weighted_sizes_by_hand():
    """(0.4 input / max input + 0.6 output / max output) x adapter pages / max adapter pages, the maxima of those seen."""
    sizer = RequestSizer()
    assert sizer.size(request(100, 50), 8) == pytest.approx(1)
    assert sizer.size(request(50, 25), 8) == pytest.approx(0.5)
    assert sizer.size(request(50, 50), 4) == pytest.approx((0.4 * 0.5 + 0.6) * 0.5)
    assert sizer.size(request(200, 100), 2) == pytest.approx(0.25)
    assert sizer.size(request(100, 25), 8) == pytest.approx(0.4 * 0.5 + 0.6 * 0.25)


def test_the_base_model_counts_as_the_smallest_adapter():
    sizer = RequestSizer()
    sizer.size(request(10, 10), 8)
    assert sizer.size(request(10, 10), 0) == sizer.size(request(10, 10), 1) == pytest.approx(1 / 8)


def test_output_only_looks_at_nothing_else():
    sizer = RequestSizer(output_only=True)
    assert sizer.size(request(100, 50), 8) == 1
    assert sizer.size(request(1, 25), 0) == sizer.size(request(500, 25), 16) == 0.5


REQUESTS = st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 256)), min_size=1, max_size=30)


@examples(100)
@given(requests=REQUESTS, output_only=st.booleans())
def test_sizes_lie_between_0_and_1_and_the_largest_so_far_is_1(requests, output_only):
    sizer = RequestSizer(output_only)
    for prompt, predicted, pages in requests:
        assert 0 < sizer.size(request(prompt, predicted), pages) <= 1 + 1e-12
    largest = request(max(p for p, _, _ in requests), max(o for _, o, _ in requests))
    assert sizer.size(largest, max(a for _, _, a in requests)) == pytest.approx(1)
