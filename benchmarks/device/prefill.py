"""Section `prefill`: a step of prompts."""

from __future__ import annotations

import functools

from benchmarks.device.bench_engine import Batch
from benchmarks.device.machine import ceilings
from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import Mix, Scale
from benchmarks.device.timing import time_calls
from benchmarks.device.workbench import Workbench, shared
from chameleon_jax.models.config import ATTENTION_TARGETS, TARGETS
from chameleon_jax.models.programs import Programs


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    bench = shared(scale)
    prompts, tokens = Prompts(bench, report), scale.prompt_tokens
    mixes = (
        Mix("base"),
        Mix("rank 16, q k v o", (16,), ATTENTION_TARGETS),
        Mix("mixed ranks, all seven", tuple(reversed(scale.ranks))),  # a single prompt gets the largest
    )
    shapes = {
        f"1 prompt of {tokens}": (1, tokens, 0),
        f"4 prompts of {tokens // 4}": (4, tokens // 4, 0),
        f"{tokens} more at position {tokens}": (1, tokens, tokens),
    }
    return [
        Case(f"{name}, {mix.name}", functools.partial(prompts.measure, name, shape, mix))
        for name, shape in shapes.items()
        for mix in mixes
    ]


def operations(bench: Workbench, count: int, tokens: int, start: int) -> float:
    """Of the layers' matrices, and of causal attention: the head is for one token a prompt."""
    config = bench.config
    weights = config.num_layers * sum(i * o for i, o in map(config.target_shape, TARGETS))
    pairs = count * (tokens * start + tokens * (tokens + 1) // 2)
    return 2.0 * weights * count * tokens + 4.0 * pairs * config.num_heads * config.head_dim * config.num_layers


class Prompts:
    """The engine, and programs for sequences that may be twice as long as a step."""

    def __init__(self, bench: Workbench, report: Report):
        self._bench, self._report = bench, report
        self._buckets = bench.buckets(2 * bench.scale.prompt_tokens)
        self._programs: Programs | None = None

    def measure(self, name: str, shape: tuple[int, int, int], mix: Mix) -> list[Row]:
        """`shape`: prompts, tokens of each that are computed, position of the first."""
        if shape[2]:
            self._programs = self._programs or self._bench.programs(self._buckets)
            with self._bench.using(self._buckets, self._programs):
                return self._measure(name, shape, mix)
        return self._measure(name, shape, mix)

    def _measure(self, name: str, shape: tuple[int, int, int], mix: Mix) -> list[Row]:
        batch = self._bench.prompts(*shape, mix)
        row: Row = {"prompts": name, "adapters": mix.name}
        if isinstance(batch, str):
            return [{**row, "skipped": batch}]
        return [row | _timed(self._bench, self._report, name, shape, batch)]


def _timed(bench: Workbench, report: Report, name: str, shape: tuple[int, int, int], batch: Batch) -> Row:
    step = time_calls(bench.run(batch))
    device = time_calls(bench.engine.packed(batch))
    rate = operations(bench, *shape) / device.seconds
    base = next((r for r in report.rows("prefill") if r["prompts"] == name and r["adapters"] == "base" and "ms" in r), None)
    return {
        "ms": round(step.ms, 3),
        "spread %": round(100 * step.spread, 1),
        "device ms": round(device.ms, 3),
        "host ms": round(step.host_ms, 3),
        "TFLOP/s": round(rate / 1e12, 2),
        "% of the matrix rate": round(100 * rate / ceilings(bench.scale, report)["matrix"], 1),
        "ratio to base": round(step.ms / base["ms"], 3) if base else 1.0,
    }
