"""Section `serve_curve`: time to first token at two loads, by the benchmark `serve-curve` in a process of its own."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import FULL, Scale

SYSTEMS = ("--system", "s-lora", "--system", "chameleon-plus")
OPTIONS = (*SYSTEMS, "--rps", "10", "--rps", "20", "--duration", "20", "--num-adapters", "100")
SMALL_OPTIONS = (
    *("tiny", *SYSTEMS, "--rps", "8", "--duration", "1", "--num-adapters", "4", "--ranks", "4,8"),
    *("--length-factor", "0.02", "--max-input", "32", "--max-output", "8", "--max-num-seqs", "1"),
    *("--max-num-batched-tokens", "32", "--num-pages", "200", "--lora-host-gib", "1", "--predictor", "oracle"),
)
LIMIT_SECONDS = 400.0


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    options = OPTIONS if scale == FULL else SMALL_OPTIONS
    return [Case("two systems at two loads", functools.partial(serve, options), LIMIT_SECONDS)]


def serve(options: tuple[str, ...], poll_s: float = 0.5) -> Iterator[Row]:
    """Yield rows as the process writes them, so that they are kept if it is killed.

    Raises:
        RuntimeError: The process failed.
    """
    begin, seen = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(prefix="serve-curve-") as folder, tempfile.TemporaryFile("w+") as errors:
        table = Path(folder) / "curve.json"
        command = [sys.executable, "-m", "benchmarks", "serve-curve", *options, "--out", str(table)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        ended = False
        while not ended:
            ended = process.poll() is not None
            rows = _rows(table)
            for row in rows[seen:]:
                yield {**row, "s since the start": round(time.perf_counter() - begin, 1)}
            seen = max(seen, len(rows))
            if not ended:
                time.sleep(poll_s)
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"exit code {process.returncode}\n{errors.read()[-1200:]}")


def _rows(table: Path) -> list[Row]:
    """Rows in the file; none if it is missing or is being written."""
    try:
        return json.loads(table.read_text())["table"]
    except (OSError, ValueError):
        return []
