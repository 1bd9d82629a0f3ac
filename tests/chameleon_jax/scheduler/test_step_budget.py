"""Time of prompts beside decodes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.plan import PrefillChunk, StepPlan
from chameleon_jax.scheduler.step_budget import GUESSED_TOKEN_S, StepBudget, prompt_share
from chameleon_jax.scheduler.step_cost import StepCost
from chameleon_jax.scheduler.step_shapes import ANY_SIZE, StepShapes

STEP_S, PREFILL_S, TOKEN_S, DECODE_S, ROW_S = 0.015, 0.01, 1e-3, 0.005, 1e-3


def request(number: int, prompt: int = 10, output: int = 10) -> Request:
    made = Request(f"r{number}", [1] * prompt, SamplingParams(max_tokens=output), 0.0, seed=0, order=number)
    made.predicted_output_len = output
    return made


PATIENCE = 5.0


def planned(budget: StepBudget, prompts: int, rows: int, waited: float = 0.0) -> tuple[float, StepPlan]:
    """Seconds for prompts in a step with `rows` decodes, and the step with `prompts` prompt tokens in it."""
    plan = StepPlan(decodes=[request(i) for i in range(rows)])
    seconds = budget.bound_prefills(plan, waited)
    if prompts:
        plan.prefills = [PrefillChunk(request(99), 0, prompts, samples=True)]
    budget.note_prefills(plan)
    return seconds, plan


def taught(target: float | None, slots: int = 8, slowness: float = 1.0, shapes: StepShapes = ANY_SIZE) -> StepBudget:
    """Budget that has seen a device whose steps cost the constants above, times `slowness`."""
    budget = StepBudget(target, PATIENCE, True, slots, lambda request: 0, shapes)
    for i in range(3 * StepCost.ENOUGH):
        prompts, rows = (i * 37) % 200 * (i % 5 > 0), i % 7  # steps of every kind
        computed = shapes.padded(rows + prompts) - rows if prompts else 0
        seconds = bool(prompts or rows) * STEP_S + bool(prompts) * PREFILL_S + computed * TOKEN_S
        seconds += bool(rows) * DECODE_S + rows * ROW_S
        budget.observe_step(planned(budget, prompts, rows)[1], slowness * seconds)
    return budget


@given(target=st.floats(1e-6, 1e3), fixed=st.floats(0, 2e3))
def test_prompts_get_the_rest_of_the_target_while_that_is_half_of_it_and_no_smaller_share_ever(target, fixed):
    seconds = prompt_share(fixed, target)
    if fixed <= target / 2:
        assert seconds == pytest.approx(target - fixed)
    elif fixed >= target:
        assert seconds == math.inf
    else:
        assert seconds == math.inf or seconds / (seconds + fixed) == pytest.approx(fixed / target, rel=1e-6)


@given(target=st.floats(1e-3, 1e3), shares=st.tuples(st.floats(0.5, 1.5), st.floats(0.5, 1.5)))
def test_the_further_the_target_is_out_of_reach_the_more_of_a_step_is_prompts(target, shares):
    low, high = sorted(shares)
    assert prompt_share(low * target, target) <= prompt_share(high * target, target) * (1 + 1e-9)


def test_a_target_that_can_be_met_bounds_the_step():
    seconds, _ = planned(taught(target=0.2), 0, rows=5)
    assert seconds == pytest.approx(0.2 - STEP_S - PREFILL_S - DECODE_S - 5 * ROW_S, rel=0.02)


@pytest.mark.parametrize("slowness", [1.0, 4.0, 16.0])
def test_a_target_that_cannot_be_met_bounds_nothing(slowness):
    fixed = STEP_S + PREFILL_S + DECODE_S + 5 * ROW_S
    assert planned(taught(fixed * 0.98, slowness=slowness), 0, rows=5)[0] == math.inf


@given(fixed=st.floats(0, 2), hurry=st.floats(0, 2))
def test_hurry_is_the_least_share_of_prompts(fixed, hurry):
    seconds = prompt_share(fixed, 1.0, hurry)
    assert seconds >= prompt_share(fixed, 1.0)
    assert seconds == math.inf or seconds / max(seconds + fixed, 1e-300) >= min(hurry, 1.0) * (1 - 1e-9)
    assert (seconds == math.inf) == (max(fixed, hurry) >= 1)


@pytest.mark.parametrize(("waited", "share"), [(0.0, 0.825), (4.0, 0.825), (4.9, 0.96), (5.0, None), (60.0, None)])
def test_the_longer_a_request_waits_the_more_of_a_step_is_prompts(waited, share):
    fixed = STEP_S + PREFILL_S + DECODE_S + 5 * ROW_S
    seconds, _ = planned(taught(target=0.2), 0, rows=5, waited=waited)
    assert seconds == math.inf if share is None else seconds / (seconds + fixed) == pytest.approx(share, abs=0.01)


def test_without_decodes_or_a_target_nothing_is_bounded():
    assert planned(taught(target=1e-3), 0, rows=0)[0] == math.inf
    assert planned(taught(target=None), 0, rows=5)[0] == math.inf


def test_before_enough_steps_were_timed_nothing_is_bounded_and_a_token_is_a_guess():
    budget = StepBudget(0.1, PATIENCE, True, 8, lambda request: 0, ANY_SIZE)
    assert (
        planned(budget, 0, rows=5)[0] == math.inf and budget.pass_tokens(decodes=True) == budget.pass_tokens(decodes=False) == 0
    )
    assert budget.prefill_seconds(request(0), 7) == 7 * GUESSED_TOKEN_S


@pytest.mark.parametrize("shapes", [ANY_SIZE, StepShapes((32, 64, 128, 256))])
@pytest.mark.parametrize("slowness", [1.0, 16.0])
def test_prompts_of_a_further_step_cost_as_much_beside_them_as_so_many_tokens(slowness, shapes):
    """The step itself costs nothing more where it decodes anyway."""
    budget = taught(target=1.0, slowness=slowness, shapes=shapes)
    assert budget.pass_tokens(decodes=True) == pytest.approx(PREFILL_S / TOKEN_S, rel=0.05)
    assert budget.pass_tokens(decodes=False) == pytest.approx((STEP_S + PREFILL_S) / TOKEN_S, rel=0.05)
    assert budget.prefill_seconds(request(0), 33) == pytest.approx(slowness * 33 * TOKEN_S, rel=0.02)


@pytest.mark.parametrize("slots", [1, 8, 64])
def test_work_is_the_prompt_and_the_outputs_share_of_full_steps(slots):
    budget = taught(target=1.0, slots=slots)
    made = request(0, prompt=100, output=20)
    per_token = (STEP_S + DECODE_S) / slots + ROW_S
    assert budget.work(made) == pytest.approx(100 * TOKEN_S + 20 * per_token, rel=0.02)
    made.output_token_ids += [1] * 5  # preempted: it recomputes these and goes on from there
    assert budget.work(made) == pytest.approx(105 * TOKEN_S + 15 * per_token, rel=0.02)
    made.output_token_ids += [1] * 30  # more than predicted
    assert budget.work(made) == pytest.approx(135 * TOKEN_S, rel=0.02)
