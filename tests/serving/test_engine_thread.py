"""The thread that owns an engine, over a loop whose device is a fake: order, faults, hangs, and that nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from chameleon_jax.errors import EngineDead
from chameleon_jax.executor import LoadResult
from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.outputs import FinishReason
from chameleon_jax.request import Request
from chameleon_jax.serving.engine_thread import EngineThread
from tests.chameleon_jax.loop_traffic import adapter, expected, make_loop, make_request

TIMEOUT = 30


class FakeEngine:
    """Parts of an `LLMEngine` that the thread uses."""

    def __init__(self, load_polls: int = 1):
        self.loop, self.executor, _ = make_loop(60, load_polls)
        for name in ("a", "b"):
            self.loop.adapters.add(name, adapter(name, 3))


class Ears:
    """Streams and their observers as one, which remembers and can be waited for."""

    def __init__(self) -> None:
        self.observers = self
        self.updates: dict[str, list[OutputSnapshot]] = {}
        self.loads: list[LoadResult] = []
        self.deaths: list[EngineDead] = []
        self._changed = threading.Condition()

    def updated(self, updates: list[OutputSnapshot]) -> None:
        with self._changed:
            for update in updates:
                self.updates.setdefault(update.request.request_id, []).append(update)
            self._changed.notify_all()

    def loaded(self, result: LoadResult) -> None:
        self.loads.append(result)

    def engine_died(self, error: EngineDead) -> None:
        with self._changed:
            self.deaths.append(error)
            self._changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, TIMEOUT)

    def wait_for_end(self, *requests: Request) -> None:
        self.wait(lambda: all(r.request_id in self.updates and self.updates[r.request_id][-1].finished for r in requests))


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def ears():
    return Ears()


@pytest.fixture
def thread(engine, ears):
    thread = EngineThread(engine, ears)
    yield thread
    assert thread.close(TIMEOUT)


def submit(thread: EngineThread, *requests: Request) -> None:
    for request in requests:
        thread.call(lambda engine, request=request: engine.loop.submit(request)).result(TIMEOUT)


def failing(times: int | None) -> Callable[..., object]:
    """A `dispatch` that raises so many times (None: always) and then goes on."""
    left = [times]

    def wrap(dispatch):
        def broken(plan):
            if left[0] is None or left[0] > 0:
                left[0] = None if left[0] is None else left[0] - 1
                raise RuntimeError("device lost")
            return dispatch(plan)

        return broken

    return wrap


def test_updates_grow_and_end(engine, ears, thread):
    requests = [make_request(i, 5, 8, [None, "a", "b"][i]) for i in range(3)]
    submit(thread, *requests)
    ears.wait_for_end(*requests)
    for request in requests:
        counts = [update.num_tokens for update in ears.updates[request.request_id]]
        assert counts == sorted(counts) and counts[-1] == 8
        assert request.output_token_ids == expected(engine.executor, request)
        assert sum(update.finished for update in ears.updates[request.request_id]) == 1
    assert sorted(result.content_hash for result in ears.loads) == ["a", "b"]


def test_calls_return_what_they_return_and_raise_what_they_raise(thread):
    assert thread.call(lambda engine: engine.loop.counters.steps).result(TIMEOUT) == 0
    with pytest.raises(KeyError):
        thread.call(lambda engine: {}["x"]).result(TIMEOUT)


def test_a_call_is_executed_while_a_load_is_awaited(ears):
    engine = FakeEngine(load_polls=1_000_000)
    thread = EngineThread(engine, ears)
    request = make_request(0, 5, 8, "a")
    submit(thread, request)
    assert thread.call(lambda engine: engine.loop.awaits_load or True).result(TIMEOUT)
    other = make_request(1, 5, 3)
    submit(thread, other)  # the base model does not wait for anybody's adapter
    ears.wait_for_end(other)
    assert request.request_id not in ears.updates
    assert thread.abort(request.request_id).result(TIMEOUT)
    ears.wait_for_end(request)
    thread.close(TIMEOUT)


def test_abort(ears):
    thread = EngineThread(FakeEngine(load_polls=1_000_000), ears)
    request = make_request(0, 5, 60, "a")
    submit(thread, request)
    assert thread.abort(request.request_id).result(TIMEOUT) is True
    ears.wait_for_end(request)
    assert request.finish_reason is FinishReason.ABORT
    assert thread.abort(request.request_id).result(TIMEOUT) is False
    assert thread.abort("nobody").result(TIMEOUT) is False
    thread.close(TIMEOUT)


def test_a_cancelled_call_is_not_executed(engine, thread):
    gate, executed = threading.Event(), []
    first = thread.call(lambda engine: gate.wait(TIMEOUT))
    second = thread.call(lambda engine: executed.append(1))
    assert second.cancel()
    gate.set()
    assert first.result(TIMEOUT)
    assert thread.call(lambda engine: executed).result(TIMEOUT) == []


def test_one_fault_is_outlived(engine, ears, thread):
    first, second = make_request(0, 5, 8), make_request(1, 5, 8, "a")
    warm = make_request(2, 3, 2)
    submit(thread, warm)
    ears.wait_for_end(warm)
    engine.executor.dispatch = failing(1)(engine.executor.dispatch)
    submit(thread, first, second)
    ears.wait_for_end(first, second)
    assert thread.error is None and engine.loop.counters.faults == 1
    for request in (first, second):
        assert request.output_token_ids == expected(engine.executor, request)


def test_a_second_fault_much_later_is_outlived_too(engine, ears, thread):
    for number in range(3):
        engine.executor.dispatch = failing(1)(engine.executor.dispatch)
        request = make_request(number, 5, 8)
        submit(thread, request)
        ears.wait_for_end(request)
        assert request.finish_reason is FinishReason.LENGTH
    assert thread.error is None and engine.loop.counters.faults == 3


def test_a_fault_that_stays_ends_everything(engine, ears, thread):
    engine.executor.dispatch = failing(None)(engine.executor.dispatch)
    submit(thread, make_request(0, 5, 8))
    ears.wait(lambda: bool(ears.deaths))
    assert len(ears.deaths) == 1 and "device lost" in str(thread.error)
    assert engine.loop.counters.faults == 1  # it was given one more chance
    for future in (thread.call(lambda engine: None), thread.abort("r0")):
        with pytest.raises(EngineDead, match="device lost"):
            future.result(TIMEOUT)


def test_a_device_that_cannot_be_brought_back(engine, ears, thread):
    def no_reset():
        raise RuntimeError("no device")

    engine.executor.dispatch = failing(1)(engine.executor.dispatch)
    engine.executor.reset = no_reset
    submit(thread, make_request(0, 5, 8))
    ears.wait(lambda: bool(ears.deaths))
    assert "device lost" in str(thread.error) and "no device" in str(thread.error)


def test_a_hung_step_is_given_up(engine, ears, thread):
    hangs, gate = threading.Event(), threading.Event()
    dispatch = engine.executor.dispatch

    def hang(plan):
        hangs.set()
        gate.wait(TIMEOUT)
        return dispatch(plan)

    engine.executor.dispatch = hang
    submit(thread, make_request(0, 5, 8))
    assert hangs.wait(TIMEOUT)
    late = thread.call(lambda engine: None)  # asked for while the step hangs
    assert thread.step_seconds > 0
    thread.die(EngineDead("it hangs"))
    with pytest.raises(EngineDead, match="hangs"):
        late.result(TIMEOUT)
    assert [str(error) for error in ears.deaths] == ["it hangs"]
    updates = len(ears.updates)
    gate.set()
    thread.close(TIMEOUT)
    assert len(ears.updates) == updates  # what the step brought after all is nobody's any more


def test_a_hung_call_is_given_up(thread):
    hangs, gate = threading.Event(), threading.Event()
    hung = thread.call(lambda engine: (hangs.set(), gate.wait(TIMEOUT)))
    assert hangs.wait(TIMEOUT) and thread.step_seconds > 0
    thread.die(EngineDead("it hangs"))
    with pytest.raises(EngineDead, match="hangs"):
        hung.result(TIMEOUT)
    gate.set()


def test_a_listener_that_raises_leaves_nobody_waiting(ears, thread, caplog):
    def broken(updates):
        raise ZeroDivisionError("a bug")

    ears.updated = broken
    submit(thread, make_request(0, 5, 8))
    ears.wait(lambda: bool(ears.deaths))
    assert "a bug" in str(thread.error) and "Traceback" in caplog.text
    with pytest.raises(EngineDead, match="a bug"):
        thread.call(lambda engine: None).result(TIMEOUT)


def test_each_caller_gets_an_error_of_its_own(thread):
    thread.die(EngineDead("lost"))
    errors = [thread.call(lambda engine: None).exception(TIMEOUT) for _ in range(2)]
    assert errors[0] is not errors[1] and str(errors[0]) == str(errors[1]) == "lost"


def test_after_close_every_call_fails(engine, ears):
    thread = EngineThread(engine, ears)
    thread.close(TIMEOUT)
    with pytest.raises(EngineDead, match="closed"):
        thread.call(lambda engine: None).result(TIMEOUT)


def test_calls_from_many_threads(engine, ears, thread):
    requests = [make_request(number, 5, 4, ["a", "b", None][number % 3]) for number in range(40)]
    askers = [threading.Thread(target=submit, args=(thread, request)) for request in requests]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(TIMEOUT)
    ears.wait_for_end(*requests)
    assert all(r.output_token_ids == expected(engine.executor, r) for r in requests)
