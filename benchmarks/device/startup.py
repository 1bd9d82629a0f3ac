"""Section `startup`: an engine as serving builds it, in a process of its own, cold and then from the cache of programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import FULL, Scale

LIMIT_SECONDS = 120.0
"""Of a start."""


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    caches: list[tempfile.TemporaryDirectory[str]] = []

    def cold() -> list[Row]:
        caches.append(tempfile.TemporaryDirectory(prefix="programs-"))
        return start(scale, Path(caches[0].name), "cold", deadline)

    def warm() -> list[Row]:
        if not caches or not any(Path(caches[0].name).iterdir()):
            return [{"start": "from the cache", "skipped": "the cold start left no programs"}]
        with caches.pop() as cache:
            return start(scale, Path(cache), "from the cache", deadline)

    return [Case("cold", cold), Case("from the cache", warm)]


def start(scale: Scale, cache: Path, name: str, deadline: float) -> list[Row]:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "benchmarks.device.start_engine"] + ["--small"] * (scale != FULL)
    limit = max(20.0, min(LIMIT_SECONDS, deadline - time.time()))
    begin = time.perf_counter()
    try:
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as expired:
        told = (expired.stdout or b"").decode().strip().splitlines()
        return [{"start": name, "skipped": f"more than {limit:.0f} s; {told[-1] if told else 'nothing compiled'}"}]
    if ran.returncode:
        raise RuntimeError(f"exit code {ran.returncode}\n{ran.stderr[-1200:]}")
    seconds = round(time.perf_counter() - begin, 2)
    return [{"start": name, "s in all": seconds, **json.loads(ran.stdout.strip().splitlines()[-1])}]
