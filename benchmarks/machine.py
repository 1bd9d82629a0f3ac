"""What a benchmark says about the machine it ran on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

DRIVER_SECONDS = 60.0
"""A driver that does not answer for so long has no GPU to offer."""


def describe(command: str) -> dict[str, Any]:
    """Machine, date, versions, command."""
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
        "command": command,
    }


def gpu_name() -> str | None:
    """The GPUs and their driver. The driver is asked and not jax, which would take their memory."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=DRIVER_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    return "; ".join(listed.stdout.split("\n")[:-1]) if listed.returncode == 0 else None


def publish(result: dict[str, Any], out: Path | None, quiet: bool = False) -> None:
    """Prints a result, its `table` (a list of rows) in Markdown, and writes it as JSON where `out` is given.

    Args:
        quiet: only writes.
    """
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
    if quiet:
        return
    for key, value in result.items():
        if key != "table":
            print(f"{key}: {value}")
    header: list[str] = []
    for row in result["table"]:
        if list(row) != header:
            header = list(row)
            print("\n| " + " | ".join(header) + " |\n|" + "---|" * len(header))
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


def read_bandwidth(threads: int | None = None, mbytes: int = 512, repeat: int = 5) -> float:
    """Bytes a second that all cores together read from memory: the best of some passes over arrays far beyond the caches.

    Every thread takes the maximum of its own float32 array (NumPy releases the GIL), so nothing is written.
    """
    threads = threads or os.cpu_count() or 1
    arrays = [np.ones(mbytes * 2**20 // 4 // threads, np.float32) for _ in range(threads)]
    best = float("inf")
    for _ in range(repeat):
        workers = [threading.Thread(target=np.max, args=(array,)) for array in arrays]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - begin)
    return sum(array.nbytes for array in arrays) / best


def matmul_rate(size: int = 1024, repeat: int = 50) -> float:
    """Float32 operations a second of a large matrix product through XLA on the default device: the best of some."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    best = float("inf")
    for _ in range(repeat):
        begin = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
