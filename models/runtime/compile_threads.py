"""Threads that compile programs: at once, or in the background while steps run."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

THREAD_NAME = "compile-"
"""Start of the names of the threads that compile in the background."""

Job = TypeVar("Job")


def num_threads() -> int:
    """Choose the number of threads that compile at once. XLA uses further ones."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    return min(16, processors)


def on_threads(run: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    """Run compile jobs and return their results, with the garbage collector off.

    It would visit all that tracing keeps again and again, a fifth of the time (docs/experiments.md).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        with ThreadPoolExecutor(num_threads()) as threads:
            return list(threads.map(run, jobs))
    finally:
        if collects:
            gc.enable()


def is_compiling() -> bool:
    """Return whether a thread of this process compiles programs in the background."""
    return any(thread.name.startswith(THREAD_NAME) for thread in threading.enumerate())


class CompileQueue(Generic[Job]):
    """Programs to compile, the most wanted first.

    A program that cannot be compiled is logged and left out. The threads end with the last program, with `close`, or with the
    interpreter; each finishes the program at hand first, as a compilation cannot be interrupted.

    Args:
        jobs: Programs, in the order in which they are compiled where none is wanted.
        run: Compiles one. Called on several threads.
        threads: Number of threads.
    """

    def __init__(self, jobs: Sequence[Job], run: Callable[[Job], object], threads: int):
        self._waiting = list(jobs)
        self._run = run
        self._lock = threading.Lock()
        self._left = len(jobs)  # not compiled yet; those at hand are among them
        self._failed = 0
        self._closed = False
        self._begin = 0.0
        self._threads = [threading.Thread(target=self._work, name=f"{THREAD_NAME}{i}") for i in range(min(threads, len(jobs)))]

    def start(self) -> None:
        """Begin to compile."""
        self._begin = time.perf_counter()
        for thread in self._threads:
            thread.start()

    @property
    def is_empty(self) -> bool:
        """Whether every program was compiled, or has failed."""
        return not self._left

    def want(self, jobs: Iterable[Job]) -> None:
        """Compile some of the programs next, the first of them first."""
        with self._lock:
            wanted = [job for job in jobs if job in self._waiting]
            if wanted:
                self._waiting = [*wanted, *(job for job in self._waiting if job not in wanted)]

    def close(self) -> None:
        """Compile nothing further. Does not wait for the programs at hand."""
        with self._lock:
            self._closed = True
            self._waiting.clear()

    def _next(self) -> Job | None:
        with self._lock:
            if not self._waiting or not threading.main_thread().is_alive():
                return None
            return self._waiting.pop(0)

    def _work(self) -> None:
        while (job := self._next()) is not None:
            failed = False
            try:
                self._run(job)
            except Exception:  # the steps that want it run a larger one
                logger.exception("%s could not be compiled; larger programs serve in its place", job)
                failed = True
            with self._lock:
                self._left -= 1
                self._failed += failed
                ended = not self._left and not self._closed
            if ended:
                compiled = "all programs are" if not self._failed else f"all programs but {self._failed} are"
                logger.info("%s compiled, after %.1f s in the background", compiled, time.perf_counter() - self._begin)
