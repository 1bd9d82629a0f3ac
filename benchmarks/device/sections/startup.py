"""Section `startup`: an engine as serving builds it, in a process of its own, cold and then from the cache of programs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.device import processes, program_cache
from benchmarks.device.report import Case, Report, Row, Skip
from benchmarks.device.scale import Scale

LIMIT_SECONDS = 300.0
"""Limit of a start with 78 to 104 programs and 8 for scratch, none of them compiled before."""


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    caches: list[tempfile.TemporaryDirectory[str]] = []

    def cold() -> list[Row]:
        caches.append(tempfile.TemporaryDirectory(prefix="programs-"))
        return start(scale, Path(caches[0].name), "cold", deadline)

    def warm() -> list[Row]:
        if not caches or not any(Path(caches[0].name).iterdir()):
            raise Skip("the cold start left no programs")
        with caches.pop() as cache:
            return start(scale, Path(cache), "from the cache", deadline)

    return [Case("cold", cold, LIMIT_SECONDS + 10), Case("from the cache", warm, LIMIT_SECONDS + 10)]


def start(scale: Scale, cache: Path, name: str, deadline: float) -> list[Row]:
    environment = os.environ | program_cache.environment(cache)
    command = [sys.executable, "-m", "benchmarks.device.sections.start_engine", scale.name]
    begin = time.perf_counter()
    why, lines = processes.run_json(command, environment, processes.seconds_until(deadline, LIMIT_SECONDS))
    if why is not None:
        raise Skip(why)
    seconds = round(time.perf_counter() - begin, 2)
    return [{"start": name, "s in all": seconds, **json.loads(lines[-1])}]
