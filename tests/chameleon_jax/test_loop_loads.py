"""Adapters that load while requests wait for them, or pass them."""

from __future__ import annotations

import pytest

from chameleon_jax.loop import ServingLoop
from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import RequestState
from tests.chameleon_jax.fake_executor import FakeExecutor
from tests.chameleon_jax.loop_traffic import adapter, expected, make_loop, make_request, run


def test_base_traffic_passes_a_request_whose_adapter_loads():
    loop, _, _ = make_loop(40, load_polls=50)
    loop.adapters.add("slow", adapter("slow", 3))
    waits, passes = make_request(0, 5, 4, "slow"), make_request(1, 5, 4)
    loop.submit(waits)
    loop.submit(passes)
    for _ in range(6):
        loop.step()
    assert passes.state is RequestState.FINISHED and waits.state is RequestState.WAITING
    run(loop)
    assert waits.finish_reason is FinishReason.LENGTH


def test_waiting_adapters_are_loaded_ahead():
    loop, _, _ = make_loop(60, max_num_seqs=1)
    loop.adapters.add("next", adapter("next", 3))
    loop.submit(make_request(0, 5, 30))
    loop.submit(make_request(1, 5, 4, "next"))
    for _ in range(4):
        loop.step()
    assert loop.cache.entry("next").tier is AdapterTier.RESIDENT


def test_a_load_that_fails_ends_its_requests_only():
    loop, executor, _ = make_loop(40)
    loop.adapters.add("broken", adapter("broken", 3))
    executor.failing.add("broken")
    doomed, fine = make_request(0, 5, 4, "broken"), make_request(1, 5, 4)
    loop.submit(doomed)
    loop.submit(fine)
    run(loop)
    assert doomed.finish_reason is FinishReason.ERROR and "gone" in str(doomed.stop_reason)
    assert fine.output_token_ids == expected(executor, fine)
    assert loop.pool.num_free == loop.pool.capacity


def test_a_request_whose_adapter_lacks_memory_is_not_passed_for_ever():
    loop, executor, _ = make_loop(41, max_num_seqs=8)
    loop.adapters.add("large", adapter("large", 20))
    for number in range(8):
        loop.submit(make_request(number, 8, 12))
    loop.step()
    late = make_request(100, 4, 4, "large")
    loop.submit(late)
    for number in range(200, 260):  # more arrives than leaves
        loop.submit(make_request(number, 8, 12))
    before = loop.counters.finished
    while late.state is not RequestState.FINISHED:
        loop.step()
        assert loop.counters.finished - before < 30
    assert late.output_token_ids == expected(executor, late)
    run(loop)


def test_prefetch_leaves_running_requests_room_to_grow():
    loop, _, _ = make_loop(13, load_polls=8, max_num_seqs=2)
    loop.adapters.add("waits", adapter("waits", 6))
    for number in range(2):
        loop.submit(make_request(number, 6, 16))
    loop.step()
    loop.submit(make_request(2, 4, 4, "waits"))
    run(loop)
    assert loop.scheduler.num_squashes == 0


def test_a_load_is_given_up_when_nobody_waits_for_it_any_more():
    loop, executor, _ = make_loop(40, load_polls=50)
    loop.adapters.add("slow", adapter("slow", 3))
    loop.submit(make_request(9, 5, 20))  # else the loop waits for the load
    for number in range(2):
        loop.submit(make_request(number, 5, 4, "slow"))
    loop.step()
    assert "slow" in executor.loads
    loop.abort("r0")
    loop.step()
    assert "slow" in executor.loads and loop.scheduler.num_cancelled_loads == 0  # the other one waits for it
    loop.abort("r1")
    loop.step()
    assert not executor.loads and loop.scheduler.num_cancelled_loads == 1
    assert loop.cache.entry("slow").tier is AdapterTier.HOST and loop.pool.usage().adapters == 0
    again = make_request(2, 5, 4, "slow")
    loop.submit(again)
    run(loop)
    assert again.output_token_ids == expected(executor, again)


def slow_loads(loop: ServingLoop, executor: FakeExecutor, seconds: float) -> None:
    poll = executor.poll_loads

    def poll_slowly(wait=False):
        if wait:
            loop._clock.now += seconds  # type: ignore[attr-defined]
        return poll(wait)

    executor.poll_loads = poll_slowly  # type: ignore[method-assign]


def test_a_load_that_blocks_holds_the_step_back():
    loop, executor, _ = make_loop(60, load_polls=1000, system="chameleon", max_num_batched_tokens=64)
    slow_loads(loop, executor, 2.0)
    loop.adapters.add("cold", adapter("cold", 3))
    first, with_it, beside = make_request(0, 5, 12), make_request(1, 5, 4, "cold"), make_request(2, 5, 4)
    loop.submit(first)
    loop.step()
    loop.step()
    collected, before = len(first.output_token_ids), loop.counters.load_wait_s
    loop.submit(with_it)
    loop.submit(beside)
    loop.step()
    assert len(first.output_token_ids) == collected + 1  # of the step before, which the load waits for
    assert before == 0 and loop.counters.load_wait_s == pytest.approx(2.0, abs=0.1)
    assert with_it.metrics.adapter_wait == pytest.approx(2.0, abs=0.1)
    assert first.metrics.adapter_wait == beside.metrics.adapter_wait == 0
    assert loop.cache.entry("cold").tier is AdapterTier.RESIDENT
    run(loop)
    assert all(r.output_token_ids == expected(executor, r) for r in (first, with_it, beside))
    assert loop.counters.load_wait_s == pytest.approx(2.0, abs=0.1)
    assert (loop.cache.counters.hits, loop.cache.counters.misses) == (0, 1)


def test_a_blocking_load_that_fails_ends_its_requests_only():
    loop, executor, _ = make_loop(60, system="chameleon")
    for name in ("broken", "whole"):
        loop.adapters.add(name, adapter(name, 3))
    executor.failing.add("broken")
    names = [None, "broken", "whole", "broken"]
    requests = [make_request(number, 5, 4, name) for number, name in enumerate(names)]
    for request in requests:
        loop.submit(request)
    run(loop)
    for request in requests:
        if request.adapter == "broken":
            assert request.finish_reason is FinishReason.ERROR and "gone" in str(request.stop_reason)
            assert request.output_token_ids == []
        else:
            assert request.output_token_ids == expected(executor, request)
    assert loop.pool.usage().kv == 0 and loop.pool.usage().adapters == 3


@pytest.mark.parametrize("system", ["fifo", "chameleon-plus"])
def test_a_request_that_waits_for_its_adapter_keeps_its_pages_from_those_who_pass(system):
    loop, _, _ = make_loop(28, load_polls=20, max_num_seqs=8, system=system)
    loop.adapters.add("slow", adapter("slow", 3))
    waits = make_request(0, 40, 20, "slow")
    loop.submit(waits)
    for number in range(1, 100):
        loop.submit(make_request(number, 8, 8))
        loop.step()
        if waits.state is RequestState.RUNNING:
            break
    assert number <= 22 and loop.cache.counters.loads == 1  # as soon as its adapter is there
    run(loop)


def test_an_interrupt_while_a_load_is_awaited_loses_nothing():
    loop, executor, _ = make_loop(60, load_polls=1000, system="chameleon")
    loop.adapters.add("cold", adapter("cold", 3))
    first, second = make_request(0, 5, 12), make_request(1, 5, 8, "cold")
    loop.submit(first)
    loop.step()
    loop.step()
    loop.submit(second)
    poll = executor.poll_loads

    def interrupted(wait=False):
        if wait:
            executor.poll_loads = poll  # type: ignore[method-assign]
            raise KeyboardInterrupt
        return poll(wait)

    executor.poll_loads = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(loop)
    run(loop)
    assert [r.output_token_ids for r in (first, second)] == [expected(executor, r) for r in (first, second)]


def test_a_load_that_outlives_its_requests_is_given_up():
    loop, executor, forgotten = make_loop(60, load_polls=1000)
    loop.adapters.add("slow", adapter("slow", 3))
    loop.submit(make_request(1, 5, 40))
    loop.submit(make_request(0, 5, 4, "slow"))
    loop.step()
    assert executor.loads
    loop.abort("r0")
    loop.abort("r1")
    loop.adapters.remove("slow")
    run(loop)
    assert not executor.loads and forgotten == ["slow"] and loop.pool.num_free == loop.pool.capacity


def test_how_long_a_request_waited_for_its_adapter_is_known_where_others_pass_it():
    loop, _, _ = make_loop(60, load_polls=10)
    loop.adapters.add("slow", adapter("slow", 3))
    waits, passes = make_request(0, 5, 4, "slow"), make_request(1, 5, 30)
    loop.submit(waits)
    loop.submit(passes)
    run(loop)
    assert waits.metrics.adapter_wait > 0.009 and passes.metrics.adapter_wait == 0
    again = make_request(2, 5, 4, "slow")
    loop.submit(again)
    run(loop)
    assert again.metrics.adapter_wait == 0
