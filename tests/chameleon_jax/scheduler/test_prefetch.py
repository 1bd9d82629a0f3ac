from __future__ import annotations

import bisect
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.scheduler.prefetch import HEAD, LEAST_GAPS, TAIL, UseHistory, UsePredictor
from tests.properties import examples


def history(*gaps: float) -> UseHistory:
    made = UseHistory(0.0)
    for gap in gaps:
        made.record_use(made.last + gap)
    return made


def test_a_periodic_use_is_expected_when_it_is_due_and_not_before():
    made = history(*[10.0] * 8)
    assert made.last == 80.0
    assert made.chance(85.0, 1.0) == 0
    assert made.chance(89.5, 1.0) == 1
    assert made.chance(90.5, 1.0) == 0  # it did not come, and may come at any time


def test_too_few_gaps_predict_nothing():
    assert history(*[10.0] * (LEAST_GAPS - 1)).chance(LEAST_GAPS * 10 - 10.5, 1.0) == 0
    assert history(*[10.0] * LEAST_GAPS).chance(LEAST_GAPS * 10 + 9.5, 1.0) == 1


def test_gaps_beyond_the_histogram_are_not_learnt_from():
    made = history(*[10.0] * 3, *[241.0] * 10)
    assert made.last == 30.0 + 2410.0
    assert made.chance(made.last + 9.5, 1.0) == 0  # three gaps only
    made.record_use(made.last + 240.0)
    assert made.chance(made.last + 9.5, 1.0) > 0


def test_only_the_last_gaps_count():
    made = history(*[10.0] * 100, *[20.0] * UseHistory.LIMIT)
    assert made.chance(made.last + 9.5, 1.0) == 0
    assert made.chance(made.last + 19.5, 1.0) == 1


@examples(200)
@given(
    gaps=st.lists(st.integers(1, 60).map(lambda quarter: quarter / 4), min_size=LEAST_GAPS, max_size=100),
    idle=st.floats(0, 16),
    horizon=st.floats(0.1, 5),
)
def test_a_chance_is_the_share_of_the_gaps_left_that_end_in_time(gaps, idle, horizon):
    made = history(*gaps)
    idle = (made.last + idle) - made.last  # as the clock rounds it
    kept = sorted(gaps[-UseHistory.LIMIT :])
    left = [gap for gap in kept if gap >= idle]
    low, high = kept[int(HEAD * (len(kept) - 1))], kept[int(TAIL * (len(kept) - 1))]
    chance = made.chance(made.last + idle, horizon)
    if low <= idle + horizon and idle <= high:
        assert chance == pytest.approx(bisect.bisect_left(left, idle + horizon) / len(left))
    else:
        assert chance == 0


def test_periodic_adapters_are_named_best_first_once_in_a_horizon():
    predictor = UsePredictor(horizon=2.0)
    for now in range(0, 101, 10):
        predictor.record_use("periodic", now)
    for now in [0, 3, 10, 24, 36, 40, 52, 60, 73, 80, 91, 100]:
        predictor.record_use("irregular", now)
    assert predictor.candidates(["irregular", "unknown", "periodic"], 109.0) == ["periodic", "irregular"]
    assert predictor.candidates(["periodic"], 110.5) == []
    assert predictor.candidates(["irregular", "periodic"], 111.0)[0] == "irregular"


def test_random_uses_and_too_few_of_them_are_not_named():
    predictor = UsePredictor(horizon=1.0)
    generator, now = random.Random(0), 0.0
    for _ in range(UseHistory.LIMIT + 1):
        predictor.record_use("random", now)
        last, now = now, now + generator.uniform(1, 200)
    for i in range(LEAST_GAPS):
        predictor.record_use("new", last + 10.0 * i)
    assert predictor.candidates(["random", "new"], last + 10.0 * LEAST_GAPS - 0.5) == []
    predictor.record_use("new", last + 10.0 * LEAST_GAPS)
    assert predictor.candidates(["random", "new"], last + 10.0 * (LEAST_GAPS + 1) - 0.5) == ["new"]


def test_a_forgotten_adapter_is_learnt_anew():
    predictor = UsePredictor()
    for now in range(0, 60, 10):
        predictor.record_use("a", now)
    assert predictor.candidates(["a"], 59.5) == ["a"]
    predictor.forget("a")
    predictor.forget("never known")
    assert predictor.candidates(["a"], 60.6) == []
    predictor.record_use("a", 70.0)
    assert predictor.candidates(["a"], 79.5) == []
