"""Programs of a section, compiled side by side; a case waits for each, so that a program that hangs costs its own case."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from benchmarks.device.report import Case, Report, Row

FIRST_SECONDS = 75.0
"""Seconds for which the first case waits, as all programs are compiled at the same time."""
LIMIT_SECONDS = 50.0
"""Seconds for which each of the others waits."""


class Compilation:
    """Cases that compile before others measure.

    Args:
        section: Section to which the cases belong.
        jobs: Functions that compile a program, by name; each is called on some thread.
        prepare: Called once before all jobs, on the thread that runs the cases.
    """

    def __init__(self, report: Report, section: str, jobs: Mapping[str, Callable[[], Any]], prepare: Callable[[], Any]):
        self._report, self._section, self._jobs, self._prepare = report, section, jobs, prepare
        self._running: dict[str, Future[float]] = {}

    def begin(self, name: str, priority: int = 0) -> Case:
        """Case that begins to compile and does not wait.

        Without it, or in a process that follows on another, the first wait begins.
        """
        return Case(name, self._begin, 90.0, priority)

    def cases(self, priority: int = 0) -> list[Case]:
        """Cases that wait, one for each program."""
        limits = [FIRST_SECONDS, *[LIMIT_SECONDS] * len(self._jobs)]
        return [
            Case(_case(name), functools.partial(self._wait, name), limit, priority) for name, limit in zip(self._jobs, limits)
        ]

    def failed(self, name: str) -> bool:
        """Return whether the program is known not to compile; it is then asked for no more."""
        return self._report.failed(self._section, _case(name))

    def _begin(self) -> list[Row]:
        self._start()
        return [{"programs asked for": len(self._running)}]

    def _wait(self, name: str) -> list[Row]:
        if not self._running:
            self._start()
        return [{"program": name, "s to compile": round(self._running[name].result(), 1)}]

    def _start(self) -> None:
        self._prepare()
        missing = [name for name in self._jobs if not self._report.has(self._section, _case(name))]
        pool = threads()
        self._running = {name: pool.submit(_timed, self._jobs[name]) for name in missing}
        pool.shutdown(wait=False)


def _case(name: str) -> str:
    return f"compile, {name}"


def threads() -> ThreadPoolExecutor:
    """Threads to compile on."""
    return ThreadPoolExecutor(min(16, os.cpu_count() or 1))


def _timed(job: Callable[[], Any]) -> float:
    """Run a job, and return its seconds."""
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin
