"""A device that pads its steps to few sizes. Simulated: the serving loop under a virtual clock."""

from __future__ import annotations

import pytest

from benchmarks.padding import serve
from chameleon_jax.config import EngineConfig
from chameleon_jax.scheduler.prefill_shapes import ANY_SIZE

SEEDS = range(6)
DEFAULT = str(EngineConfig.system)


@pytest.mark.parametrize("rps", [3.0, 4.5, 5.5])
def test_the_default_keeps_up_with_first_come_first_served_on_a_device_that_pads(rps):
    ours, fifo = serve(DEFAULT, rps, SEEDS), serve("fifo", rps, SEEDS)
    assert ours.p50 <= 1.08 * fifo.p50 and ours.p99 <= 1.08 * fifo.p99


@pytest.mark.parametrize("system", [DEFAULT, "fifo"])
def test_steps_that_need_no_padding_serve_sooner(system):
    informed, blind = serve(system, 5.5, SEEDS), serve(system, 5.5, SEEDS, ANY_SIZE)
    assert informed.padding < blind.padding - 0.05
    assert informed.p50 < 0.95 * blind.p50 and informed.p99 < 0.95 * blind.p99
