"""Section `serve_curve`: time to first token at two loads, by the benchmark `serve-curve` in a process of its own."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import FULL, Scale

OPTIONS = "--system s-lora --system chameleon-plus --rps 10 --rps 20 --duration 20 --num-adapters 100"
SMALL_OPTIONS = (
    "tiny --system s-lora --system chameleon --rps 8 --duration 0.5 --num-adapters 4 --ranks 4,8 --length-factor 0.02 "
    "--max-input 32 --max-output 8 --max-num-seqs 1 --max-num-batched-tokens 32 --num-pages 200 --lora-host-gib 1 "
    "--predictor oracle --compile-programs lazy"
)
LIMIT_SECONDS = 400.0


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    options = OPTIONS if scale == FULL else SMALL_OPTIONS
    return [Case("two systems at two loads", functools.partial(serve, options), LIMIT_SECONDS)]


def serve(options: str) -> Iterator[Row]:
    """Yield rows as the process prints them, so that they are kept if it is killed.

    Raises:
        RuntimeError: The process failed.
    """
    begin = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks", "serve-curve", *options.split()]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
    ):
        for line in process.stdout or ():
            if line.startswith("{"):
                yield json.loads(line) | {"s since the start": round(time.perf_counter() - begin, 1)}
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"exit code {process.returncode}\n{errors.read()[-1200:]}")
