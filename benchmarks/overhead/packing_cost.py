"""Host time to pack a step of Llama-7B: rows that decode, alone or with a prompt.

`pack` is `models/runtime/step_inputs.py` alone, sampling parameters included; `dispatch` is `JaxExecutor.dispatch` over a
device that does nothing. Every row samples at random. In a batch with adapters every row has its own, of ranks 8 to 128 in
turn, and so has the prompt.
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
from chameleon_jax.models.runtime.model_runner import DispatchedStep, RunningStep, SentStep
from chameleon_jax.models.runtime.step_inputs import pack_step
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import PrefillChunk, StepPlan

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

    def send(self, chunks: Sequence[Any], sampling_rows: dict[int, Any]) -> SentStep:
        nothing: Any = None
        self.last = chunks, sampling_rows
        return SentStep(pack_step(chunks, sampling_rows, self.buckets), nothing, [])

    def forward(self, sent: SentStep) -> RunningStep:
        nothing: Any = None
        return RunningStep(sent.step, [], nothing, nothing, adjusted=False)

    def sample(self, running: RunningStep, masks: None) -> DispatchedStep:
        done: Any = None
        return DispatchedStep(None, done)


def median_ms(call: Callable[[], Any]) -> float:
    return round(statistics.median(seconds_of(call, REPEATS)) * 1e3, 3)


def measure(rows: int, context: int, prompt_tokens: int, adapters: str) -> dict[str, Any]:
    sequences = rows + (prompt_tokens > 0)
    buckets = StepBuckets(
        max_num_seqs=sequences,
        max_prefill_tokens=2048,
        table_width=LAYOUT.pages_for_tokens(2048),
        max_rank=max(RANKS),
        max_adapter_pages=LAYOUT.place(dict.fromkeys(TARGETS, max(RANKS))).num_pages,
        **shapes_for("triton"),
    )
    targets, pages = MIXES[adapters], itertools.count(1)
    placements = {}
    if targets:
        placements = {str(i): LAYOUT.place(dict.fromkeys(targets, RANKS[i % len(RANKS)])) for i in range(sequences)}
    engine: Any = PackingEngine(buckets)
    store: Any = None
    executor = JaxExecutor(engine, store)
    for name, placement in placements.items():
        executor._resident[name] = PlacedAdapter(placement, tuple(itertools.islice(pages, placement.num_pages)))
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=40, max_tokens=100)
    requests = []
    for i in range(sequences):
        decodes = i < rows
        request = Request(str(i), [1] * (1 if decodes else prompt_tokens), params, 0.0, i, adapter=str(i) if targets else None)
        request.slot, request.num_computed = i, context if decodes else 0
        tokens = context if decodes else prompt_tokens
        request.pages = array("i", itertools.islice(pages, LAYOUT.pages_for_tokens(tokens)))
        requests.append(request)
    prefills = [PrefillChunk(request, 0, prompt_tokens, True) for request in requests[rows:]]

    def dispatch() -> None:
        executor.collect(executor.dispatch(StepPlan(decodes=requests[:rows], prefills=prefills)))

    dispatch()
    chunks, sampling_rows = engine.last
    packed = median_ms(lambda: pack_step(chunks, sampling_rows, buckets))
    return {
        "rows": rows,
        "context": context,
        "prompt tokens": prompt_tokens,
        "adapters": adapters,
        "pack ms": packed,
        "dispatch ms": median_ms(dispatch),
    }


def main(out: Out = None) -> None:
    """Measure the host time to pack a decode step of Llama-7B."""
    steps = [(rows, context, 0) for rows in (32, 128) for context in (512, 2048)] + [(32, 512, 512), (128, 512, 512)]
    table = [measure(*step, adapters) for step in steps for adapters in MIXES]
    publish(describe() | {"table": table}, out)
