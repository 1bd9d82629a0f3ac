"""Host time to pack a decode step of Llama-7B.

`pack` is `models/runtime/step_inputs.py` alone, sampling parameters included; `dispatch` is `JaxExecutor.dispatch` over a
device that does nothing. Every row samples at random. In a batch with adapters every row has its own, of ranks 8 to 128 in
turn.
"""

from __future__ import annotations

import itertools
import statistics
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.machine import Out, describe, publish, seconds_of
from chameleon_jax.models.adapters.transfers import PieceSizes
from chameleon_jax.models.config import ATTENTION_TARGETS, PRESETS, TARGETS
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter
from chameleon_jax.models.runtime.buckets import StepBuckets, shapes_for
from chameleon_jax.models.runtime.executor import JaxExecutor
from chameleon_jax.models.runtime.model_runner import DispatchedStep, RunningStep
from chameleon_jax.models.runtime.step_inputs import PackedStep, pack_step
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import StepPlan

RANKS = (8, 16, 32, 64, 128)
MIXES: dict[str, tuple[str, ...]] = {"none": (), "q k v o": ATTENTION_TARGETS, "all seven": TARGETS}
REPEATS = 200
LAYOUT = PageLayout.for_model(PRESETS["llama-7b"])


class PackingEngine:
    """Part of `ModelRunner` that a dispatch needs; it packs, and sends nothing."""

    link_rate = 0.0

    def __init__(self, buckets: StepBuckets):
        self.buckets = buckets
        self.pieces = PieceSizes.fit(LAYOUT.page_bytes(2), buckets.max_adapter_pages, 0)

    def send(self, chunks: Sequence[Any], sampling_rows: dict[int, Any]) -> PackedStep:
        self.last = chunks, sampling_rows
        return pack_step(chunks, sampling_rows, self.buckets)

    def forward(self, sent: PackedStep) -> RunningStep:
        nothing: Any = None
        return RunningStep(sent, {}, nothing, nothing, adjusted=False)

    def sample(self, running: RunningStep, masks: None) -> DispatchedStep:
        done: Any = None
        return DispatchedStep(None, running.step.last, done)


def median_ms(call: Callable[[], Any]) -> float:
    return round(statistics.median(seconds_of(call, REPEATS)) * 1e3, 3)


def measure(rows: int, context: int, adapters: str) -> dict[str, Any]:
    buckets = StepBuckets(
        max_num_seqs=rows,
        max_prefill_tokens=2048,
        table_width=LAYOUT.pages_for_tokens(2048),
        max_rank=max(RANKS),
        max_adapter_pages=LAYOUT.place(dict.fromkeys(TARGETS, max(RANKS))).num_pages,
        **shapes_for("triton"),
    )
    targets, pages = MIXES[adapters], itertools.count(1)
    placements = {}
    if targets:
        placements = {str(i): LAYOUT.place(dict.fromkeys(targets, RANKS[i % len(RANKS)])) for i in range(rows)}
    engine: Any = PackingEngine(buckets)
    store: Any = None
    executor = JaxExecutor(engine, store)
    for name, placement in placements.items():
        executor._resident[name] = PlacedAdapter(placement, tuple(itertools.islice(pages, placement.num_pages)))
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=40, max_tokens=100)
    requests = []
    for i in range(rows):
        request = Request(str(i), [1], params, 0.0, i, adapter=str(i) if targets else None)
        request.slot, request.num_computed = i, context
        request.pages = array("i", itertools.islice(pages, LAYOUT.pages_for_tokens(context)))
        requests.append(request)

    def dispatch() -> None:
        executor.collect(executor.dispatch(StepPlan(decodes=requests)))

    dispatch()
    chunks, sampling_rows = engine.last
    packed = median_ms(lambda: pack_step(chunks, sampling_rows, buckets))
    return {"rows": rows, "context": context, "adapters": adapters, "pack ms": packed, "dispatch ms": median_ms(dispatch)}


def main(out: Out = None) -> None:
    """Measure the host time to pack a decode step of Llama-7B."""
    table = [measure(rows, context, adapters) for rows in (32, 128) for context in (512, 2048) for adapters in MIXES]
    publish(describe() | {"table": table}, out)
