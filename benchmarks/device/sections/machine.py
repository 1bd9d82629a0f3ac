"""Section `machine`: device and packages, and the ceilings with which all other sections compare."""

from __future__ import annotations

import functools
import importlib.metadata
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import Scale
from benchmarks.device.timing import best_of
from chameleon_jax.models.adapters.transfers import pinned_memory

PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy", "chex", "triton", "torch")


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    def keep(**ceilings: float) -> None:
        report.update(ceilings=(report.ceilings or {}) | ceilings)

    def memory() -> list[Row]:
        moved, read = copy_bandwidth(scale), read_bandwidth(scale)
        keep(copy=moved, read=read)
        return [
            {"device memory": "copy, bytes read and written", "GB/s": round(moved / 1e9, 1)},
            {"device memory": "read (a sum)", "GB/s": round(read / 1e9, 1)},
        ]

    def products() -> list[Row]:
        n = scale.matrix
        rate = matrix_rate(scale)
        keep(matrix=rate)
        return [{"matrix product": f"{n} x {n} x {n}, {scale.dtype}, random", "TFLOP/s": round(rate / 1e12, 2)}]

    def link() -> list[Row]:
        rows = link_rows(scale)
        keep(link=max(row["GB/s"] for row in rows if "pinned" in row["from"]) * 1e9)
        return rows

    return [Case("device", describe_device), Case("memory", memory), Case("matrices", products), Case("link", link)]


def ceilings_case(scale: Scale, report: Report) -> Case | None:
    """Case that measures missing ceilings; None if none is missing."""
    if {"copy", "matrix", "link"} <= set(report.ceilings or {}):
        return None

    def measure() -> list[Row]:
        return [{"ceiling": name, "G/s": round(rate / 1e9, 1)} for name, rate in ceilings(scale, report).items()]

    return Case("ceilings", measure)


def ceilings(scale: Scale, report: Report) -> dict[str, float]:
    """Ceilings in bytes and operations a second, measured now if the section was not run."""
    if not {"copy", "matrix", "link"} <= set(report.ceilings or {}):
        for case in cases(scale, report, 0.0)[1:]:
            case.run()
    assert report.ceilings is not None
    return report.ceilings


def device_kind() -> str:
    return jax.devices()[0].device_kind


def describe_device() -> list[Row]:
    device = jax.devices()[0]
    facts: dict[str, Any] = {
        "device": device_kind(),
        "platform": " ".join(device.client.platform_version.split()),
        "memories": ", ".join(memory.kind for memory in device.addressable_memories()),
    }
    stats = device.memory_stats()
    if stats is not None:
        facts["bytes that jax may use"] = f"{stats['bytes_limit'] / 2**30:.1f} GiB"
    for package in PACKAGES:
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not there"
    return [{"fact": fact, "value": value} for fact, value in facts.items()]


def copy_bandwidth(scale: Scale) -> float:
    """Bytes that `x + 1` reads and writes in a second."""
    x = _random(scale.copy_bytes)
    return 2 * x.nbytes / best_of(functools.partial(jax.jit(lambda x: x + 1), x))


def read_bandwidth(scale: Scale) -> float:
    """Bytes a second that a sum reads."""
    x = _random(scale.copy_bytes).reshape(-1, 1 << 14)
    return x.nbytes / best_of(functools.partial(jax.jit(lambda x: x.sum(axis=1)), x))


def matrix_rate(scale: Scale) -> float:
    """Operations a second of a large product in the dtype of the weights."""
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (scale.matrix, scale.matrix), jnp.dtype(scale.dtype)) for key in keys)
    return 2 * scale.matrix**3 / best_of(functools.partial(jax.jit(lambda a, b: a @ b), a, b), calls=10)


def link_rows(scale: Scale) -> list[Row]:
    """Rates from host memory to the device, for pieces one at a time and for some on the way together."""
    there = jax.device_put(np.zeros(1)).sharding
    pinned = pinned_memory(there)
    rows: list[Row] = []
    for num_bytes in scale.link_bytes:
        numbers = np.random.default_rng(0).integers(0, 1 << 16, num_bytes // 2, np.uint16)
        begin = time.perf_counter()
        staged = jax.block_until_ready(jax.device_put(numbers, pinned or there))
        staging = time.perf_counter() - begin
        row: Row = {"from": "pinned host memory" if pinned else "host memory, none is pinned", "piece": _mib(num_bytes)}
        for together in (1, 4):
            seconds = _transfer(staged, there, together)
            rows.append(row | {"on the way": together, "GB/s": round(together * num_bytes / seconds / 1e9, 2)})
        pageable: Row = {"from": "numpy", "piece": _mib(num_bytes), "on the way": 1}
        rows.append(pageable | {"GB/s": round(num_bytes / _transfer(numbers, there, 1) / 1e9, 2)})
        staged_row: Row = {"from": "numpy to pinned (staging, once)", "piece": _mib(num_bytes), "on the way": 1}
        rows.append(staged_row | {"GB/s": round(num_bytes / staging / 1e9, 2)})
    return rows


def _transfer(source: jax.Array | np.ndarray, there: jax.sharding.Sharding, together: int) -> float:
    """Best seconds of `together` transfers."""
    return best_of(lambda: [jax.device_put(source, there) for _ in range(together)], calls=1, repeats=7)


def _random(num_bytes: int) -> jax.Array:
    """Random float32 numbers."""
    return jax.random.uniform(jax.random.key(0), (num_bytes // 4,), jnp.float32)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes >> 20} MiB"
