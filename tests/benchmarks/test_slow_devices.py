"""A target for the time between tokens that the device cannot meet costs nothing.

The default system keeps up with first come first served, simulated by the serving loop under a virtual clock.
"""

from __future__ import annotations

import functools

import pytest

from benchmarks.simulator import slow_devices
from benchmarks.simulator.slow_devices import serve
from chameleon_jax.config import EngineConfig

SEEDS = (0, 1, 2)
DEFAULT = str(EngineConfig.system)


@pytest.fixture(autouse=True)
def few_requests(monkeypatch):
    monkeypatch.setattr(slow_devices, "REQUESTS", 200)


@functools.cache
def first_come_first_served(slots: int, load: float):
    """Figures in steps, which are the same for all speeds: that system knows no target."""
    return serve("fifo", 1, slots, load, 512, SEEDS)


def test_first_come_first_served_is_the_same_in_steps_of_any_device():
    slow, base = serve("fifo", 16, 8, 1.2, 512, SEEDS), first_come_first_served(8, 1.2)
    assert (slow.rate, slow.p50, slow.p99) == (base.rate, base.p50, base.p99)


@pytest.mark.parametrize("slots", [8, 64])
@pytest.mark.parametrize("slowness", [1, 16])
def test_a_target_out_of_reach_costs_neither_throughput_nor_time_to_first_token(slowness, slots):
    for load in (0.5, 1.2):
        ours = serve(DEFAULT, slowness, slots, load, 512, SEEDS)
        fifo = first_come_first_served(slots, load)
        assert ours.rate >= 0.995 * fifo.rate, load
        assert ours.p99 <= 1.08 * fifo.p99, load


def test_a_target_within_reach_is_kept_at_little_cost():
    """Fixed costs use up two fifths of the target on this device, and first come first served exceeds it."""
    ours = serve(DEFAULT, 0.4, 64, 0.8, 512, SEEDS)
    fifo = serve("fifo", 0.4, 64, 0.8, 512, SEEDS)
    assert ours.gap <= 1.05 * EngineConfig.tbt_slo < fifo.gap
    assert ours.rate >= 0.995 * fifo.rate
    assert ours.p99 <= 1.2 * fifo.p99
