"""The loop after a step has raised: wherever it did, every request still gets the tokens it gets without."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.memory.adapters import AdapterTier
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import RequestState
from chameleon_jax.systems import SYSTEMS
from tests.chameleon_jax.fake_executor import FakeGuide
from tests.chameleon_jax.loop_traffic import adapter, expected, make_loop, make_request, run
from tests.properties import examples

CALLS = ("dispatch", "draw", "collect", "begin_load", "poll_loads", "cancel_load")


class Broken(RuntimeError):
    """What the device raises."""


def break_at(executor, calls) -> None:
    """Has the n-th call of a method raise, before or after it has done its work."""
    for name in CALLS:
        faults = {at: after for call, at, after in calls if call == name}
        method, count = getattr(executor, name), [0]

        def faulty(*args, method=method, count=count, faults=faults, **kwargs):
            count[0] += 1
            after = faults.get(count[0])
            if after is False:
                raise Broken
            result = method(*args, **kwargs)
            if after is True:
                raise Broken
            return result

        setattr(executor, name, faulty)


def run_recovering(loop, limit: int = 5000) -> int:
    faults = 0
    for _ in range(limit):
        if not loop.has_unfinished:
            return faults
        try:
            loop.step()
        except Broken:
            loop.recover()
            faults += 1
            assert loop.pool.usage().kv == 0 and not loop.scheduler.running
            assert all(entry.tier is AdapterTier.HOST for entry in loop.cache.entries())
    raise AssertionError("the loop does not end")


@examples(300)
@given(
    traffic=st.lists(st.tuples(st.integers(1, 45), st.integers(1, 30), st.integers(0, 4)), min_size=1, max_size=15),
    calls=st.lists(st.tuples(st.sampled_from(CALLS), st.integers(1, 40), st.booleans()), min_size=1, max_size=4),
    num_pages=st.integers(26, 60),
    load_polls=st.integers(0, 5),
    system=st.sampled_from(list(SYSTEMS)),
)
def test_random_faults(traffic, calls, num_pages, load_polls, system):
    loop, executor, _ = make_loop(num_pages, load_polls, system=system)
    for i in range(4):
        loop.adapters.add(f"a{i}", adapter(f"a{i}", 1 + 2 * i))
    break_at(executor, calls)
    requests = [
        make_request(number, prompt, output, None if which == 4 else f"a{which}", stop_token_ids=[3])
        for number, (prompt, output, which) in enumerate(traffic)
    ]
    for request in requests[::2]:
        request.guide = FakeGuide()
    for request in requests:
        loop.submit(request)
    faults = run_recovering(loop)
    assert loop.counters.faults == faults
    for request in requests:
        assert request.output_token_ids == expected(executor, request)
        assert request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
    usage = loop.pool.usage()
    assert usage.kv == 0 and usage.free + usage.adapters == usage.total
    assert not loop.scheduler.num_waiting and loop.cache.num_loading == 0


def test_running_requests_are_recomputed_and_waiting_ones_kept():
    loop, executor, _ = make_loop(60, max_num_seqs=2)
    requests = [make_request(i, 5, 8) for i in range(4)]
    for request in requests:
        loop.submit(request)
    for _ in range(4):
        loop.step()
    ran, waited = requests[:2], requests[2:]
    assert [r.state for r in requests] == [RequestState.RUNNING] * 2 + [RequestState.WAITING] * 2
    so_far = [list(r.output_token_ids) for r in ran]
    break_at(executor, [("collect", 1, False)])
    with pytest.raises(Broken):
        loop.step()
    loop.recover()
    assert [r.metrics.num_faults for r in requests] == [1, 1, 0, 0] and loop.unfinished == requests
    assert [r.output_token_ids for r in ran] == so_far and so_far[0]
    run_recovering(loop)
    assert [r.output_token_ids for r in ran + waited] == [expected(executor, r) for r in ran + waited]


def test_a_loop_that_has_failed_does_not_go_on_by_itself():
    loop, executor, _ = make_loop(60)
    loop.submit(make_request(0, 5, 8))
    break_at(executor, [("dispatch", 1, False)])
    with pytest.raises(Broken):
        loop.step()
    with pytest.raises(RuntimeError, match="recover"):
        loop.step()
    loop.recover()
    run_recovering(loop)


def test_adapters_that_were_removed_are_forgotten_by_the_recovery():
    loop, executor, forgotten = make_loop(60)
    loop.adapters.add("a", adapter("a", 3))
    loop.adapters.add("b", adapter("b", 3))
    loop.adapters.pin("b")
    loop.submit(make_request(0, 5, 8, "a"))
    loop.submit(make_request(1, 5, 8, "b"))
    for _ in range(4):
        loop.step()
    loop.adapters.remove("a")
    break_at(executor, [("dispatch", 1, False)])
    with pytest.raises(Broken):
        loop.step()
    loop.recover()
    assert forgotten == []  # its request is still to finish with it
    run_recovering(loop)
    assert forgotten == ["a"] and loop.cache.entry("b").pinned


class BrokenStream:
    """Detokeniser that raises at its second token."""

    tokens = 0

    def append(self, token_id: int) -> str:
        self.tokens += 1
        if self.tokens == 2:
            raise Broken
        return ""

    def flush(self) -> str:
        return ""


def test_a_request_that_ended_in_the_step_that_failed_has_ended():
    loop, executor, _ = make_loop(60)
    ends, breaks = make_request(0, 5, 2), make_request(1, 5, 4)
    breaks.stream = BrokenStream()
    for request in (ends, breaks):
        loop.submit(request)
    with pytest.raises(Broken):
        run(loop)
    loop.recover()
    run(loop)
    assert ends.output_token_ids == expected(executor, ends) and ends.finish_reason is FinishReason.LENGTH
    assert breaks.finish_reason is FinishReason.LENGTH
