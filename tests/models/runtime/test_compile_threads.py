"""Threads that compile programs in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from chameleon_jax.models.runtime.compile_threads import CompileQueue, on_threads

SOON = 10.0
"""Seconds within which a thread has done what a test waits for."""


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < end, "not in time"
        time.sleep(1e-3)


class Gate:
    """Compiler that is told when it may compile the next program."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.done: list[str] = []
        self._may = threading.Semaphore(0)

    def __call__(self, job: str) -> None:
        self.begun.append(job)
        assert self._may.acquire(timeout=SOON)
        if job == "broken":
            raise RuntimeError("no such instruction")
        self.done.append(job)

    def open(self, times: int = 1) -> None:
        self._may.release(times)


def test_programs_are_compiled_in_order_and_wanted_ones_first():
    gate = Gate()
    queue = CompileQueue(["a", "b", "c", "d", "e"], gate, threads=1)
    queue.start()
    wait_until(lambda: gate.begun == ["a"])
    queue.want(["d", "c"])
    queue.want(["e", "a", "unknown"])
    assert not queue.is_empty
    gate.open(5)
    wait_until(lambda: queue.is_empty)
    assert gate.done == ["a", "e", "d", "c", "b"]
    queue.want(["a"])
    assert queue.is_empty


def test_threads_share_the_programs():
    gate = Gate()
    queue = CompileQueue(list("abcd"), gate, threads=3)
    queue.start()
    wait_until(lambda: len(gate.begun) == 3)
    gate.open(4)
    wait_until(lambda: queue.is_empty)
    assert sorted(gate.done) == list("abcd")


def test_a_program_that_fails_is_left_out(caplog):
    gate = Gate()
    with caplog.at_level("INFO"):
        queue = CompileQueue(["broken", "a"], gate, threads=1)
        queue.start()
        gate.open(2)
        wait_until(lambda: queue.is_empty and "all programs but 1 are compiled" in caplog.text)
    assert gate.done == ["a"] and "no such instruction" in caplog.text


def test_a_closed_queue_compiles_the_program_at_hand_only():
    gate = Gate()
    queue = CompileQueue(["a", "b"], gate, threads=1)
    queue.start()
    wait_until(lambda: gate.begun == ["a"])
    queue.close()
    gate.open(2)
    wait_until(lambda: not any(thread.name.startswith("compile-") for thread in threading.enumerate()))
    assert gate.done == ["a"]


def test_nothing_to_compile():
    queue = CompileQueue([], pytest.fail, threads=2)
    queue.start()
    assert queue.is_empty


def test_jobs_on_threads_keep_their_order():
    assert on_threads(lambda n: n * n, range(20)) == [n * n for n in range(20)]
