"""Section `prefill`: a step of prompts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from benchmarks.device import predictions
from benchmarks.device.bench_engine import Batch
from benchmarks.device.compilation import Compilation
from benchmarks.device.report import Case, Report, Row, Skip
from benchmarks.device.scale import ChosenBuckets, Mix, Scale
from benchmarks.device.sections.decode import Order
from benchmarks.device.sections.machine import ceilings, device_kind
from benchmarks.device.timing import columns, time_calls
from benchmarks.device.workbench import Workbench, shared
from chameleon_jax.models.config import ATTENTION_TARGETS, TARGETS
from chameleon_jax.models.runtime.programs import Programs


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
    found = [
        prompts.near.begin("begin to compile", Order.BEGIN),
        *prompts.near.cases(Order.COMPILE),
        prompts.far.begin("begin to compile more", Order.BEGIN_MORE),
        *prompts.far.cases(Order.COMPILE_MORE),
    ]
    for i, (name, shape) in enumerate(shapes.items()):
        for mix in mixes:
            run = functools.partial(prompts.measure, name, shape, mix)
            found.append(Case(f"{name}, {mix.name}", run, 60.0, Order.PREFILL_MORE if i else Order.PREFILL))
    return found


def operations(bench: Workbench, count: int, tokens: int, start: int) -> float:
    """Operations of the layers' matrices and of causal attention, without the head, which is for one token a prompt."""
    config = bench.config
    weights = config.num_layers * sum(i * o for i, o in map(config.target_shape, TARGETS))
    pairs = count * (tokens * start + tokens * (tokens + 1) // 2)
    return 2.0 * weights * count * tokens + 4.0 * pairs * config.num_heads * config.head_dim * config.num_layers


class Prompts:
    """Prompts on the shared engine, with programs for sequences up to twice as long as a step."""

    def __init__(self, bench: Workbench, report: Report):
        self._bench, self._report = bench, report
        self.near = self._programs_from(0, lambda: bench.engine)
        self.far = self._programs_from(bench.scale.prompt_tokens, lambda: self._far)

    def _programs_from(self, start: int, prepare: Callable[[], Any]) -> Compilation:
        """Compilation of programs for a prompt that begins at position `start`, without adapters and with them."""
        tokens = self._bench.scale.prompt_tokens
        jobs = {
            program_name(start, mix): functools.partial(self._compile, (1, tokens, start), mix)
            for mix in (Mix("base"), Mix("one", (16,)))
        }
        return Compilation(self._report, "prefill", jobs, prepare)

    @functools.cached_property
    def _far(self) -> tuple[ChosenBuckets, Programs]:
        """Shapes and programs for prompts that do not begin at position 0."""
        buckets = self._bench.buckets(2 * self._bench.scale.prompt_tokens)
        return buckets, self._bench.programs(buckets)

    def _compile(self, shape: tuple[int, int, int], mix: Mix) -> None:
        with contextlib.suppress(Skip):
            self._bench.engine.compile(self._bench.prompts(*shape, mix), *(self._far if shape[2] else ()))

    def measure(self, name: str, shape: tuple[int, int, int], mix: Mix) -> list[Row]:
        """Measure a step; `shape` has the prompts, the computed tokens of each, and the first position."""
        if (self.far if shape[2] else self.near).failed(program_name(shape[2], mix)):
            raise Skip("its program does not compile")
        with self._bench.using(*self._far) if shape[2] else contextlib.nullcontext():
            row: Row = {"prompts": name, "adapters": mix.name}
            return [row | _timed(self._bench, self._report, row, shape, self._bench.prompts(*shape, mix))]


def program_name(start: int, mix: Mix) -> str:
    """Name of a program, which adapts all targets or none."""
    return f"from position {start}, {'adapters' if mix.ranks else 'base'}"


def _timed(bench: Workbench, report: Report, row: Row, shape: tuple[int, int, int], batch: Batch) -> Row:
    step = time_calls(bench.run(batch))
    device = time_calls(bench.engine.packed(batch))
    work, ceiling = operations(bench, *shape), ceilings(bench.scale, report)
    floor = max(work / ceiling["matrix"], batch.floor_bytes / ceiling["copy"])
    predicted = predictions.prefill_ms(device_kind(), row["prompts"], row["adapters"])
    base = report.find("prefill", prompts=row["prompts"], adapters="base")
    return {
        **columns(step, device, floor, predicted),
        "TFLOP/s": round(work / device.seconds / 1e12, 2),
        "% of the matrix rate": round(100 * work / device.seconds / ceiling["matrix"], 1),
        "ratio to base": round(step.ms / base["ms"], 3) if base else 1.0,
    }
