"""The loop, the scheduler, the cache and the pool together, over random traffic and pools that are too small for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.errors import QueueFull
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import RequestState
from chameleon_jax.systems import SYSTEMS
from tests.chameleon_jax.fake_executor import FakeGuide
from tests.chameleon_jax.loop_traffic import adapter, expected, make_loop, make_request, run
from tests.properties import examples
from tests.text_models import VARIANTS

TRAFFIC = st.lists(
    st.tuples(
        st.integers(1, 45),  # prompt
        st.integers(1, 30),  # output
        st.integers(0, 4),  # adapter; 4: base
        st.integers(0, 6),  # steps before the next one
        st.sampled_from(["run", "run", "run", "abort", "replace", "pin", "remove"]),
    ),
    min_size=1,
    max_size=25,
)


@examples(200)
@given(traffic=TRAFFIC, num_pages=st.integers(26, 60), load_polls=st.integers(0, 5), system=st.sampled_from(list(SYSTEMS)))
def test_random_traffic(traffic, num_pages, load_polls, system):
    loop, executor, forgotten = make_loop(num_pages, load_polls, system=system)
    version = dict.fromkeys(range(4), 0)
    name = {i: f"a{i}.0" for i in range(4)}
    for i in range(4):
        loop.adapters.add(name[i], adapter(name[i], 1 + 2 * i))
    requests, ended, aborted = [], [], set()
    replaced: set[str] = set()
    finish = loop.scheduler.finish

    def count_finish(request, now):
        ended.append(request.request_id)
        finish(request, now)

    loop.scheduler.finish = count_finish  # type: ignore[method-assign]
    for number, (prompt, output, which, steps, event) in enumerate(traffic):
        request = make_request(number, prompt, output, None if which == 4 else name[which], stop_token_ids=[3])
        request.guide = FakeGuide() if number % 3 == 1 else None
        try:
            loop.submit(request)
        except ValueError as error:
            assert "hold other pinned adapters" in str(error)
            continue
        requests.append(request)
        for _ in range(steps):
            loop.step()
        if event == "abort":
            victim = requests[len(requests) // 2]
            if loop.abort(victim.request_id) is not None:
                aborted.add(victim.request_id)
        elif event in ("replace", "remove") and which != 4:
            old, version[which] = name[which], version[which] + 1
            name[which] = f"a{which}.{version[which]}"
            loop.adapters.add(name[which], adapter(name[which], 1 + 2 * which))
            loop.adapters.remove(old)
            replaced.add(old)
        elif event == "pin" and which != 4:
            try:
                loop.adapters.pin(name[which])
            except ValueError as error:
                assert "pinned adapters would take" in str(error)
        used = loop.pool.usage()
        assert used.free + used.kv + used.adapters == used.total
        assert used.kv == sum(len(r.pages) for r in loop.scheduler.running)
    run(loop)
    assert sorted(ended) == sorted(r.request_id for r in requests)
    for request in requests:
        assert request.state is RequestState.FINISHED
        if request.request_id in aborted:
            assert request.output_token_ids == expected(executor, request)[: len(request.output_token_ids)]
        else:
            assert request.output_token_ids == expected(executor, request)
            assert request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    used = loop.pool.usage()
    assert used.kv == 0
    assert used.adapters == sum(len(e.pages) for e in loop.cache.entries())
    assert all(e.references == 0 and e.requests == 0 for e in loop.cache.entries())
    loop.step()
    assert sorted(forgotten) == sorted(replaced)
    for entry in loop.cache.entries():
        loop.cache.pin(entry.info.content_hash, False)
    loop.cache.evict_idle()
    assert loop.pool.num_free == loop.pool.capacity or any(e.tier is AdapterTier.LOADING for e in loop.cache.entries())


def test_small_pools_preempt_and_evict():
    loop, executor, _ = make_loop(26)
    loop.adapters.add("big", adapter("big", 12))
    requests = [make_request(i, 6, 30, "big" if i == 5 else None) for i in range(6)]
    for request in requests:
        loop.submit(request)
    run(loop)
    assert loop.scheduler.counters.preemptions > 0
    assert [r.output_token_ids for r in requests] == [expected(executor, r) for r in requests]


def test_the_oldest_is_never_preempted():
    loop, _, _ = make_loop(26)
    requests = [make_request(i, 6, 30) for i in range(6)]
    for request in requests:
        loop.submit(request)
    run(loop)
    assert requests[0].metrics.num_preemptions == 0


def test_what_can_never_fit_is_refused_with_the_reason():
    loop, _, _ = make_loop(10)
    loop.adapters.add("big", adapter("big", 8))
    with pytest.raises(ValueError, match="needs up to 10 pages .* the pool has 9"):
        loop.submit(make_request(0, 20, 20))
    with pytest.raises(ValueError, match="needs up to 10 pages"):
        loop.submit(make_request(0, 4, 4, "big"))
    with pytest.raises(ValueError, match="allowed: 80 together"):
        loop.submit(make_request(0, 60, 21))
    assert not loop.has_unfinished


def test_a_full_queue_says_so():
    loop, _, _ = make_loop(40, max_queue_len=2)
    loop.submit(make_request(0, 5, 4))
    loop.submit(make_request(1, 5, 4))
    with pytest.raises(QueueFull, match="2 requests wait"):
        loop.submit(make_request(2, 5, 4))
    run(loop)


class Letters:
    """A token stream whose text is one letter a token."""

    def append(self, token_id: int) -> str:
        return chr(ord("a") + token_id % 26)

    def flush(self) -> str:
        return ""


def test_stop_strings_are_cut_off_even_across_tokens():
    loop, executor, _ = make_loop(40)
    plain = make_request(0, 5, 20)
    plain.stream = Letters()
    loop.submit(plain)
    run(loop)
    stop = plain.text[4:7]
    for min_tokens, at in ((0, plain.text.index(stop)), (20, None)):
        request = make_request(0, 5, 20, stop=["zzzz", stop], min_tokens=min_tokens)
        request.stream = Letters()
        loop.submit(request)
        run(loop)
        assert request.text == plain.text[:at]
        assert request.stop_reason == (stop if at is not None else None)


def test_a_text_goes_on_after_a_recomputation():
    loop, executor, _ = make_loop(26)
    tokenizer = VARIANTS["llama2"]
    executor.vocab = tokenizer.vocab_size
    requests = [make_request(i, 6, 30) for i in range(6)]
    for request in requests:
        request.stream = tokenizer.stream(prompt_token_ids=request.prompt_token_ids)
        loop.submit(request)
    run(loop)
    assert loop.scheduler.counters.preemptions > 0
    for request in requests:
        stream = tokenizer.stream(prompt_token_ids=request.prompt_token_ids)
        assert request.text == "".join(map(stream.append, expected(executor, request))) + stream.flush()


def test_an_interrupt_while_waiting_for_the_device_loses_nothing():
    loop, executor, _ = make_loop(30)
    request = make_request(0, 5, 10)
    loop.submit(request)
    collect, calls = executor.collect, []

    def interrupted(handle):
        calls.append(handle)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return collect(handle)

    executor.collect = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(loop)
    run(loop)
    assert request.output_token_ids == expected(executor, request)


def test_a_step_that_fails_says_so_from_then_on():
    loop, executor, _ = make_loop(30)
    loop.submit(make_request(0, 5, 10))

    def broken(plan):
        raise OSError("device lost")

    executor.dispatch = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="device lost"):
        loop.step()
    with pytest.raises(RuntimeError, match="an earlier step failed"):
        loop.step()


def test_predictions_that_were_wrong_are_counted():
    loop, executor, _ = make_loop(60, predicted_output_len=3)
    longer, as_long, aborted = make_request(0, 5, 8), make_request(1, 5, 3), make_request(2, 5, 8)
    clipped = make_request(3, 5, 2)  # at most 2 are expected of it
    shorter = make_request(4, 5, 8, stop_token_ids=[executor.next_token(make_request(4, 5, 8).prompt_token_ids, None)])
    for request in (longer, as_long, aborted, clipped, shorter):
        loop.submit(request)
    assert [r.predicted_output_len for r in (longer, as_long, clipped, shorter)] == [3, 3, 2, 3]
    loop.step()
    loop.abort("r2")
    run(loop)
    assert len(shorter.output_token_ids) == 1
    counters = loop.scheduler.counters
    assert (counters.underpredicted, counters.overpredicted) == (1, 1)


def test_others_start_where_a_decode_step_alone_takes_longer_than_the_target():
    loop, executor, _ = make_loop(60, system="chameleon-plus", tbt_slo=1e-6)
    long = make_request(0, 5, 75)
    loop.submit(long)
    for _ in range(60):
        loop.step()  # enough for the cost of steps to be known
    late = make_request(1, 40, 4)
    loop.submit(late)
    for _ in range(12):
        loop.step()
    assert late.state is RequestState.FINISHED and long.state is RequestState.RUNNING
    run(loop)
    assert late.output_token_ids == expected(executor, late)


def test_steps_beside_background_compilations_are_forgotten_after_the_last():
    loop, executor, _ = make_loop(60, 0)
    dispatched: list[object] = []
    events: list[object] = []
    dispatch, observe = executor.dispatch, loop.scheduler.observe_step
    executor.num_compiled = None

    def compile_the_last_in_fourth(plan):
        dispatched.append(plan)
        if len(dispatched) == 4:
            executor.num_compiled = 7
        return dispatch(plan)

    executor.dispatch = compile_the_last_in_fourth  # type: ignore[method-assign]
    loop.scheduler.observe_step = lambda plan, seconds: (events.append(plan), observe(plan, seconds))  # type: ignore[method-assign]
    loop.scheduler.forget_steps = lambda: events.append("forget")  # type: ignore[method-assign]
    loop.submit(make_request(0, 4, 7, None))
    run(loop)
    assert len(dispatched) > 5 and events == [*dispatched[:2], "forget", *dispatched[3:]]


def test_forgotten_steps_leave_prompts_unbounded():
    loop, _, _ = make_loop(60, system="chameleon-plus")
    loop.submit(make_request(0, 4, 60, None))
    run(loop)
    budget = loop.scheduler._budget
    assert budget._cost.known
    loop.scheduler.forget_steps()
    assert not budget._cost.known and budget.pass_tokens(decodes=True) == 0


def test_steps_that_ran_while_a_program_was_compiled_teach_nothing():
    loop, executor, _ = make_loop(60, 0)
    seen, dispatched = [], []
    dispatch, observe = executor.dispatch, loop.scheduler.observe_step

    def compile_in_second(plan):
        dispatched.append(plan)
        executor.num_compiled += len(dispatched) == 2
        return dispatch(plan)

    executor.dispatch = compile_in_second  # type: ignore[method-assign]
    loop.scheduler.observe_step = lambda plan, seconds: (seen.append(plan), observe(plan, seconds))  # type: ignore[method-assign]
    loop.submit(make_request(0, 4, 5, None))
    run(loop)
    assert len(dispatched) > 3 and seen == dispatched[1:]
