"""The machine that a benchmark runs on: its description, its ceilings, and results in Markdown and JSON that name it."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

Row = dict[str, Any]
"""Row of a table, by column."""
Out = Annotated[Path | None, typer.Option(help="JSON file for the result (default: the result is only printed).")]
DRIVER_SECONDS = 60.0
"""Patience with the GPU's driver; after it the machine counts as one without a GPU."""


def describe(command: str | None = None) -> dict[str, Any]:
    """Machine, date, versions and command of a result; a `command` of None is the one that runs."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, {gpu_name() or 'no GPU'}",
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "command": command or shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }


def gpu_name() -> str | None:
    """Names of the GPUs and version of their driver, asked of the driver: JAX would take the GPUs' memory."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return "; ".join(listed.stdout.split("\n")[:-1]) if listed.returncode == 0 else None


def markdown(rows: Iterable[Row]) -> list[str]:
    """Lines of Markdown tables; a row whose columns differ from those before it begins a new table."""
    lines: list[str] = []
    header: list[str] = []
    for row in rows:
        if list(row) != header:
            header = list(row)
            lines += [""] * bool(lines) + ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines.append("| " + " | ".join(map(str, row.values())) + " |")
    return lines


def save(result: dict[str, Any], out: Path | None) -> None:
    """Write a result as JSON, unless `out` is None."""
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def publish(result: dict[str, Any], out: Path | None) -> None:
    """Save a result, and print it with its `table`, a list of rows, in Markdown."""
    save(result, out)
    for key, value in result.items():
        if key != "table":
            print(f"{key}: {value}")
    print("", *markdown(result["table"]), sep="\n")


def seconds_of(call: Callable[[], object], repeat: int, before: Callable[[], object] | None = None) -> list[float]:
    """Wall time of each of some calls, which return when their work is done, seconds.

    `before` is called ahead of each, outside its time.
    """
    samples = []
    for _ in range(repeat):
        if before is not None:
            before()
        begin = time.perf_counter()
        call()
        samples.append(time.perf_counter() - begin)
    return samples


def read_bandwidth(threads: int | None = None, mbytes: int = 512, repeat: int = 5) -> float:
    """Bytes a second that all cores together read from memory, the best of some passes over arrays far beyond the caches.

    Every thread takes the maximum of a float32 array of its own (NumPy releases the GIL), so nothing is written.
    """
    threads = threads or os.cpu_count() or 1
    arrays = [np.ones(mbytes * 2**20 // 4 // threads, np.float32) for _ in range(threads)]

    def read() -> None:
        workers = [threading.Thread(target=np.max, args=(array,)) for array in arrays]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return sum(array.nbytes for array in arrays) / min(seconds_of(read, repeat))


def matmul_rate(size: int = 1024, repeat: int = 50) -> float:
    """Float32 operations a second of a large matrix product through XLA on the default device, the best of some."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    return 2 * size**3 / min(seconds_of(lambda: multiply(a).block_until_ready(), repeat))
