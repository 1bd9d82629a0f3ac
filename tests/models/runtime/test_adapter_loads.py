"""Loads on a device whose transfers and copies end when the test says so."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chameleon_jax.models.adapters.transfers import MIN_TRANSFER_BYTES, PieceSizes, PinnedBlock
from tests.models.runtime.adapter_link import LOAD_PAGES, PAGE_BYTES, SIZES, Bench, Event, FakeDevice


def numbers_sent(device: FakeDevice) -> list[int]:
    return [int(np.asarray(event.piece).flat[0]) for event in device.link]


def test_a_load_is_sent_at_once_and_written_when_it_has_arrived():
    bench = Bench()
    bench.begin(1, 11)
    assert [event.piece.shape[1] for event in bench.device.link] == [8, 2, 1]
    assert bench.poll() == [] and not bench.device.writes
    bench.device.arrive(2)
    assert bench.poll() == [] and len(bench.device.writes) == 2
    bench.device.arrive()
    bench.now += 2.0
    [result] = bench.poll()
    assert result.content_hash == "1" and result.error is None
    assert result.num_bytes == 11 * PAGE_BYTES and result.seconds == 2.0
    bench.check("1", 1)
    assert len(bench.loads) == 0
    assert all(not event.blocked for event in bench.device.link + bench.device.writes)


def test_the_oldest_load_has_the_link_first():
    bench = Bench()
    for number in (1, 2, 3):
        bench.begin(number, 5 * LOAD_PAGES)
    ended = []
    while len(bench.loads):
        bench.device.arrive()
        bench.device.run()
        ended += bench.names(bench.poll())
    assert numbers_sent(bench.device) == [1] * 5 + [2] * 5 + [3] * 5
    assert ended == ["1", "2", "3"]


def test_a_small_piece_does_not_pass_a_large_one_of_an_older_load():
    bench = Bench()
    bench.begin(1, 3 * LOAD_PAGES + 4)
    bench.begin(2, LOAD_PAGES)
    bench.begin(3, 1)
    assert numbers_sent(bench.device) == [1, 1, 1, 1]
    bench.device.arrive()
    bench.poll()
    assert numbers_sent(bench.device) == [1, 1, 1, 1, 2, 3]


def test_a_load_from_disk_does_not_hold_the_link():
    bench = Bench()
    bench.store.on_disk["1"] = Future()
    bench.begin(1, 2 * LOAD_PAGES)
    bench.begin(2, 6 * LOAD_PAGES)
    assert numbers_sent(bench.device) == [2] * 4
    bench.store.on_disk["1"].set_result(bench.store.blocks["1"])
    bench.device.arrive(2)
    bench.poll()
    assert numbers_sent(bench.device) == [2] * 4 + [1] * 2  # it is the older one


def test_what_is_on_the_way_is_bounded():
    bench = Bench()
    for number in range(6):
        bench.begin(number, 3 * LOAD_PAGES + number)
        assert bench.loads.bytes_on_the_way <= MIN_TRANSFER_BYTES
    while len(bench.loads):
        bench.device.arrive()
        bench.poll()
        unwritten = len(bench.device.link) - len(bench.device.writes)
        assert unwritten > 0 or not len(bench.loads)  # the link is never idle
        assert bench.loads.bytes_on_the_way <= MIN_TRANSFER_BYTES
        bench.device.run()
    for number in range(6):
        bench.check(str(number), number)


def test_a_piece_larger_than_the_bound_travels_alone():
    bench = Bench(pieces=PieceSizes(PAGE_BYTES, 2, max_bytes=PAGE_BYTES // 2))
    bench.begin(1, 5)
    while len(bench.loads):
        assert bench.loads.bytes_on_device <= 2 * PAGE_BYTES
        bench.device.arrive()
        bench.poll()
        bench.device.run()
    assert [event.piece.shape[1] for event in bench.device.link] == [2, 2, 1]
    bench.check("1", 1)


def test_what_waits_to_be_written_counts_too():
    bench = Bench()
    bench.begin(1, 20 * LOAD_PAGES)
    for _ in range(10):  # the device is busy with a long step
        bench.device.arrive(100)
        assert bench.poll() == []
    assert len(bench.device.writes) == len(bench.device.link) == 8
    assert bench.device.held == SIZES.device_bytes
    assert bench.names(bench.poll(wait=True)) == ["1"]
    bench.check("1", 1)


def test_waiting_ends_with_the_first_load_and_sleeps():
    bench = Bench()
    for number in (1, 2):
        bench.begin(number, 6 * LOAD_PAGES)
    assert bench.names(bench.poll(wait=True)) == ["1"]
    assert [event.blocked for event in bench.device.link][:6] == [1] * 6
    assert bench.names(bench.poll(wait=True)) == ["2"]
    assert bench.poll(wait=True) == []


def test_waiting_for_the_disk():
    bench = Bench()
    future: Future[PinnedBlock] = Future()
    bench.store.on_disk["1"] = future
    bench.begin(1, 3)
    cpu = time.thread_time()
    timer = threading.Timer(0.3, lambda: future.set_result(bench.store.blocks["1"]))
    timer.start()
    assert bench.names(bench.poll(wait=True)) == ["1"]
    assert time.thread_time() - cpu < 0.1
    timer.join()


def test_a_cancelled_load_is_never_written_again_and_counts_until_it_has_arrived():
    bench = Bench()
    bench.begin(1, 6 * LOAD_PAGES)
    bench.device.arrive()
    bench.poll()
    bench.loads.cancel("1")
    assert bench.loads.bytes_on_the_way == MIN_TRANSFER_BYTES  # they still take the device's memory
    bench.begin(2, LOAD_PAGES)
    assert numbers_sent(bench.device) == [1] * 5
    bench.device.arrive(2)
    assert bench.poll() == []
    assert numbers_sent(bench.device) == [1] * 5 + [2]
    bench.device.arrive(100)
    assert bench.names(bench.poll()) == ["2"]
    assert Counter(int(n) for n in bench.device.written) == {1: LOAD_PAGES, 2: LOAD_PAGES}
    assert bench.loads.bytes_on_the_way == 0


def test_begun_again_after_it_was_cancelled():
    bench = Bench()
    bench.begin(1, 2)
    old = bench.pages["1"]
    bench.loads.cancel("1")
    bench.begin(1, 2)
    assert bench.names(bench.poll(wait=True)) == ["1"]
    bench.check("1", 1)
    assert not set(old) & set(bench.device.memory)


def test_cancelled_when_it_has_ended_but_was_not_reported():
    bench = Bench()
    bench.device.put_error = RuntimeError("out of memory")
    bench.begin(1, 2)
    bench.loads.cancel("1")
    assert bench.poll() == []


@pytest.mark.parametrize("wait", [False, True])
def test_a_transfer_that_fails_ends_its_load_only(wait):
    bench = Bench()
    for number in (1, 2):
        bench.begin(number, LOAD_PAGES + 3)
    bench.device.link[1].error = OSError("the link is down")
    bench.device.arrive(0 if wait else 100)
    results = {}
    while len(bench.loads):
        results |= {result.content_hash: result.error for result in bench.poll(wait)}
    assert results["2"] is None and "link is down" in str(results["1"])
    bench.check("2", 2)
    written = len(bench.device.written)
    bench.device.arrive(100)
    assert bench.poll() == [] and bench.loads.bytes_on_the_way == 0
    assert len(bench.device.written) == written


def test_a_transfer_that_cannot_start_ends_its_load_only():
    bench = Bench()
    bench.begin(1, 1)
    bench.device.put_error = RuntimeError("out of memory")
    bench.begin(2, 1)
    bench.device.put_error = None
    bench.begin(3, 1)
    bench.device.arrive(100)
    assert {r.content_hash: str(r.error) for r in bench.poll()} == {"1": "None", "2": "out of memory", "3": "None"}


def test_a_block_that_is_missing_or_of_another_size():
    bench = Bench()
    bench.loads.begin("missing", [1, 2])
    bench.begin(1, 3)
    bench.loads.cancel("1")
    bench.loads.begin("1", [7, 8])
    errors = {result.content_hash: result.error for result in bench.poll()}
    assert isinstance(errors["missing"], KeyError) and "has 3 pages; it was given 2" in str(errors["1"])


def test_copies_are_all_sent():
    bench = Bench(copies=2)
    bench.begin(1, LOAD_PAGES + 1)
    assert [event.piece.shape[1] for event in bench.device.link] == [8, 8, 1, 1]
    [result] = bench.poll(wait=True)
    assert result.num_bytes == 2 * (LOAD_PAGES + 1) * PAGE_BYTES
    bench.check("1", 1)


def test_an_interrupt_while_waiting_loses_nothing(monkeypatch):
    bench = Bench()
    bench.begin(1, LOAD_PAGES + 1)

    def interrupted(event):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Event, "block_until_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.poll(wait=True)
    assert bench.names(bench.poll(wait=True)) == ["1"]
    bench.check("1", 1)


OPERATIONS = st.one_of(
    st.tuples(st.just("begin"), st.integers(1, 40)),
    st.tuples(st.sampled_from(["arrive", "fail", "run", "cancel", "disk", "poll", "wait", "step"]), st.integers(0, 5)),
)


@settings(max_examples=200, deadline=None)
@given(operations=st.lists(OPERATIONS, max_size=60))
def test_whatever_happens(operations):
    bench = Bench()
    live: dict[str, int] = {}
    waiting: list[str] = []  # on disk
    cancelled: Counter[int] = Counter()
    doomed: set[str] = set()

    def report(results):
        for result in results:
            number = live.pop(result.content_hash)
            if result.error is None:
                assert result.content_hash not in doomed
                bench.check(result.content_hash, number)
            else:
                assert result.content_hash in doomed

    for number, (operation, value) in enumerate(operations):
        if operation == "begin":
            name = str(number)
            if value % 3 == 0:
                bench.store.on_disk[name] = Future()
                waiting.append(name)
            live[name] = number
            bench.begin(number, value)
        elif operation == "disk" and waiting:
            name = waiting.pop(value % len(waiting))
            bench.store.on_disk[name].set_result(bench.store.blocks[name])
        elif operation == "arrive":
            bench.device.arrive(value)
        elif operation == "fail":
            for event in [event for event in bench.device.link if not event.happened][:1]:
                event.happened, event.error = True, OSError("lost")
                doomed.add(str(int(np.asarray(event.piece).flat[0])))
        elif operation == "run":
            bench.device.run()
        elif operation == "cancel" and live:
            name = list(live)[value % len(live)]
            bench.loads.cancel(name)
            gone = live.pop(name)
            cancelled[gone] = sum(int(n) == gone for n in bench.device.written)
        elif operation == "poll":
            report(bench.poll())
        elif operation == "step":
            report(bench.step(value * 0.004))
        elif operation == "wait" and set(live) - set(waiting):
            before = len(live)
            report(bench.poll(wait=True))
            assert len(live) < before
        assert bench.loads.bytes_on_the_way <= bench.loads.bytes_on_device <= SIZES.device_bytes
    for name in waiting:
        bench.store.on_disk[name].set_result(bench.store.blocks[name])
    while live:
        report(bench.poll(wait=True))
    for gone, written in cancelled.items():
        assert sum(int(n) == gone for n in bench.device.written) == written
    bench.device.arrive(10**6)
    assert bench.poll() == [] and bench.loads.bytes_on_the_way == 0
