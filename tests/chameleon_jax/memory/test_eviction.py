"""Scores computed by hand, and properties of every policy over any uses."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.memory.eviction import (
    HALF_LIFE_S,
    LINK_BYTES_PER_S,
    LOAD_LATENCY_S,
    POLICIES,
    WINDOW_S,
    AdapterUse,
    Compound,
    CostAware,
    Gdsf,
    Lru,
    make_policy,
)
from tests.properties import examples


def use_at(*times: float, pages: int = 1, num_bytes: int = 0) -> AdapterUse:
    use = AdapterUse(pages, num_bytes, last_used=0.0)
    for now in times:
        use.use(now)
    return use


def test_frequency_counts_the_window_and_the_share_of_the_one_before():
    use = use_at(10.0, 20.0, 290.0)
    assert use.frequency(299.0) == 3  # the window before the first is empty
    assert use.frequency(300.0) == 3  # all of the window before lies within the last WINDOW_S
    assert use.frequency(375.0) == pytest.approx(3 * 0.75)
    use.use(450.0)
    assert use.frequency(450.0) == pytest.approx(1 + 3 * 0.5)
    assert use.frequency(600.0) == pytest.approx(1)  # the first window is forgotten
    assert use.frequency(750.0) == pytest.approx(0.5)
    assert use.frequency(900.0) == 0
    assert (use.uses, use.last_used) == (4, 450.0)


def test_a_window_without_uses_forgets_earlier_uses():
    use = use_at(10.0, 20.0)
    assert use.frequency(2 * WINDOW_S + 1) == 0
    use.use(2 * WINDOW_S + 2)
    assert use.frequency(2 * WINDOW_S + 3) == 1


def test_the_rate_halves_in_a_half_life_and_a_use_adds_its_share():
    one = math.log(2) / HALF_LIFE_S
    use = use_at(0.0)
    assert use.rate(0.0) == pytest.approx(one)
    assert use.rate(HALF_LIFE_S) == pytest.approx(one / 2)
    assert use.rate(3 * HALF_LIFE_S) == pytest.approx(one / 8)
    use.use(HALF_LIFE_S)
    assert use.rate(HALF_LIFE_S) == pytest.approx(1.5 * one)
    assert use_at().rate(100.0) == 0


def test_the_rate_of_regular_uses_is_theirs():
    use = use_at(*[2.0 * i for i in range(2000)])
    assert use.rate(4000.0) == pytest.approx(0.5, rel=0.02)


def test_lru_scores_by_last_use():
    assert Lru().scores([use_at(3.0), use_at(1.0, 7.0), use_at()], 9.0) == [3.0, 7.0, 0.0]


def test_compound_scores_by_hand():
    uses = [use_at(100.0, 100.0, pages=2), use_at(220.0, pages=8), use_at(pages=4)]
    frequency, size = (1.0, 0.5, 0.0), (0.25, 1.0, 0.5)
    recency = (1 - 192 / 300, 1 - 72 / 300, 1 - 292 / 300)
    scores = Compound().scores(uses, 292.0)
    assert scores == pytest.approx([0.45 * f + 0.10 * r + 0.45 * s for f, r, s in zip(frequency, recency, size)])
    fair = make_policy("fairshare").scores(uses, 292.0)
    assert fair == pytest.approx([(f + r + s) / 3 for f, r, s in zip(frequency, recency, size)])


def test_compound_without_any_use_ranks_by_size():
    scores = Compound().scores([use_at(pages=p) for p in (4, 1, 8)], 1000.0)
    assert scores == pytest.approx([0.45 / 2, 0.45 / 8, 0.45])


USES = st.lists(
    st.tuples(st.integers(1, 300), st.integers(0, 10**9), st.lists(st.floats(0, 2000), max_size=12)), min_size=1, max_size=8
)


@examples(150)
@given(uses=USES, later=st.floats(0, 2000), weights=st.permutations([1.0, 0.0, 0.0]))
def test_each_term_of_the_compound_score_is_between_0_and_1(uses, later, weights):
    made = [use_at(*sorted(times), pages=pages, num_bytes=size) for pages, size, times in uses]
    now = max([t for _, _, times in uses for t in times], default=0.0) + later
    scores = Compound(*weights).scores(made, now)
    assert all(-1e-9 <= score <= 1 + 1e-9 for score in scores)
    if weights[2]:
        assert max(scores) == 1
    if weights[0]:
        assert max(scores) == pytest.approx(1.0) or all(use.frequency(now) == 0 for use in made)


@examples(60)
@given(uses=USES, name=st.sampled_from(sorted(POLICIES)))
def test_every_policy_gives_one_finite_score_each(uses, name):
    policy = make_policy(name)
    made = [AdapterUse(pages, size, last_used=0.0) for pages, size, _ in uses]
    for now, i in sorted((t, i) for i, (_, _, times) in enumerate(uses) for t in times):
        made[i].use(now)
        policy.used(made[i], now)
    scores = policy.scores(made, 2000.0)
    assert len(scores) == len(made) and all(math.isfinite(s) for s in scores)
    assert policy.scores([], 2000.0) == []


def test_gdsf_scores_are_frequency_times_cost_over_size_on_top_of_the_age():
    policy = Gdsf()
    small, large = AdapterUse(2, int(LINK_BYTES_PER_S), 0.0), AdapterUse(8, 2 * int(LINK_BYTES_PER_S), 0.0)
    for use in (small, large, small):
        use.use(1.0)
        policy.used(use, 1.0)
    assert policy.scores([small, large], 1.0) == pytest.approx([2 * (1 + LOAD_LATENCY_S) / 2, (2 + LOAD_LATENCY_S) / 8])


def test_gdsf_ages_unused_adapters():
    policy = Gdsf()
    often, rare = (AdapterUse(1, 0, 0.0) for _ in range(2))
    for _ in range(10):
        often.use(0.0)
        policy.used(often, 0.0)
    rare.use(1.0)
    policy.used(rare, 1.0)
    old, new = policy.scores([often, rare], 2.0)
    assert (old, new) == pytest.approx((10 * LOAD_LATENCY_S, LOAD_LATENCY_S))
    policy.evicted(old)  # from now on every use starts from there
    policy.evicted(old / 2)  # and the age never falls
    rare.use(3.0)
    policy.used(rare, 3.0)
    assert policy.scores([often, rare], 3.0) == pytest.approx([old, old + 2 * LOAD_LATENCY_S])


def test_cost_aware_scores_are_seconds_saved_per_second_and_page():
    policy = CostAware()
    small, large = AdapterUse(1, 0, 0.0), AdapterUse(4, 3 * int(LINK_BYTES_PER_S), 0.0)
    for use, times in ((small, (0.0,)), (large, (0.0, 0.0, HALF_LIFE_S))):
        for now in times:
            use.use(now)
            policy.used(use, now)
    now = 3 * HALF_LIFE_S
    scores = policy.scores([small, large, use_at(pages=64, num_bytes=10**12)], now)
    values = [use.rate(now) * use.load_seconds / use.num_pages for use in (small, large)]
    assert [2 ** (score - now / HALF_LIFE_S) for score in scores] == pytest.approx([*values, 0])
    one = math.log(2) / HALF_LIFE_S
    assert values == pytest.approx([one / 8 * LOAD_LATENCY_S, one * 2 / 4 * (3 + LOAD_LATENCY_S) / 4])


@examples(60)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0.1, 200)), min_size=1, max_size=40))
def test_cost_aware_scores_sort_as_the_values_at_any_time(events):
    policy, uses, now = CostAware(), [AdapterUse(1 + i, i * 10**9, 0.0) for i in range(5)], 0.0
    for which, gap in events:
        now += gap
        uses[which].use(now)
        policy.used(uses[which], now)
    for later in (now, now + 500.0):
        values = [use.rate(later) * use.load_seconds / use.num_pages for use in uses]
        scores = policy.scores(uses, later)
        for i, j in itertools.combinations(range(5), 2):
            if abs(values[i] - values[j]) > 1e-9 * max(values):
                assert (values[i] < values[j]) == (scores[i] < scores[j])


def test_an_unknown_policy_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match=r"eviction is 'mru'; allowed: lru, chameleon, fairshare, gdsf, cost-aware"):
        make_policy("mru")
