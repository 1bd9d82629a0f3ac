"""Seconds from the start of a server to its first answer: SmolLM2 and the demo's adapters, the compilation cache empty or full.

`cold` starts with an empty cache of compiled programs. It ends when all programs are compiled, so that `warm`, the next start,
finds each of them. The first request is sent when the server says that it is ready, names an adapter, and draws 16 tokens.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from benchmarks.machine import Out, describe, publish

ADAPTERS = Path(__file__).parents[1] / "demo_adapters"
LOOK_S = 0.1
"""Seconds between looks at the server."""
MOST_S = 3600.0
"""Seconds after which a start has failed."""
REQUEST = {"model": "shakespeare", "prompt": "The heart of man is", "max_tokens": 16, "temperature": 0, "stream": True}


class Start:
    """Server process, and the seconds since it was started."""

    def __init__(self, mode: str, cache: str, log: Path):
        serve = ["serve", "smollm2-135m", "--port", "0", "--grpc-port", "-1", "--adapter-dir", str(ADAPTERS)]
        command = [sys.executable, "-m", "chameleon_jax.serving.cli", *serve, "--compile-programs", mode]
        self._log = log
        self._begin = time.perf_counter()
        with log.open("wb") as output:
            places = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
            places["XDG_CACHE_HOME"] = cache
            self.process = subprocess.Popen(command, stdout=output, stderr=output, env=places)

    @property
    def seconds(self) -> float:
        return round(time.perf_counter() - self._begin, 1)

    def wait(self) -> str:
        """Wait until the server is ready. Returns its URL. Raises RuntimeError where it ends or does not come up."""
        while self.seconds < MOST_S and self.process.poll() is None:
            if found := re.search(r"are served at (http://[\d.]+:\d+)", self._log.read_text(errors="replace")):
                return found[1]
            time.sleep(LOOK_S)
        raise RuntimeError(f"the server did not start: {self._log.read_text(errors='replace')[-2000:]}")


@contextlib.contextmanager
def started(mode: str, cache: str) -> Iterator[Start]:
    with tempfile.TemporaryDirectory() as folder:
        start = Start(mode, cache, Path(folder) / "log")
        try:
            yield start
        finally:
            start.process.kill()
            start.process.wait()


def measure(mode: str, cache: str) -> dict[str, Any]:
    """Start a server, ask it once, wait for its programs, and stop it."""
    with started(mode, cache) as start:
        url = start.wait()
        row: dict[str, Any] = {"ready, s": start.seconds}
        with httpx.Client(base_url=url, timeout=MOST_S) as http:
            row["programs by then"] = http.get("/health/ready").json()["programs"]["compiled"]
            with http.stream("POST", "/v1/completions", json=REQUEST) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    if line.startswith("data: {") and "first token, s" not in row:
                        row["first token, s"] = start.seconds
            row["first answer, s"] = start.seconds
            while (programs := http.get("/health/ready").json()["programs"])["compiled"] < programs["total"]:
                if start.seconds > MOST_S:
                    raise RuntimeError(f"{programs['compiled']} of {programs['total']} programs are compiled after {MOST_S} s")
                time.sleep(LOOK_S)
        row |= {"all programs, s": start.seconds, "programs": programs["total"]}
        start.process.send_signal(signal.SIGTERM)
        if start.process.wait(MOST_S) != 0:
            raise RuntimeError(f"the server ended with exit code {start.process.returncode}")
        return row


def main(
    modes: Annotated[
        str, typer.Option(help="Values of --compile-programs, background or ahead, with a comma between.")
    ] = "background,ahead",
    out: Out = None,
) -> None:
    """Measure a server's start with an empty compilation cache and with a full one."""
    rows = []
    for mode in modes.split(","):
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                rows.append({"programs are compiled": mode, "cache": state, **measure(mode, cache)})
                print(rows[-1], file=sys.stderr, flush=True)
    publish(describe() | {"table": rows}, out)
