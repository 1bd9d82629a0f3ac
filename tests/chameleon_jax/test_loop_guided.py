"""Guided requests in the loop: their tokens are drawn once the tokens before them are known, and nothing else waits for that.

`FakeExecutor.draw` checks at each draw that the guide has gone past all the tokens before.
"""

from __future__ import annotations

import pytest

from chameleon_jax.outputs import FinishReason
from tests.chameleon_jax.fake_executor import FakeGuide
from tests.chameleon_jax.loop_traffic import expected, make_loop, make_request, run


def guided(number: int, prompt: int, output: int, last: int | None = None, **fields):
    request = make_request(number, prompt, output, **fields)
    request.guide = FakeGuide(last)
    return request


def record(executor) -> list[tuple[str, int]]:
    """List calls as they come, with the number of their step."""
    calls: list[tuple[str, int]] = []
    steps: list[object] = []
    methods = {name: getattr(executor, name) for name in ("dispatch", "draw", "collect")}
    for name, method in methods.items():

        def recording(argument, name=name, method=method):
            result = method(argument)
            if name == "dispatch":
                steps.append(result)
            handle = result if name == "dispatch" else argument
            calls.append((name, next(i for i, step in enumerate(steps) if step is handle)))
            return result

        setattr(executor, name, recording)
    return calls


def test_a_step_is_dispatched_before_and_drawn_after_the_tokens_of_the_step_before_are_collected():
    loop, executor, _ = make_loop(60)
    calls = record(executor)
    loop.submit(guided(0, 5, 4))
    run(loop)
    assert calls[:5] == [("dispatch", 0), ("draw", 0), ("dispatch", 1), ("collect", 0), ("draw", 1)]
    assert [calls.index(("draw", n)) > calls.index(("collect", n - 1)) > calls.index(("dispatch", n)) for n in (1, 2, 3)]


def test_others_take_as_many_steps_and_have_their_tokens_as_early_as_without():
    def steps_of_tokens(with_guided: bool) -> list[tuple[int, int]]:
        loop, _, _ = make_loop(60)
        plain = make_request(0, 5, 8)
        loop.submit(plain)
        loop.submit(guided(1, 5, 8) if with_guided else make_request(1, 5, 8))
        seen = []
        while loop.has_unfinished:
            loop.step()
            seen.append((loop.counters.steps, len(plain.output_token_ids)))
        return seen

    assert steps_of_tokens(True) == steps_of_tokens(False)


def test_plain_tokens_of_a_mixed_step_are_drawn_at_its_dispatch():
    loop, executor, _ = make_loop(60)
    drawn_at_dispatch = []
    dispatch = executor.dispatch

    def recording(plan):
        handle = dispatch(plan)
        drawn_at_dispatch.extend((drawing.request.request_id, drawing.token is not None) for drawing in handle)
        return handle

    executor.dispatch = recording  # type: ignore[method-assign]
    loop.submit(make_request(0, 5, 3))
    loop.submit(guided(1, 5, 3))
    run(loop)
    assert set(drawn_at_dispatch) == {("r0", True), ("r1", False)}


def test_preempted_guided_requests_get_the_tokens_that_they_get_alone():
    loop, executor, _ = make_loop(26)
    requests = [guided(i, 6, 30) if i % 2 else make_request(i, 6, 30) for i in range(6)]
    for request in requests:
        loop.submit(request)
    run(loop)
    assert sum(request.metrics.num_preemptions for request in requests[1::2]) > 0
    assert [r.output_token_ids for r in requests] == [expected(executor, r) for r in requests]
    assert all(request.guide.seen == request.output_token_ids for request in requests[1::2])


def test_a_complete_guide_ends_its_request():
    loop, executor, _ = make_loop(60)
    alone = expected(executor, make_request(0, 5, 20))
    request = guided(0, 5, 20, last=alone[6])
    loop.submit(request)
    run(loop)
    end = alone.index(alone[6]) + 1
    assert request.output_token_ids == alone[:end] and request.finish_reason is FinishReason.STOP


@pytest.mark.parametrize("stop", [False, True])
def test_a_guide_that_cannot_go_on_ends_its_request_with_the_reason(stop):
    """Its mask allows the end alone then, so a stop id is no proper end."""
    loop, executor, _ = make_loop(60)
    first = expected(executor, make_request(0, 5, 1))
    request = guided(0, 5, 20, stop_token_ids=first if stop else [])
    request.guide.error = "the lexer is too large"
    loop.submit(request)
    run(loop)
    assert request.finish_reason is FinishReason.ERROR and "the lexer is too large" in request.stop_reason


@pytest.mark.parametrize("then", ["abort", "step", "recover"])
def test_an_interrupt_while_a_draw_waits(then):
    """The interrupt comes between the dispatch of a step and its draw."""
    loop, executor, _ = make_loop(60)
    requests = [guided(0, 5, 8), guided(1, 6, 8), make_request(2, 7, 8)]
    for request in requests:
        loop.submit(request)
    loop.step()
    loop.step()
    collect = executor.collect

    def interrupted(handle):
        executor.collect = collect
        raise KeyboardInterrupt

    executor.collect = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        loop.step()
    assert loop._undrawn is not None
    if then == "abort":
        loop.abort("r0")
        assert requests[0].finish_reason is FinishReason.ABORT
    elif then == "recover":
        loop.recover()
    run(loop)
    for request in requests[then == "abort" :]:
        assert request.output_token_ids == expected(executor, request)
    assert loop.pool.usage().kv == 0


def test_a_request_that_ends_in_the_step_before_draws_nothing():
    """The step that computes one token too many is drawn after the end is known."""
    loop, executor, _ = make_loop(60)
    stop = expected(executor, make_request(0, 5, 20))[3]
    request, other = guided(0, 5, 20, stop_token_ids=[stop]), guided(1, 5, 20)
    loop.submit(request)
    loop.submit(other)
    run(loop)
    assert request.output_token_ids == expected(executor, request) and request.guide.seen == request.output_token_ids[:-1]
    assert other.output_token_ids == expected(executor, other)
