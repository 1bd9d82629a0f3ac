"""Section `mixed`: rows that decode and a prompt in one step, beside the same work in two steps.

One step reads the weights once. Two steps are dispatched one behind the other, the rows that decode first.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

from benchmarks.device.bench_engine import Batch
from benchmarks.device.compilation import Compilation
from benchmarks.device.report import Case, Report, Row, Skip
from benchmarks.device.scale import Mix, Scale
from benchmarks.device.sections.decode import Order
from benchmarks.device.sections.machine import ceilings
from benchmarks.device.sections.prefill import operations
from benchmarks.device.timing import columns, time_calls
from benchmarks.device.workbench import Workbench, shared
from chameleon_jax.models.config import ATTENTION_TARGETS
from chameleon_jax.models.runtime.step_inputs import pack_step


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    mixed = Mixed(shared(scale), report)
    rows, tokens = scale.mixed
    mixes = (
        Mix("base"),
        Mix("mixed ranks, q k v o", scale.ranks, ATTENTION_TARGETS),
        Mix("mixed ranks, all seven", scale.ranks),
    )
    steps = [
        Case(f"{rows} rows + {tokens} prompt tokens, {mix.name}", functools.partial(mixed.measure, mix), 60.0, Order.PREFILL)
        for mix in mixes
    ]
    return [
        mixed.compilation.begin("begin to compile", Order.BEGIN),
        *mixed.compilation.cases(Order.COMPILE),
        *steps,
    ]


class Mixed:
    """The scale's mixed step, and its halves."""

    def __init__(self, bench: Workbench, report: Report):
        self._bench, self._report = bench, report
        with_adapters, base = Mix("one", (16,)), Mix("base")
        jobs = {
            "rows and a prompt": functools.partial(self._compile, 0, with_adapters),
            "the prompt, base": functools.partial(self._compile, 2, base),
            "the prompt, adapters": functools.partial(self._compile, 2, with_adapters),
        }  # the section `decode` compiles the rows' programs
        self.compilation = Compilation(report, "mixed", jobs, lambda: bench.engine)

    def _compile(self, part: int, mix: Mix) -> None:
        with contextlib.suppress(Skip):
            self._bench.engine.compile(self._batches(mix)[part])

    def _batches(self, mix: Mix) -> tuple[Batch, Batch, Batch]:
        """Make the step, then its rows and its prompt alone."""
        rows, tokens = self._bench.scale.mixed
        decode = self._bench.decode(rows, self._bench.scale.contexts[0], mix)
        prompt = self._bench.prompts(1, tokens, 0, mix, beside=decode)
        return self._bench.joined(decode, prompt), decode, prompt

    def measure(self, mix: Mix) -> list[Row]:
        if any(self.compilation.failed(name) for name in ("rows and a prompt", "the prompt, base", "the prompt, adapters")):
            raise Skip("a program does not compile")
        bench, (rows, tokens) = self._bench, self._bench.scale.mixed
        context = bench.scale.contexts[0]
        together, *apart = self._batches(mix)
        program = pack_step(together.chunks, together.sampling_rows, bench.engine.buckets).program
        work, ceiling = (
            operations(bench, 1, tokens, 0) + operations(bench, rows, 1, context - 1),
            ceilings(bench.scale, self._report),
        )
        floor = max(work / ceiling["matrix"], together.floor_bytes / ceiling["copy"])
        step, device = time_calls(bench.run(together)), time_calls(bench.engine.packed(together))
        steps = time_calls(_in_turn([bench.run(batch) for batch in apart]))
        devices = time_calls(_in_turn([bench.engine.packed(batch) for batch in apart]))
        return [
            {
                "rows": rows,
                "context": context,
                "prompt tokens": tokens,
                "adapters": mix.name,
                "tokens computed": program.tokens,
                **columns(step, device, floor, None),
                "two steps: ms": round(steps.ms, 3),
                "two steps: device ms": round(devices.ms, 3),
                "ratio to two steps": round(step.ms / steps.ms, 3),
                "device ratio": round(device.ms / devices.ms, 3),
                "note": together.note,
            }
        ]


def _in_turn(runs: Sequence[Any]) -> Any:
    """Return a run of several steps, one behind the other; its result is ready when the last one is."""

    def run() -> Any:
        return [step() for step in runs][-1]

    return run
