"""Running requests: prompts in chunks, then one token a step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.request import Request, RequestState
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.plan import StepPlan
from chameleon_jax.scheduler.prefill_shapes import ANY_SIZE, PrefillShapes
from chameleon_jax.scheduler.running import RunningSet
from tests.properties import examples

PAGE_TOKENS = 4
PADDING = PrefillShapes(ANY_SIZE.tile, (1, 2, 4, 8))


def request(number: int, prompt: int, output: int = 4, adapter: str | None = None, pages: int | None = None) -> Request:
    made = Request(f"r{number}", [1] * prompt, SamplingParams(max_tokens=output), 0.0, seed=0, adapter=adapter, order=number)
    made.pages = list(range(-(-(prompt + output) // PAGE_TOKENS) if pages is None else pages))
    return made


def running(
    *requests: Request, step_tokens: int = 64, whole_prompts: bool = False, shapes: PrefillShapes = ANY_SIZE
) -> RunningSet:
    made = RunningSet(PAGE_TOKENS, step_tokens, shapes, whole_prompts)
    for each in requests:
        made.add(each)
    return made


def prefill(
    made: RunningSet, seconds: float = float("inf"), pass_tokens: float = 0.0, shapes: PrefillShapes = ANY_SIZE
) -> StepPlan:
    """One second for each token that the device computes."""
    plan = StepPlan()
    made.plan_prefills(plan, seconds, lambda request, tokens: float(shapes.padded(tokens)), pass_tokens)
    return plan


def chunks(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    return [(c.request.order, c.start, c.num_tokens, c.samples) for c in plan.prefills]


def decode(made: RunningSet, grow=lambda request, pages: False) -> StepPlan:
    plan = StepPlan()
    made.plan_decodes(plan, grow)
    for each in plan.decodes:  # as if collected at once
        each.num_in_flight -= 1
        each.output_token_ids.append(0)
    return plan


def test_prompts_are_cut_to_fill_the_step():
    made = running(request(0, 50), request(1, 70), request(2, 1), step_tokens=96)
    assert chunks(prefill(made)) == [(0, 0, 50, True), (1, 0, 32, False)]  # 50 tokens take two tiles
    assert chunks(prefill(made)) == [(1, 32, 38, True), (2, 0, 1, True)]
    assert chunks(prefill(made)) == []


def test_a_prompt_longer_than_a_step_takes_several():
    made = running(request(0, 150), step_tokens=64)
    assert [chunks(prefill(made)) for _ in range(4)] == [[(0, 0, 64, False)], [(0, 64, 64, False)], [(0, 128, 22, True)], []]


def test_whole_prompts_are_not_cut_unless_they_exceed_a_step():
    made = running(request(0, 32), request(1, 96), request(2, 32), step_tokens=96, whole_prompts=True)
    assert chunks(prefill(made)) == [(0, 0, 32, True)]  # the next one does not fit beside it, and is not passed
    assert chunks(prefill(made)) == [(1, 0, 96, True)]
    assert chunks(prefill(made)) == [(2, 0, 32, True)]
    made = running(request(0, 32), request(1, 97), step_tokens=96, whole_prompts=True)
    assert chunks(prefill(made)) == [(0, 0, 32, True), (1, 0, 64, False)]  # it has to be cut anyway
    assert chunks(prefill(made)) == [(1, 64, 33, True)]


def test_chunks_stay_within_the_seconds_they_may_take():
    made = running(request(0, 150), request(1, 10), step_tokens=256)
    assert chunks(prefill(made, seconds=100.0)) == [(0, 0, 96, False)]
    assert chunks(prefill(made, seconds=60.0)) == [(0, 96, 54, True)]  # six seconds are left: less than a tile of the next one
    assert chunks(prefill(made, seconds=-1.0)) == [(1, 0, 10, True)]  # a tile at least


def test_without_seconds_left_one_tile_goes_on():
    made = running(request(0, 100), request(1, 100), step_tokens=256)
    for start in (0, 32, 64):
        assert chunks(prefill(made, seconds=0.0)) == [(0, start, 32, False)]
    assert chunks(prefill(made, seconds=0.0)) == [(0, 96, 4, True)]
    assert chunks(prefill(made, seconds=0.0)) == [(1, 0, 32, False)]


def test_a_step_that_would_be_padded_leaves_the_rest_to_the_next():
    made = running(request(0, 50), request(1, 90), request(2, 40), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made)) == [(0, 0, 50, True), (1, 0, 64, False)]  # 4 of the 7 tiles, which would be padded to 8
    assert chunks(prefill(made)) == [(1, 64, 26, True), (2, 0, 32, False)]  # 2 of 3
    assert chunks(prefill(made)) == [(2, 32, 8, True)]


def test_a_step_is_padded_where_another_would_cost_more():
    made = running(request(0, 50), request(1, 90), request(2, 40), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made, pass_tokens=32.0)) == [(0, 0, 50, True), (1, 0, 90, True), (2, 0, 40, True)]


def test_whole_prompts_are_padded_rather_than_cut():
    made = running(request(0, 50), request(1, 30), step_tokens=256, whole_prompts=True, shapes=PADDING)
    assert chunks(prefill(made)) == [(0, 0, 50, True), (1, 0, 30, True)]


@pytest.mark.parametrize(("seconds", "tiles"), [(0.0, 1), (70.0, 2), (120.0, 2), (128.0, 4), (250.0, 4), (256.0, 8)])
def test_a_step_that_time_ends_stops_at_a_full_size(seconds, tiles):
    made = running(request(0, 300), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made, seconds, shapes=PADDING)) == [(0, 0, tiles * 32, False)]


@pytest.mark.parametrize(("seconds", "tiles"), [(0.0, 1), (96.0, 4), (128.0, 4), (160.0, 4), (192.0, 8)])
def test_a_step_that_time_ends_is_padded_with_prompts_where_another_would_cost_more(seconds, tiles):
    made = running(request(0, 300), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made, seconds, 64.0, PADDING)) == [(0, 0, tiles * 32, False)]


@examples(150)
@given(
    prompts=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    tiles=st.integers(1, 5),
    whole_prompts=st.booleans(),
    seconds=st.sampled_from([float("inf"), 100.0, 40.0, 0.0]),
    shapes=st.sampled_from([ANY_SIZE, PADDING]),
    pass_tokens=st.sampled_from([0.0, 40.0]),
)
def test_every_prompt_is_computed_once_in_order_and_within_the_step(
    prompts, tiles, whole_prompts, seconds, shapes, pass_tokens
):
    requests = [request(i, prompt) for i, prompt in enumerate(prompts)]
    made = running(*requests, step_tokens=tiles * ANY_SIZE.tile, whole_prompts=whole_prompts, shapes=shapes)
    computed, sampled = [0] * len(prompts), []
    for _ in range(sum(-(-prompt // ANY_SIZE.tile) for prompt in prompts)):
        plan = prefill(made, seconds, pass_tokens, shapes)
        assert sum(-(-c.num_tokens // ANY_SIZE.tile) for c in plan.prefills) <= tiles
        computed_tiles = sum(-(-c.num_tokens // ANY_SIZE.tile) for c in plan.prefills)
        assert sum(c.num_tokens for c in plan.prefills) <= max(seconds, ANY_SIZE.tile) + (pass_tokens if shapes.sizes else 0)
        assert not shapes.sizes or whole_prompts or pass_tokens or computed_tiles in (0, *shapes.sizes)
        for chunk in plan.prefills:
            order = chunk.request.order
            assert chunk.start == computed[order] and chunk.start % ANY_SIZE.tile == 0 and chunk.num_tokens > 0
            computed[order] += chunk.num_tokens
            assert chunk.samples == (computed[order] == prompts[order])
            sampled += [order] * chunk.samples
            if whole_prompts and seconds == float("inf") and prompts[order] <= tiles * ANY_SIZE.tile:
                assert chunk.samples
    assert computed == prompts and sampled == sorted(sampled) == list(range(len(prompts)))


def test_decodes_follow_the_prompt_and_end_one_short_of_the_last_token():
    """The last token is sampled and never computed."""
    one = request(0, 5, output=3)
    made = running(one)
    assert decode(made).decodes == []
    prefill(made)
    one.num_in_flight, one.output_token_ids = 0, [0]
    assert decode(made).decodes == [one] and one.num_computed == 6
    assert decode(made).decodes == [one] and one.num_computed == 7
    assert decode(made).decodes == [] and one.num_computed == one.max_total_tokens - 1


def test_pages_are_asked_for_when_the_next_token_needs_one():
    one = request(0, 6, output=11, pages=2)
    made = running(one)
    asked = []

    def grow(request, pages):
        asked.append((request.num_computed, pages))
        request.pages.extend([0] * pages)
        return True

    prefill(made)
    limits = []
    for _ in range(12):
        decode(made, grow)
        limits.append(one.decode_limit)
    assert asked == [(8, 1), (12, 1)]
    assert limits == [8] * 2 + [12] * 4 + [16] * 6  # 16: the last token's place is not written
    assert one.num_computed == 16


def test_a_request_that_cannot_grow_waits_for_the_next_step():
    one, other = request(0, 4, output=8, pages=1), request(1, 4, output=8)
    made = running(one, other)
    prefill(made)
    assert decode(made, lambda request, pages: False).decodes == [other]
    one.pages.append(7)
    assert decode(made).decodes == [one, other]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_request_preempted_by_growth_does_not_decode(victim):
    requests = [request(i, 4, output=8, pages=1 if i == 1 else None) for i in range(3)]
    made = running(*requests)
    prefill(made)
    prefill(made)

    def grow(grown, pages):
        made.remove(requests[victim])
        requests[victim].state = RequestState.WAITING
        grown.pages.extend([0] * pages)
        return grown is not requests[victim]

    plan = decode(made, grow)
    assert plan.decodes == [r for r in requests if r is not requests[victim]]
    assert requests[victim].num_computed == 4 and len(made) == 2


def test_rows_of_one_adapter_lie_side_by_side():
    requests = [request(i, 4, adapter=adapter) for i, adapter in enumerate(["b", None, "a", "b", "a"])]
    made = running(*requests, step_tokens=256)
    assert [c.request.order for c in prefill(made).prefills] == [1, 2, 4, 0, 3]
    assert [r.order for r in decode(made).decodes] == [1, 2, 4, 0, 3]


def test_age_is_the_order_of_arrival_and_a_second_start_recomputes_what_is_known():
    young, old = request(7, 40, output=20), request(3, 10, output=30)
    old.output_token_ids = [0] * 25
    made = running(young, old)
    assert made.by_age == [old, young] and len(made) == 2
    assert chunks(prefill(made)) == [(7, 0, 40, True)]  # in order of admission
    assert chunks(prefill(made)) == [(3, 0, 35, True)]
    made.remove(old)
    made.remove(young)
    assert len(made) == 0 and decode(made).decodes == [] and prefill(made).prefills == []
