"""Section `host`: the host's work for a step, and whether the device waits for it in the real loop."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.device.report import Case, Report, Row
from benchmarks.device.scale import Mix, Scale
from benchmarks.device.sections.loads import Store
from benchmarks.device.timing import time_calls
from benchmarks.device.workbench import Workbench, shared
from benchmarks.machine import seconds_of
from chameleon_jax.config import EngineConfig
from chameleon_jax.models.config import ATTENTION_TARGETS, TARGETS
from chameleon_jax.models.runtime.step_inputs import pack_step
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams

REPEATS = 15
LOOP_STEPS = 60
PROMPT_TOKENS = 16
START_SECONDS = 40.0
"""Patience until all requests decode."""


def cases(scale: Scale, report: Report, deadline: float) -> list[Case]:
    bench = shared(scale)
    mixes = (
        Mix("base"),
        Mix("mixed ranks, q k v o", scale.ranks, ATTENTION_TARGETS),
        Mix("mixed ranks, all seven", scale.ranks),
    )
    rows = scale.rows[-1]
    found = [Case(f"parts of a step, {mix.name}", functools.partial(parts, bench, rows, mix)) for mix in mixes]
    return found + [Case(f"the loop, {mix.name}", functools.partial(loop, bench, rows, mix)) for mix in mixes[:2]]


def parts(bench: Workbench, rows: int, mix: Mix) -> list[Row]:
    """Measure medians, with an idle device before each call."""
    batch = bench.decode(rows, bench.scale.contexts[0], mix)
    engine = bench.engine
    step, packed = bench.run(batch), engine.packed(batch)
    jax.block_until_ready([step(), packed()])
    ms = {
        "pack": _median(engine, lambda: pack_step(batch.chunks, batch.sampling_rows, engine.buckets)),
        "dispatch, arguments on the device": _median(engine, packed),
        "run": _median(engine, step),
    }
    device = time_calls(packed).ms
    row: Row = {"rows": rows, "adapters": mix.name} | {f"{name}, ms": round(value, 3) for name, value in ms.items()}
    return [{**row, "device ms": round(device, 3), "host / device": round(ms["run"] / device, 3)}]


def _median(engine: Any, call: Callable[[], Any]) -> float:
    """Median of a call on an idle device, milliseconds."""
    samples = seconds_of(call, REPEATS, before=engine.block_until_ready)
    engine.block_until_ready()
    return statistics.median(samples) * 1e3


def loop(bench: Workbench, rows: int, mix: Mix) -> list[Row]:
    """Measure the wall time of steps of `ServingLoop`, once all rows decode, beside the device's time for the same steps."""
    driven = _Loop(bench, rows, mix)
    begin = time.perf_counter()
    while not driven.all_decode():
        driven.step()
        if time.perf_counter() - begin > START_SECONDS:
            raise RuntimeError(f"after {START_SECONDS:.0f} s not all requests decode")
    started = time.perf_counter() - begin
    for _ in range(5):
        driven.step()
    steps, begin = driven.steps, time.perf_counter()
    for _ in range(LOOP_STEPS):
        driven.step()
    wall = (time.perf_counter() - begin) / (driven.steps - steps)
    jax.block_until_ready(bench.engine.pool)
    batch = bench.decode(rows, driven.context, mix)
    device = time_calls(bench.engine.packed(batch)).seconds
    return [
        {
            "the loop, rows": rows,
            "adapters": mix.name,
            "seconds until all decode": round(started, 2),
            "steps": driven.steps - steps,
            "wall ms a step": round(wall * 1e3, 3),
            "device ms a step": round(device * 1e3, 3),
            "busy %": round(100 * device / wall, 1),
            "tokens/s": round(rows / wall),
        }
    ]


class _Loop:
    """Real loop over the bench's engine, with requests that end after the measurement."""

    def __init__(self, bench: Workbench, rows: int, mix: Mix):
        from chameleon_jax.loop import ServingLoop
        from chameleon_jax.memory.adapters import AdapterInfo
        from chameleon_jax.models.runtime.executor import JaxExecutor

        engine, layout = bench.engine, bench.layout
        self._rows = rows
        ranks = [mix.ranks[i % len(mix.ranks)] for i in range(rows)] if mix.ranks else []
        names = [f"{i}/{rank}" for i, rank in enumerate(ranks)]
        placements = {name: layout.place(dict.fromkeys(mix.targets, rank)) for name, rank in zip(names, ranks)}
        config = EngineConfig(
            max_num_seqs=rows,
            max_num_batched_tokens=max(32, bench.scale.prompt_tokens),
            max_lora_rank=bench.scale.max_rank,
            num_pages=engine.num_pages,
            tbt_slo=10.0,  # nothing holds prompts back
        )
        store: Any = Store(bench, mix.targets or TARGETS)
        executor = JaxExecutor(engine, store)
        self._loop = ServingLoop(
            config,
            executor,
            engine.num_pages,
            page_tokens=layout.page_tokens,
            max_model_len=bench.scale.max_tokens,
            shapes=engine.buckets.step_shapes,
        )
        for name, placement in placements.items():
            num_bytes = placement.num_pages * layout.page_bytes(bench.dtype.itemsize)
            rank = max(placement.ranks.values())
            self._loop.adapters.add(name, AdapterInfo(name, rank, placement.num_pages, num_bytes))
            executor.add(name, placement, store.block(rank))
        rng = np.random.default_rng(0)
        params = SamplingParams(temperature=0.0, max_tokens=bench.scale.max_tokens - PROMPT_TOKENS, ignore_eos=True)
        for i in range(rows):
            words = rng.integers(0, bench.config.vocab_size, PROMPT_TOKENS).tolist()
            self._loop.submit(Request(f"request-{i}", words, params, time.monotonic(), i, adapter=names[i] if names else None))

    def step(self) -> None:
        before = self._loop.counters.decode_rows
        self._loop.step()
        self._last = self._loop.counters.decode_rows - before

    _last = 0

    def all_decode(self) -> bool:
        return self._last == self._rows

    @property
    def steps(self) -> int:
        return self._loop.counters.steps

    @property
    def context(self) -> int:
        """Approximate tokens of the sequences by now."""
        return PROMPT_TOKENS + self._loop.counters.decode_rows // self._rows
