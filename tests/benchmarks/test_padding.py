"""Devices that pad their steps to few sizes. Simulated: the serving loop under a virtual clock."""

from __future__ import annotations

import functools

import pytest

from benchmarks.simulator import padding
from benchmarks.simulator.padding import DEVICES
from chameleon_jax.config import EngineConfig

SEEDS = range(4)
DEFAULT = str(EngineConfig.system)
serve = functools.cache(padding.serve)  # tests ask for the same runs


@pytest.fixture(autouse=True)
def few_requests(monkeypatch):
    monkeypatch.setattr(padding, "REQUESTS", 200)


@pytest.mark.parametrize(("device", "rps"), [(name, rps) for name, device in DEVICES.items() for rps in device.rates[::2]])
def test_the_default_keeps_up_with_first_come_first_served_on_a_device_that_pads(device, rps):
    ours, fifo = (serve(DEVICES[device], system, rps, SEEDS, True) for system in (DEFAULT, "fifo"))
    assert ours.p50 <= 1.08 * fifo.p50 and ours.p99 <= 1.08 * fifo.p99


@pytest.mark.parametrize("system", [DEFAULT, "fifo"])
def test_where_padding_is_dear_steps_of_known_sizes_are_padded_less(system):
    known, unknown = (serve(DEVICES["two cores"], system, 5.5, SEEDS, sizes_known) for sizes_known in (True, False))
    assert known.padding < unknown.padding - 0.15
    assert known.p50 < 0.95 * unknown.p50 and known.p99 < 0.95 * unknown.p99


@pytest.mark.parametrize("rps", [6.0, 10.0])
def test_where_steps_are_dear_known_sizes_keep_the_target_between_tokens(rps):
    known, unknown = (serve(DEVICES["dear steps"], DEFAULT, rps, SEEDS, sizes_known) for sizes_known in (True, False))
    assert known.padding > 0.1  # a further step would cost more
    assert known.gap <= 1.02 * DEVICES["dear steps"].tbt_slo < unknown.gap and known.p99 < unknown.p99
