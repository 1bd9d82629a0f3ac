"""Programs of a section, compiled side by side; a case waits for each, so that one that hangs costs its own case."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from benchmarks.device.report import Case, Report, Row

LIMIT_SECONDS = 100.0
"""Seconds for which a case waits. The first one waits longest, as all are compiled at the same time."""


class Compilation:
    """Cases that compile before others measure.

    Args:
        section: of the cases.
        jobs: name -> compiles a program; called on some thread.
        prepare: called once before all of them, on the thread that runs the cases.
    """

    def __init__(self, report: Report, section: str, jobs: Mapping[str, Callable[[], Any]], prepare: Callable[[], Any]):
        self._report, self._section, self._jobs, self._prepare = report, section, jobs, prepare
        self._running: dict[str, Future[float]] = {}

    @property
    def cases(self) -> list[Case]:
        return [Case(_case(name), functools.partial(self._wait, name), LIMIT_SECONDS) for name in self._jobs]

    def failed(self, name: str) -> bool:
        """Whether the program is known not to compile. Nothing then asks for it again."""
        return self._report.failed(self._section, _case(name))

    def _wait(self, name: str) -> list[Row]:
        if not self._running:
            self._start()
        return [{"program": name, "s to compile": round(self._running[name].result(), 1)}]

    def _start(self) -> None:
        self._prepare()
        missing = [name for name in self._jobs if not self._report.has(self._section, _case(name))]
        # after one has hung the others go one by one: the next that hangs is then the one that is waited for
        alone = any(self.failed(name) for name in self._jobs)
        threads = ThreadPoolExecutor(1 if alone else min(16, os.cpu_count() or 1))
        self._running = {name: threads.submit(_timed, self._jobs[name]) for name in missing}
        threads.shutdown(wait=False)


def _case(name: str) -> str:
    return f"compile, {name}"


def _timed(job: Callable[[], Any]) -> float:
    """Seconds."""
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin
