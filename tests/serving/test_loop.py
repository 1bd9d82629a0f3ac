"""The loop, the scheduler, the cache and the pool together, over random traffic and pools that are too small for it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_jax.adapters import AdapterInfo, AdapterTier
from chameleon_jax.config import EngineConfig
from chameleon_jax.page_pool import PagePool
from chameleon_jax.request import FinishReason, Request, RequestState, SamplingParams
from chameleon_jax.serving.loop import QueueFull, ServingLoop
from chameleon_jax.systems import SYSTEMS
from tests.serving.fake_executor import FakeExecutor

PAGE_TOKENS = 4


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def make_loop(num_pages: int, load_polls: int = 1, **settings) -> tuple[ServingLoop, FakeExecutor, list[str]]:
    executor = FakeExecutor(PAGE_TOKENS, load_polls)
    forgotten: list[str] = []
    defaults = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "predicted_output_len": 3, "system": "fifo"}
    loop = ServingLoop(
        EngineConfig(**(defaults | settings)),
        executor,
        PagePool(num_pages),
        page_tokens=PAGE_TOKENS,
        max_model_len=80,
        clock=Clock(),
        forget=forgotten.append,
    )
    return loop, executor, forgotten


def adapter(name: str, pages: int) -> AdapterInfo:
    return AdapterInfo(content_hash=name, rank=8, num_pages=pages, num_bytes=pages)


def make_request(number: int, prompt: int, output: int, adapter: str | None = None, **fields) -> Request:
    tokens = [(number * 7 + i) % 50 for i in range(prompt)]
    params = SamplingParams(max_tokens=output, **fields)
    stop_ids = frozenset(params.stop_token_ids)
    return Request(f"r{number}", tokens, params, arrival_time=float(number), seed=0, stop_ids=stop_ids, adapter=adapter)


def expected(executor: FakeExecutor, request: Request) -> list[int]:
    out: list[int] = []
    while len(out) < request.params.max_tokens:
        out.append(executor.next_token(request.prompt_token_ids + out, request.adapter))
        if out[-1] in request.stop_ids:
            break
    return out


def run(loop: ServingLoop, limit: int = 5000) -> None:
    for _ in range(limit):
        if not loop.has_unfinished:
            return
        loop.step()
    raise AssertionError("the loop does not end")


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


@settings(max_examples=400, derandomize=True, deadline=None)
@given(traffic=TRAFFIC, num_pages=st.integers(26, 60), load_polls=st.integers(0, 5), system=st.sampled_from(list(SYSTEMS)))
def test_random_traffic(traffic, num_pages, load_polls, system):
    loop, executor, forgotten = make_loop(num_pages, load_polls, system=system)
    version = dict.fromkeys(range(4), 0)
    name = {i: f"a{i}.0" for i in range(4)}
    for i in range(4):
        loop.add_adapter(adapter(name[i], 1 + 2 * i))
    requests, ended, aborted = [], [], set()
    replaced: set[str] = set()
    finish = loop.scheduler.finish

    def count_finish(request, now):
        ended.append(request.request_id)
        finish(request, now)

    loop.scheduler.finish = count_finish  # type: ignore[method-assign]
    for number, (prompt, output, which, steps, event) in enumerate(traffic):
        request = make_request(number, prompt, output, None if which == 4 else name[which], stop_token_ids=[3])
        loop.submit(request)
        requests.append(request)
        for _ in range(steps):
            loop.step()
        if event == "abort":
            victim = requests[number // 2]
            if loop.abort(victim.request_id) is not None:
                aborted.add(victim.request_id)
        elif event in ("replace", "remove") and which != 4:
            old, version[which] = name[which], version[which] + 1
            name[which] = f"a{which}.{version[which]}"
            loop.add_adapter(adapter(name[which], 1 + 2 * which))
            loop.remove_adapter(old)
            replaced.add(old)
        elif event == "pin" and which != 4:
            try:
                loop.pin_adapter(name[which])
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
    assert all(e.references == 0 and e.holders == 0 for e in loop.cache.entries())
    loop.step()
    assert sorted(forgotten) == sorted(replaced)
    for entry in loop.cache.entries():
        loop.cache.pin(entry.info.content_hash, False)
    loop.cache.evict_idle()
    assert loop.pool.num_free == loop.pool.capacity or any(e.tier is AdapterTier.LOADING for e in loop.cache.entries())


def test_small_pools_squash_and_evict():
    loop, executor, _ = make_loop(26)
    loop.add_adapter(adapter("big", 12))
    requests = [make_request(i, 6, 30, "big" if i == 5 else None) for i in range(6)]
    for request in requests:
        loop.submit(request)
    run(loop)
    assert loop.scheduler.num_squashes > 0
    assert [r.output_token_ids for r in requests] == [expected(executor, r) for r in requests]


def test_the_oldest_is_never_squashed():
    loop, _, _ = make_loop(26)
    requests = [make_request(i, 6, 30) for i in range(6)]
    for request in requests:
        loop.submit(request)
    run(loop)
    assert requests[0].metrics.num_squashes == 0


def test_base_traffic_passes_a_request_whose_adapter_loads():
    loop, _, _ = make_loop(40, load_polls=50)
    loop.add_adapter(adapter("slow", 3))
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
    loop.add_adapter(adapter("next", 3))
    loop.submit(make_request(0, 5, 30))
    loop.submit(make_request(1, 5, 4, "next"))
    for _ in range(4):
        loop.step()
    assert loop.cache.entry("next").tier is AdapterTier.RESIDENT


def test_a_load_that_fails_ends_its_requests_only():
    loop, executor, _ = make_loop(40)
    loop.add_adapter(adapter("broken", 3))
    executor.failing.add("broken")
    doomed, fine = make_request(0, 5, 4, "broken"), make_request(1, 5, 4)
    loop.submit(doomed)
    loop.submit(fine)
    run(loop)
    assert doomed.finish_reason is FinishReason.ABORT and "gone" in str(doomed.stop_reason)
    assert fine.output_token_ids == expected(executor, fine)
    assert loop.pool.num_free == loop.pool.capacity


def test_what_can_never_fit_is_refused_with_the_reason():
    loop, _, _ = make_loop(10)
    loop.add_adapter(adapter("big", 8))
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


def test_a_request_whose_adapter_lacks_memory_is_not_passed_for_ever():
    loop, executor, _ = make_loop(41, max_num_seqs=8)
    loop.add_adapter(adapter("large", 20))
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
    loop.add_adapter(adapter("waits", 6))
    for number in range(2):
        loop.submit(make_request(number, 6, 16))
    loop.step()
    loop.submit(make_request(2, 4, 4, "waits"))
    run(loop)
    assert loop.scheduler.num_squashes == 0


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


def test_a_load_is_given_up_when_nobody_waits_for_it_any_more():
    loop, executor, _ = make_loop(40, load_polls=50)
    loop.add_adapter(adapter("slow", 3))
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
    loop.add_adapter(adapter("cold", 3))
    first, with_it, beside = make_request(0, 5, 12), make_request(1, 5, 4, "cold"), make_request(2, 5, 4)
    loop.submit(first)
    loop.step()
    loop.step()
    collected, before = len(first.output_token_ids), loop.counters.load_wait
    loop.submit(with_it)
    loop.submit(beside)
    loop.step()
    assert len(first.output_token_ids) == collected + 1  # of the step before, which the load waits for
    assert before == 0 and loop.counters.load_wait == pytest.approx(2.0, abs=0.1)
    assert with_it.metrics.adapter_wait == pytest.approx(2.0, abs=0.1)
    assert first.metrics.adapter_wait == beside.metrics.adapter_wait == 0
    assert loop.cache.entry("cold").tier is AdapterTier.RESIDENT
    run(loop)
    assert all(r.output_token_ids == expected(executor, r) for r in (first, with_it, beside))
    assert loop.counters.load_wait == pytest.approx(2.0, abs=0.1)
    assert (loop.cache.counters.hits, loop.cache.counters.misses) == (0, 1)


def test_a_blocking_load_that_fails_ends_its_requests_only():
    loop, executor, _ = make_loop(60, system="chameleon")
    for name in ("broken", "whole"):
        loop.add_adapter(adapter(name, 3))
    executor.failing.add("broken")
    names = [None, "broken", "whole", "broken"]
    requests = [make_request(number, 5, 4, name) for number, name in enumerate(names)]
    for request in requests:
        loop.submit(request)
    run(loop)
    for request in requests:
        if request.adapter == "broken":
            assert request.finish_reason is FinishReason.ABORT and "gone" in str(request.stop_reason)
            assert request.output_token_ids == []
        else:
            assert request.output_token_ids == expected(executor, request)
    assert loop.pool.usage().kv == 0 and loop.pool.usage().adapters == 3


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
    assert (counters.underpredicted, counters.overpredicted, counters.ended) == (1, 1, 5)


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


@pytest.mark.parametrize("system", ["fifo", "chameleon-plus"])
def test_a_request_that_waits_for_its_adapter_keeps_its_pages_from_those_who_pass(system):
    loop, _, _ = make_loop(28, load_polls=20, max_num_seqs=8, system=system)
    loop.add_adapter(adapter("slow", 3))
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
    loop.add_adapter(adapter("cold", 3))
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
    loop.add_adapter(adapter("slow", 3))
    loop.submit(make_request(1, 5, 40))
    loop.submit(make_request(0, 5, 4, "slow"))
    loop.step()
    assert executor.loads
    loop.abort("r0")
    loop.abort("r1")
    loop.remove_adapter("slow")
    run(loop)
    assert not executor.loads and forgotten == ["slow"] and loop.pool.num_free == loop.pool.capacity
