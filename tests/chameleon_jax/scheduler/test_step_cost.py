"""Costs of steps that are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.plan import PrefillChunk
from chameleon_jax.scheduler.step_cost import CONTEXT, DECODE, FEATURES, PREFILL, ROWS, STEP, TOKEN_RANKS, TOKENS, StepCost
from chameleon_jax.scheduler.step_shapes import ANY_SIZE, StepShapes
from tests.properties import examples

TRUE = np.array([0.02, 0.005, 1e-4, 1e-6, 0.01, 2e-4, 1e-7])


KINDS = {"decode": (False, True), "prefill": (True, False), "mixed": (True, True)}
"""Whether a kind of step has prompts, and whether it decodes."""
USUAL = ("decode", "mixed", "mixed", "mixed")


def step(rng, kinds: Sequence[str] = USUAL, adapters: bool = True) -> np.ndarray:
    x = np.zeros(FEATURES)
    prompts, decodes = KINDS[kinds[rng.integers(len(kinds))]]
    x[STEP] = 1
    if prompts:
        tokens = rng.integers(32, 600)
        x[PREFILL], x[TOKENS] = 1, tokens
        x[TOKEN_RANKS] = tokens * rng.integers(8, 128) if adapters else 0
    if decodes:
        rows = rng.integers(1, 64)
        x[DECODE], x[ROWS], x[CONTEXT] = 1, rows, rows * rng.integers(50, 400)
    return x


def taught(steps: int, seed: int = 0, true: np.ndarray = TRUE, noise: float = 0.0, **kind: Any) -> StepCost:
    cost, rng = StepCost(), np.random.default_rng(seed)
    for _ in range(steps):
        x = step(rng, **kind)
        cost.observe(x, float(true @ x) * rng.normal(1, noise))
    return cost


def test_features_of_a_step():
    requests = [Request(str(i), [1] * 100, SamplingParams(), 0.0, 0, adapter="a") for i in range(3)]
    for request in requests:
        request.num_computed = 70
    chunks = [PrefillChunk(requests[0], 0, 64, False), PrefillChunk(requests[1], 0, 36, True)]

    def features(prefills: list[PrefillChunk], decodes: list[Request], shapes: StepShapes) -> list[float]:
        x = StepCost.decode_features(decodes)
        StepCost.add_prompts(x, prefills, lambda r: 8, shapes)
        return x.tolist()

    assert features(chunks, requests[2:], ANY_SIZE) == [1, 1, 100, 800, 1, 1, 70]
    padding = StepShapes((100, 128))
    assert features(chunks, requests[2:], padding) == [1, 1, 127, 800, 1, 1, 70]  # a row and 27 tokens of padding
    assert features(chunks, [], padding) == [1, 1, 100, 800, 0, 0, 0]
    assert features([], requests[2:], padding) == [1, 0, 0, 0, 1, 1, 70]  # decodes alone are not padded
    assert features([], [], padding) == [0] * FEATURES


def test_costs_are_known_from_enough_steps_on():
    assert [taught(steps).known for steps in (StepCost.ENOUGH - 1, StepCost.ENOUGH)] == [False, True]


def test_costs_of_steps_are_learnt():
    cost, rng = taught(300), np.random.default_rng(1)
    assert cost.known
    for _ in range(20):
        x = step(rng)
        assert cost.seconds(x) == pytest.approx(TRUE @ x, rel=0.02)
    assert cost.prefill_seconds(200, 64) == pytest.approx(200 * TRUE[TOKENS] + 200 * 64 * TRUE[TOKEN_RANKS], rel=0.05)


SEEN = [["decode", "prefill", "mixed"], ["decode", "mixed"], ["prefill", "mixed"], ["decode", "prefill"], ["mixed"]]
OVERLAP = np.array([0.02, 0.0, 1e-4, 1e-6, 0.0, 2e-4, 1e-7])
TWO_PASSES = np.array([0.0, 0.02, 1e-4, 1e-6, 0.09, 2e-4, 1e-7])


@pytest.mark.parametrize("kinds", SEEN)
@pytest.mark.parametrize("true", [TRUE, OVERLAP, TWO_PASSES])
def test_every_kind_of_step_that_was_seen_is_predicted(true, kinds):
    """The fixed costs of a step, of prompts and of decodes are collinear."""
    cost, rng = taught(1000, true=true, noise=0.02, kinds=kinds), np.random.default_rng(1)
    for kind in kinds:
        for _ in range(50):
            x = step(rng, [kind])
            assert cost.seconds(x) == pytest.approx(true @ x, rel=0.05)


@pytest.mark.parametrize("true", [TRUE, OVERLAP])
def test_prompts_alone_are_predicted_soundly_before_any_ran(true):
    """A step of prompts alone costs no more than one that decodes too, and no less than its tokens."""
    cost, rng = taught(1000, true=true, noise=0.02, kinds=["decode", "mixed"]), np.random.default_rng(1)
    for _ in range(50):
        x = step(rng, ["prefill"])
        tokens, both = x.copy(), x.copy()
        tokens[[STEP, PREFILL]], both[DECODE] = 0, 1
        assert 0.95 * true @ tokens <= cost.seconds(x) <= 1.05 * true @ both
    assert cost.pass_tokens(decodes=True) == pytest.approx(true[PREFILL] / true[TOKENS], abs=10)
    fixed = true[STEP] + true[PREFILL] + true[DECODE]
    assert cost.pass_tokens(decodes=True) <= cost.pass_tokens(decodes=False) <= 1.05 * fixed / true[TOKENS]


def test_a_further_steps_prompts_are_charged_for_the_step_where_nothing_decodes():
    cost = taught(1000, kinds=list(KINDS))
    assert cost.pass_tokens(decodes=True) == pytest.approx(TRUE[PREFILL] / TRUE[TOKENS], rel=0.02)
    assert cost.pass_tokens(decodes=False) == pytest.approx((TRUE[STEP] + TRUE[PREFILL]) / TRUE[TOKENS], rel=0.02)


def test_an_output_token_is_a_share_of_a_step_that_decodes():
    cost = taught(1000, kinds=["decode", "mixed"])
    assert cost.output_seconds(16) == pytest.approx((TRUE[STEP] + TRUE[DECODE]) / 16 + TRUE[ROWS], rel=0.02)


@examples(60)
@given(
    true=st.lists(st.floats(0, 1), min_size=FEATURES, max_size=FEATURES),
    kinds=st.sampled_from(SEEN),
    seed=st.integers(0, 100),
)
def test_no_cost_is_ever_negative(true, kinds, seed):
    cost = taught(80, seed, np.array(true) * [1e-2, 1e-2, 1e-5, 1e-7, 1e-2, 1e-4, 1e-6], noise=0.3, kinds=kinds)
    for feature in range(FEATURES):
        assert cost.seconds(np.eye(FEATURES)[feature]) >= 0
    assert cost.pass_tokens(decodes=False) >= cost.pass_tokens(decodes=True) >= 0


@pytest.mark.parametrize("kind", [{"adapters": True}, {"adapters": False}, {"kinds": ["decode"]}, {"kinds": list(KINDS)}])
def test_a_slower_machine_is_followed_after_any_number_of_equal_steps(kind):
    cost, rng = taught(8_000, **kind), np.random.default_rng(2)
    for _ in range(3000):
        x = step(rng, **kind)
        cost.observe(x, float(2 * TRUE @ x))
    x = step(rng, **kind)
    assert cost.seconds(x) == pytest.approx(2 * TRUE @ x, rel=0.1)


def test_an_interruption_is_not_taken_for_a_cost():
    cost, rng = taught(300, kinds=["decode"]), np.random.default_rng(3)
    x = np.array([1.0, 1.0, 64, 512, 1, 4, 400])
    cost.observe(x, 3.0)
    cost.observe(x, 1e9)
    assert cost.seconds(x) < 5 * (TRUE @ x)
    for _ in range(200):
        x = step(rng)
        cost.observe(x, float(TRUE @ x))
    assert cost.seconds(x) == pytest.approx(TRUE @ x, rel=0.1)


def test_a_step_that_was_expected_to_take_no_time_teaches_its_cost():
    cost, x = taught(100, kinds=["decode"]), np.zeros(FEATURES)
    x[TOKENS] = 1000
    assert cost.seconds(x) == 0
    cost.observe(x, 1.0)
    assert 0 < cost.seconds(x) < 0.01


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_invalid_seconds_teach_nothing(seconds):
    cost = taught(100)
    before = cost.seconds(np.ones(FEATURES))
    cost.observe(np.ones(FEATURES), seconds)
    assert cost.seconds(np.ones(FEATURES)) == before
