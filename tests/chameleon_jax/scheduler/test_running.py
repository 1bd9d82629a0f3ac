"""Running requests: prompts in chunks, then one token a step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.request import Request, RequestState
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler.plan import StepPlan
from chameleon_jax.scheduler.running import RunningSet
from chameleon_jax.scheduler.step_shapes import ANY_SIZE, StepShapes
from tests.properties import examples

PAGE_TOKENS = 4
PADDING = StepShapes((32, 64, 128, 256))
TILES = StepShapes((32, 64, 128, 200), tile=32)


def request(number: int, prompt: int, output: int = 4, adapter: str | None = None, pages: int | None = None) -> Request:
    made = Request(f"r{number}", [1] * prompt, SamplingParams(max_tokens=output), 0.0, seed=0, adapter=adapter, order=number)
    made.pages = list(range(-(-(prompt + output) // PAGE_TOKENS) if pages is None else pages))
    return made


def running(*requests: Request, step_tokens: int = 64, shapes: StepShapes = ANY_SIZE) -> RunningSet:
    made = RunningSet(PAGE_TOKENS, step_tokens, shapes)
    for each in requests:
        made.add(each)
    return made


def prefill(made: RunningSet, seconds: float = float("inf"), pass_tokens: float = 0.0, rows: int = 0) -> StepPlan:
    """Plan the prompts of a step beside decode rows; a token takes a second."""
    plan = StepPlan(decodes=[request(1000 + row, 1) for row in range(rows)])
    made.plan_prefills(plan, seconds, lambda request, tokens: float(tokens), pass_tokens)
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


def test_prompts_are_cut_at_any_token_to_fill_the_step():
    made = running(request(0, 50), request(1, 70), request(2, 1), step_tokens=96)
    assert chunks(prefill(made)) == [(0, 0, 50, True), (1, 0, 46, False)]
    assert chunks(prefill(made)) == [(1, 46, 24, True), (2, 0, 1, True)]
    assert chunks(prefill(made)) == []


def test_a_prompt_longer_than_a_step_takes_several():
    made = running(request(0, 150), step_tokens=63)
    assert [chunks(prefill(made)) for _ in range(4)] == [[(0, 0, 63, False)], [(0, 63, 63, False)], [(0, 126, 24, True)], []]


@pytest.mark.parametrize("shapes", [ANY_SIZE, StepShapes((128,))])
def test_decode_rows_do_not_count_in_the_prompt_tokens_of_a_step(shapes):
    made = running(request(0, 150), step_tokens=96, shapes=shapes)
    assert made.step_tokens == 96
    assert chunks(prefill(made, rows=8)) == [(0, 0, 96, False)]


def test_a_step_has_no_more_tiles_than_its_size_has_room_for():
    shapes = StepShapes((32,), tile=16)  # room for four tiles
    made = running(*(request(i, 3) for i in range(6)), step_tokens=32, shapes=shapes)
    assert [[c[0] for c in chunks(prefill(made))] for _ in range(3)] == [[0, 1, 2, 3], [4, 5], []]
    made = running(
        *(request(i, prompt) for i, prompt in enumerate([17, 3, 3, 3])),  # the first one's 17 tokens are two tiles
        step_tokens=32,
        shapes=shapes,
    )
    assert [[c[0] for c in chunks(prefill(made))] for _ in range(2)] == [[0, 1, 2], [3]]
    made = running(request(0, 3), request(1, 3), request(2, 30), step_tokens=32, shapes=shapes)
    first = chunks(prefill(made, pass_tokens=99))
    assert [c[:3] for c in first] == [(0, 0, 3), (1, 0, 3), (2, 0, 26)]


def test_prompts_are_not_added_in_place_of_padding_where_their_tiles_need_a_larger_size():
    shapes = StepShapes((32, 64), tile=32)
    made = running(*(request(i, 10) for i in range(8)), step_tokens=64, shapes=shapes)
    assert chunks(prefill(made, seconds=20.0, pass_tokens=99)) == [(0, 0, 10, True), (1, 0, 10, True)]


def test_chunks_stay_within_the_seconds_they_may_take():
    made = running(request(0, 150), request(1, 10), step_tokens=256)
    assert chunks(prefill(made, seconds=100.5)) == [(0, 0, 100, False)]
    assert chunks(prefill(made, seconds=56.0)) == [(0, 100, 50, True), (1, 0, 6, False)]
    assert chunks(prefill(made, seconds=-1.0)) == [(1, 6, 1, False)]  # a token at least
    assert chunks(prefill(made, seconds=3.0)) == [(1, 7, 3, True)]


def test_without_a_tokens_seconds_left_the_next_prompt_waits():
    made = running(request(0, 50), request(1, 100), step_tokens=256)
    assert chunks(prefill(made, seconds=50.9)) == [(0, 0, 50, True)]


def test_without_seconds_left_one_token_goes_on():
    made = running(request(0, 2), request(1, 2), step_tokens=256)
    assert [chunks(prefill(made, seconds=0.0)) for _ in range(4)] == [
        [(0, 0, 1, False)],
        [(0, 1, 1, True)],
        [(1, 0, 1, False)],
        [(1, 1, 1, True)],
    ]


def test_a_step_that_would_be_padded_leaves_the_rest_to_the_next():
    made = running(request(0, 50), request(1, 90), request(2, 40), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made)) == [(0, 0, 50, True), (1, 0, 78, False)]  # 128 of the 180 tokens, which would be padded to 256
    assert chunks(prefill(made)) == [(1, 78, 12, True), (2, 0, 20, False)]  # 32 of 52
    assert chunks(prefill(made)) == [(2, 20, 20, True)]


def test_a_step_fills_a_size_with_its_decode_rows():
    made = running(request(0, 86), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made, rows=10)) == [(0, 0, 54, False)]  # the size of 64
    assert chunks(prefill(made, rows=32)) == [(0, 54, 32, True)]
    made = running(request(0, 86), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made, rows=42)) == [(0, 0, 86, True)]  # the size of 128


def test_a_step_is_padded_where_another_would_cost_more():
    made = running(request(0, 50), request(1, 90), request(2, 40), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made, pass_tokens=76.0)) == [(0, 0, 50, True), (1, 0, 90, True), (2, 0, 40, True)]


@pytest.mark.parametrize(
    ("seconds", "rows", "tokens"),
    [
        *[(0.0, 0, 32), (70.0, 0, 64), (127.0, 0, 64), (128.0, 0, 128), (255.0, 0, 128), (256.0, 0, 256)],
        *[(0.0, 5, 27), (58.0, 5, 27), (59.0, 5, 59), (250.0, 5, 123), (251.0, 5, 251), (0.0, 32, 32), (0.0, 300, 1)],
    ],
)
def test_a_step_that_time_ends_stops_at_a_full_size(seconds, rows, tokens):
    """Below the first size that holds its rows it is filled up to that size, which it is padded to anyway."""
    made = running(request(0, 300), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made, seconds, rows=rows)) == [(0, 0, tokens, False)]


@pytest.mark.parametrize(("seconds", "tokens"), [(0.0, 32), (63.0, 64), (96.0, 128), (160.0, 128), (192.0, 256)])
def test_a_step_that_time_ends_is_padded_with_prompts_where_another_would_cost_more(seconds, tokens):
    made = running(request(0, 300), step_tokens=256, shapes=PADDING)
    assert chunks(prefill(made, seconds, pass_tokens=64.0)) == [(0, 0, tokens, False)]


@examples(150)
@given(
    prompts=st.lists(st.integers(1, 200), min_size=1, max_size=8),
    step_tokens=st.integers(20, 160),
    seconds=st.sampled_from([float("inf"), 100.0, 40.0, 0.0]),
    shapes=st.sampled_from([ANY_SIZE, PADDING, TILES]),
    pass_tokens=st.sampled_from([0.0, 40.0]),
    rows=st.integers(0, 40),
)
def test_every_prompt_is_computed_once_in_order_and_within_the_step(prompts, step_tokens, seconds, shapes, pass_tokens, rows):
    requests = [request(i, prompt) for i, prompt in enumerate(prompts)]
    made = running(*requests, step_tokens=step_tokens, shapes=shapes)
    computed, sampled = [0] * len(prompts), []
    for _ in range(sum(prompts)):
        plan = prefill(made, seconds, pass_tokens, rows)
        tokens = sum(c.num_tokens for c in plan.prefills)
        if not tokens:
            break
        tiles = sum(shapes.tiles(c.num_tokens) for c in plan.prefills)
        padding = shapes.padded(rows + tokens, tiles) - rows - tokens
        assert tiles <= shapes.most_tiles
        assert tokens <= step_tokens
        least = next((size - rows for size in shapes.sizes if size > rows), 1)
        assert tokens <= max(seconds, least) + (pass_tokens if shapes.sizes else 0)
        waits = sum(computed) + tokens < sum(prompts)
        if waits and tokens < step_tokens and shapes.tile == 1:  # no room is wasted while prompts wait
            assert padding == 0
        for chunk in plan.prefills:
            order = chunk.request.order
            assert chunk.start == computed[order] and chunk.num_tokens > 0
            computed[order] += chunk.num_tokens
            assert chunk.samples == (computed[order] == prompts[order])
            sampled += [order] * chunk.samples
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


@pytest.mark.parametrize(("victim", "count"), [(0, 2), (0, 3), (1, 3), (2, 3)])
def test_a_request_preempted_by_growth_does_not_decode(victim, count):
    requests = [request(i, 4, output=8, pages=1 if i == 1 else None) for i in range(count)]
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
    assert requests[victim].num_computed == 4 and len(made) == count - 1


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
    assert chunks(prefill(made)) == [(3, 0, 24, False), (7, 0, 40, True)]  # cut in order of admission
    assert chunks(prefill(made)) == [(3, 24, 11, True)]
    made.remove(old)
    made.remove(young)
    assert len(made) == 0 and decode(made).decodes == [] and prefill(made).prefills == []


def test_a_second_start_asks_anew_for_pages():
    one = request(0, 4, output=20, pages=6)
    made = running(one)
    prefill(made)
    assert decode(made).decodes == [one] and one.decode_limit == 23
    made.remove(one)
    one.pages = [1, 2]
    made.add(one)
    assert chunks(prefill(made)) == [(0, 0, 5, True)]
    assert [decode(made).decodes for _ in range(4)] == [[one]] * 3 + [[]] and one.num_computed == 8


def test_the_longest_wait_is_that_of_a_prompt_that_is_not_computed():
    made = running(request(0, 50), step_tokens=32)
    assert made.longest_wait(7.0) == 7.0
    prefill(made)
    assert made.longest_wait(8.0) == 8.0
    prefill(made)
    assert made.longest_wait(9.0) == 0.0
