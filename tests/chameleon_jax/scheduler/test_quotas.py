from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.scheduler.quotas import LevelLoad, least_quota, share_quotas
from tests.properties import examples

LOADS = st.lists(
    st.builds(
        LevelLoad, largest=st.integers(1, 500), mean=st.floats(0, 500), duration=st.floats(0.01, 60), rate=st.floats(0, 20)
    ),
    min_size=1,
    max_size=4,
)


def test_the_least_quota_by_hand():
    """S D (1 / SLO + lambda): 10 pages x 4 s x (1 / 5 s + 0.8 / s) = 40 pages."""
    assert least_quota(LevelLoad(largest=10, mean=3.0, duration=4.0, rate=0.8), slo=5.0) == pytest.approx(40)
    assert least_quota(LevelLoad(largest=10, mean=3.0, duration=0.1, rate=0.0), slo=5.0) == 10  # else it could never run


def test_pages_beyond_the_minima_are_shared_by_demand():
    """Minima 10 and 20; demands 1 x 2 x 1 = 2 and 1 x 6 x 1 = 6 share 40."""
    loads = [LevelLoad(10, 2.0, 1.0, 1.0), LevelLoad(20, 6.0, 1.0, 1.0)]
    assert [least_quota(load, 1e9) for load in loads] == pytest.approx([10, 20])
    quotas, scaled = share_quotas(loads, total=70, slo=1e9)
    assert quotas == pytest.approx([20, 50], abs=1) and sum(quotas) == 70 and not scaled


def test_without_demand_pages_beyond_the_minima_are_shared_equally():
    quotas, scaled = share_quotas([LevelLoad(10, 2.0, 1.0, 0.0), LevelLoad(20, 6.0, 1.0, 0.0)], total=70, slo=5.0)
    assert quotas == [30, 40] and not scaled


def test_minima_beyond_the_total_are_scaled_down_pro_rata():
    loads = [LevelLoad(10, 5.0, 1.0, 0.0), LevelLoad(30, 5.0, 1.0, 0.0)]
    assert share_quotas(loads, total=20, slo=5.0) == ([5, 15], True)
    assert share_quotas(loads, total=40, slo=5.0) == ([10, 30], False)


@examples(200)
@given(loads=LOADS, total=st.integers(1, 5000), slo=st.floats(0.1, 20))
def test_quotas_add_up_and_keep_the_minima(loads, total, slo):
    quotas, scaled = share_quotas(loads, total, slo)
    least = [least_quota(load, slo) for load in loads]
    assert sum(quotas) == total and all(quota >= 0 for quota in quotas)
    assert scaled == (sum(least) > total)
    if scaled:
        assert quotas == pytest.approx([m * total / sum(least) for m in least], abs=len(loads))
    else:
        assert all(quota > minimum - 1 for quota, minimum in zip(quotas, least))
