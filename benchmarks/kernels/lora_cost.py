"""Cost of adapters in a decode step, side by side in one run.

Each case is the same batch of decode rows at the same context, interleaved with the base-only case over many rounds, and
reported as a ratio to it beside the floor: the bytes that the case must read beyond the base case, over the memory bandwidth
that this run measured (docs/architecture.md). Nothing here is simulated.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

from benchmarks.machine import Out, describe, publish, read_bandwidth
from chameleon_jax.models.config import ALL_TARGETS, PRESETS, TARGETS
from chameleon_jax.models.llama import random_model
from chameleon_jax.models.page_layout import AdapterPlacement, PageLayout, PlacedAdapter
from chameleon_jax.models.runtime.buckets import StepBuckets
from chameleon_jax.models.runtime.jax_setup import enable_compilation_cache
from chameleon_jax.models.runtime.model_runner import ModelRunner
from chameleon_jax.models.runtime.step_inputs import SamplingRow, SequenceChunk


@dataclasses.dataclass(frozen=True)
class Case:
    """Batch with `adapters` adapters of `rank`, given to the rows in turn.

    `vectors` says whether they have DoRA or biases, `enable_lora` whether the engine has programs for adapters.
    """

    name: str
    adapters: int = 0
    rank: int = 0
    targets: tuple[str, ...] = TARGETS
    vectors: bool = False
    enable_lora: bool = True

    def place(self, layout: PageLayout) -> AdapterPlacement:
        """Place one of the adapters."""
        return layout.place(dict.fromkeys(self.targets, self.rank), self.targets if self.vectors else ())


def cases() -> list[Case]:
    attention = TARGETS[:4]
    return [
        Case("base only, engine without LoRA", enable_lora=False),
        Case("base only, engine with LoRA"),
        Case("16 x rank 8, q k v o", 16, 8, attention),
        Case("16 x rank 8, all seven", 16, 8),
        Case("16 x rank 16, all seven", 16, 16),
        Case("16 x rank 64, all seven", 16, 64),
        Case("4 x rank 64, all seven", 4, 64),
        Case("32 x rank 8, all seven", 32, 8),
        Case("16 x rank 8 with DoRA, all seven", 16, 8, vectors=True),
        Case("16 x rank 8, all seven, embedding, head", 16, 8, ALL_TARGETS),
    ]


def measure(rows: int, context: int, rounds: int, steps: int) -> dict[str, object]:
    config = PRESETS["smollm2-135m"]
    layout = PageLayout.for_model(config)
    width = layout.pages_for_tokens(context + steps + 1)
    placements = {case.name: case.place(layout) for case in cases() if case.adapters}
    buckets = StepBuckets(
        max_num_seqs=rows,
        max_prefill_tokens=32,
        table_width=width,
        max_rank=64,
        max_adapter_pages=max(placement.num_pages for placement in placements.values()),
        extras=True,
    )
    held = max(case.adapters * placements[case.name].num_pages for case in cases() if case.adapters)
    num_pages = 1 + rows * width + held
    model = random_model(config, jnp.dtype("float32"))
    engines = {
        enabled: ModelRunner(model, layout, shapes, num_pages, jnp.dtype("float32"), compile_programs="lazy")
        for enabled, shapes in ((True, buckets), (False, dataclasses.replace(buckets, max_adapter_pages=0)))
    }
    bandwidth = read_bandwidth()

    def run(case: Case) -> float:
        """Time one step, the mean over `steps`, seconds."""
        engine = engines[case.enable_lora]
        placed: list[PlacedAdapter | None] = [None]
        if case.adapters:
            placement = placements[case.name]
            first = 1 + rows * width
            n = placement.num_pages
            placed = [PlacedAdapter(placement, tuple(range(first + i * n, first + i * n + n))) for i in range(case.adapters)]
        owner = sorted(i % len(placed) for i in range(rows))
        chunks = [
            SequenceChunk(None, context, i, tuple(range(1 + i * width, 1 + (i + 1) * width)), placed[owner[i]])
            for i in range(rows)
        ]
        sampling_rows = {i: SamplingRow(i, context, 0, 0.0, 0, 1.0, 0.0, (), False) for i in range(rows)}
        engine.run(chunks, sampling_rows)
        engine.block_until_ready()
        begin = time.perf_counter()
        for _ in range(steps):
            engine.run(chunks, sampling_rows)
            engine.block_until_ready()
        return (time.perf_counter() - begin) / steps

    times: dict[str, list[float]] = {case.name: [] for case in cases()}
    for _ in range(rounds):
        for case in cases():
            times[case.name].append(run(case))
    base = float(np.median(times[cases()[0].name]))
    table = []
    for case in cases():
        seconds = float(np.median(times[case.name]))
        per_rank = sum(sum(config.target_shape(t)) for t in case.targets)
        extra_bytes = case.adapters * case.rank * per_rank * config.num_layers * 4
        extra_flops = 2 * rows * case.rank * per_rank * config.num_layers if case.adapters else 0
        paired = np.median(np.array(times[case.name]) / np.array(times[cases()[0].name]))
        table.append(
            {
                "case": case.name,
                "ms": round(seconds * 1e3, 2),
                "ratio": round(float(paired), 3),
                "extra_ms": round((seconds - base) * 1e3, 2),
                "floor_extra_ms": round(extra_bytes / bandwidth * 1e3, 2),
                "extra_mbytes": round(extra_bytes / 1e6, 1),
                "extra_mflop": round(extra_flops / 1e6, 1),
            }
        )
    return {"rows": rows, "context": context, "read_gb_per_s": round(bandwidth / 1e9, 1), "table": table}


def main(
    rows: Annotated[int, typer.Option(help="Requests that decode in a step.")] = 32,
    context: Annotated[int, typer.Option(help="Tokens that each request has before the step.")] = 192,
    rounds: Annotated[int, typer.Option(help="Measurements of each case, of which the median counts.")] = 7,
    steps: Annotated[int, typer.Option(help="Decode steps that a measurement times.")] = 5,
    out: Out = None,
) -> None:
    """Measure the cost of adapters in a decode step on this machine."""
    print(f"devices: {jax.devices()}")
    enable_compilation_cache()
    publish(describe() | measure(rows, context, rounds, steps), out)
