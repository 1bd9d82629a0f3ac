from __future__ import annotations

import numpy as np
import pytest

from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.plan import PrefillChunk
from chameleon_jax.scheduler.prefill_shapes import ANY_SIZE, PrefillShapes
from chameleon_jax.scheduler.step_cost import CONTEXT, DECODE, PREFILL, ROWS, TOKEN_RANKS, TOKENS, StepCost

TRUE = np.array([0.02, 1e-4, 1e-6, 0.03, 2e-4, 1e-7])


def step(rng, adapters: bool = True, prefill: bool = True) -> np.ndarray:
    x = np.zeros(6)
    if prefill and rng.random() < 0.7:
        tokens = rng.integers(32, 600)
        x[PREFILL], x[TOKENS] = 1, tokens
        x[TOKEN_RANKS] = tokens * rng.integers(8, 128) if adapters else 0
    rows = rng.integers(1, 64)
    x[DECODE], x[ROWS], x[CONTEXT] = 1, rows, rows * rng.integers(50, 400)
    return x


def taught(steps: int, seed: int = 0, **kind: bool) -> StepCost:
    cost, rng = StepCost(), np.random.default_rng(seed)
    for _ in range(steps):
        x = step(rng, **kind)
        cost.observe(x, float(TRUE @ x))
    return cost


def test_features_of_a_step():
    requests = [Request(str(i), [1] * 100, SamplingParams(), 0.0, 0, adapter="a") for i in range(3)]
    for request in requests:
        request.num_computed = 70
    chunks = [PrefillChunk(requests[0], 0, 64, False), PrefillChunk(requests[1], 0, 36, True)]
    assert StepCost.features(chunks, requests[2:], lambda r: 8, ANY_SIZE).tolist() == [1, 100, 800, 1, 1, 70]
    padding = PrefillShapes(16, (1, 4, 8))  # 4 tiles and 3, which are padded to 8
    assert StepCost.features(chunks, requests[2:], lambda r: 8, padding).tolist() == [1, 128, 7 * 16 * 8, 1, 1, 70]
    assert StepCost.features((), (), lambda r: 8, padding).tolist() == [0] * 6


def test_costs_of_steps_are_learnt():
    cost, rng = taught(300), np.random.default_rng(1)
    assert cost.known
    for _ in range(20):
        x = step(rng)
        assert cost.seconds(x) == pytest.approx(TRUE @ x, rel=0.02)
    assert cost.prefill_seconds(200, 64) == pytest.approx(200 * TRUE[TOKENS] + 200 * 64 * TRUE[TOKEN_RANKS], rel=0.05)


@pytest.mark.parametrize("kind", [{"adapters": True}, {"adapters": False}, {"prefill": False}])
def test_a_slower_machine_is_followed_after_any_number_of_equal_steps(kind):
    cost, rng = taught(20_000, **kind), np.random.default_rng(2)
    for _ in range(3000):
        x = step(rng, **kind)
        cost.observe(x, float(2 * TRUE @ x))
    x = step(rng, **kind)
    assert cost.seconds(x) == pytest.approx(2 * TRUE @ x, rel=0.1)


def test_an_interruption_is_not_taken_for_a_cost():
    cost, rng = taught(300, prefill=False), np.random.default_rng(3)
    x = np.array([1.0, 64, 512, 1, 4, 400])
    cost.observe(x, 3.0)
    cost.observe(x, 1e9)
    assert cost.seconds(x) < 5 * (TRUE @ x)
    for _ in range(200):
        x = step(rng)
        cost.observe(x, float(TRUE @ x))
    assert cost.seconds(x) == pytest.approx(TRUE @ x, rel=0.1)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_seconds_teach_nothing(seconds):
    cost = taught(100)
    before = cost.seconds(np.ones(6))
    cost.observe(np.ones(6), seconds)
    assert cost.seconds(np.ones(6)) == before
