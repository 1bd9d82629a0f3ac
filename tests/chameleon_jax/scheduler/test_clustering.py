from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.scheduler.clustering import MAX_LEVELS, cluster_bounds, distributions_differ, equal_bounds
from tests.properties import examples


def groups(*centres: float, count: int = 50, width: float = 0.02) -> list[float]:
    generator = random.Random(0)
    return [centre + generator.uniform(-width, width) for centre in centres for _ in range(count)]


@pytest.mark.parametrize("centres", [(0.1, 0.9), (0.1, 0.5, 0.9), (0.05, 0.3, 0.6, 0.95)])
def test_groups_are_parted_between_their_centres(centres):
    bounds = cluster_bounds(groups(*centres))
    assert bounds == pytest.approx([(a + b) / 2 for a, b in zip(centres, centres[1:])], abs=0.01)


def test_no_more_levels_than_allowed():
    assert len(cluster_bounds(groups(*[i / 10 for i in range(10)]))) <= MAX_LEVELS - 1
    assert len(cluster_bounds(groups(0.1, 0.5, 0.9), max_levels=2)) == 1
    assert cluster_bounds(groups(0.1, 0.9), max_levels=1) == []


def test_a_cluster_that_gains_little_is_not_made():
    """Two tight groups, so that a third and fourth cluster remove less than ELBOW_SHARE of the variation."""
    assert len(cluster_bounds(groups(0.2, 0.8, width=0.05))) == 1


@pytest.mark.parametrize("sizes", [[], [0.5], [0.5] * 100])
def test_nothing_to_part(sizes):
    assert cluster_bounds(sizes) == [] == equal_bounds(sizes)


@examples(100)
@given(sizes=st.lists(st.integers(1, 1000).map(lambda n: n / 1000), min_size=20, max_size=60, unique=True))
def test_bounds_ascend_and_part_something(sizes):
    for bounds in (cluster_bounds(sizes), equal_bounds(sizes)):
        assert bounds == sorted(set(bounds))
        assert len(bounds) < MAX_LEVELS
        assert all(min(sizes) < bound < max(sizes) for bound in bounds)


def test_equal_bounds_are_of_equal_width():
    assert equal_bounds([0.9, 0.1, 0.3]) == pytest.approx([0.3, 0.5, 0.7])
    assert equal_bounds([0.0, 1.0], levels=2) == [0.5]


def test_the_drift_test_is_a_two_sample_kolmogorov_smirnov_test():
    """200 each: the critical gap is 1.95 sqrt(400 / 40000) = 0.195."""
    before = [i / 200 for i in range(200)]
    assert not distributions_differ(before, before[::-1])
    assert not distributions_differ(before, [x + 0.19 for x in before])
    assert distributions_differ(before, [x + 0.20 for x in before])
    assert distributions_differ(before, [x - 0.20 for x in before])


def test_the_drift_test_seldom_calls_equal_ones_different():
    generator = random.Random(1)
    draws = [[generator.random() for _ in range(128)] for _ in range(400)]
    assert sum(distributions_differ(a, b) for a, b in zip(draws, draws[1:])) <= 2


@pytest.mark.parametrize("sizes", [[1.0] * 99 + [2.0], [0.1] + [1.0] * 99, [1.0] * 60 + [1.0, 1.1]])
def test_bounds_of_a_few_outliers_lie_within_the_sizes(sizes):
    assert all(min(sizes) < bound < max(sizes) for bound in cluster_bounds(sizes))


def test_nothing_differs_from_something():
    assert distributions_differ([], [1.0]) and distributions_differ([1.0], [])
    assert not distributions_differ([], [])
