"""A cost model that was fitted to timed steps of an engine, and the terms in which it counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from benchmarks.simulator.cost_model import CostModel, Profile
from chameleon_jax.models.config import TARGETS, LlamaConfig
from chameleon_jax.models.ops.batched_lora.plan import BLOCK_ROWS, PROMPT_WINDOW
from chameleon_jax.models.runtime.buckets import Program, StepBuckets
from chameleon_jax.scheduler import StepPlan

STEP_TERMS = (
    "step",
    "prompts",
    "prompt token",
    "prompt LoRA block token",
    "prompt key",
    "decode",
    "decode row",
    "decode LoRA block",
    "decode key",
    "load page",
)
"""Terms in which a step's seconds are linear.

The first is 1 in every step; "prompts" and "decode" are 1 in steps that have these. Tokens are counted in the compiled shape:
in a step with prompts its padding counts as prompt tokens, and rows are true ones. A LoRA block is BLOCK_ROWS rank rows of a
window of tokens; keys are summed over tokens; pages are those sent for adapters that were loaded since the step before."""


def step_terms(plan: StepPlan, ranks: dict[str, int], buckets: StepBuckets) -> list[float]:
    """Terms of a plan as it is dispatched, loads excepted: `[STEP_TERMS]`."""
    terms = dict.fromkeys(STEP_TERMS, 0.0)
    if not plan.runs:
        return list(terms.values())
    chunks, rows = plan.prefills, len(plan.decodes)
    program = choose_program(plan, buckets)
    terms["step"] = 1.0
    if chunks:
        window = min(program.tokens, PROMPT_WINDOW)
        spans = [(chunk.request.adapter, chunk.num_tokens) for chunk in chunks]
        terms["prompts"], terms["prompt token"] = 1.0, program.tokens - rows
        terms["prompt LoRA block token"] = lora_blocks(spans, ranks, window, rows) * window
        terms["prompt key"] = sum([chunk.num_tokens * (chunk.start + chunk.num_tokens / 2) for chunk in chunks])
    if rows:
        window = min(program.rows, buckets.decode_window)
        terms["decode"], terms["decode row"] = 1.0, rows if chunks else program.rows
        terms["decode LoRA block"] = lora_blocks([(request.adapter, 1) for request in plan.decodes], ranks, window)
        terms["decode key"] = sum([request.num_computed for request in plan.decodes])
    return list(terms.values())


def choose_program(plan: StepPlan, buckets: StepBuckets) -> Program:
    """Choose the program of a plan whose adapters keep to the layers' matrices."""
    rows, counts = len(plan.decodes), [chunk.num_tokens for chunk in plan.prefills]
    requests = [*plan.decodes, *(chunk.request for chunk in plan.prefills)]
    adapted = len(TARGETS) if any([request.adapter is not None for request in requests]) else 0
    return buckets.choose(Program(rows + sum(counts), rows, sum(map(buckets.step_shapes.tiles, counts)), adapted))


def lora_blocks(spans: Iterable[tuple[str | None, int]], ranks: dict[str, int], window: int, begin: int = 0) -> int:
    """LoRA blocks of a target; see `plan_batch`.

    Args:
        spans: adapter and length of consecutive runs of tokens.
        ranks: ranks by adapter.
        window: tokens of a window.
        begin: tokens ahead of the first run.
    """
    present: dict[int, set[str]] = {}
    for adapter, tokens in spans:
        end = begin + tokens
        if adapter is not None:
            for number in range(begin // window, -(-end // window)):
                present.setdefault(number, set()).add(adapter)
        begin = end
    return sum(-(-sum(ranks[adapter] for adapter in adapters) // BLOCK_ROWS) for adapters in present.values())


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Fitted costs in seconds.

    Attributes:
        step: Cost of each of STEP_TERMS.
        load: Cost of a load, and of each page that it sends, from its start until its adapter may be used.
        host: Cost of a dispatch.
        error: Standard deviation of the residual over the mean step, for the steps that were fitted.
    """

    step: tuple[float, ...]
    load: tuple[float, float]
    host: float
    error: float
    num_steps: int
    num_loads: int

    def slowed(self, factor: float) -> Calibration:
        """Calibration of a machine on which everything takes `factor` times as long."""
        step = tuple(seconds * factor for seconds in self.step)
        load = (self.load[0] * factor, self.load[1] * factor)
        return dataclasses.replace(self, step=step, load=load, host=self.host * factor)


class MeasuredCostModel(CostModel):
    """Cost model by a calibration."""

    def __init__(self, profile: Profile, ranks: dict[str, int], calibration: Calibration, buckets: StepBuckets):
        self.profile = profile
        self._ranks = ranks
        self._calibration = calibration
        self.buckets = buckets
        self._loaded_pages = 0

    def step(self, plan: StepPlan) -> float:
        terms = step_terms(plan, self._ranks, self.buckets)
        terms[-1], self._loaded_pages = self._loaded_pages, 0
        return sum(seconds * term for seconds, term in zip(self._calibration.step, terms))

    def load(self, num_bytes: int, copies: int = 1) -> tuple[float, float]:
        pages = copies * num_bytes // self.profile.page_bytes
        self._loaded_pages += pages
        return 0.0, self._calibration.load[0] + self._calibration.load[1] * pages


def measured_profile(
    name: str, model: LlamaConfig, calibration: Calibration, *, itemsize: int, page_tokens: int, num_pages: int
) -> Profile:
    """Profile of a machine that is known by a calibration alone."""
    return Profile(
        name=f"{name}, measured",
        model=model,
        memory=0.0,
        bandwidth=1.0,
        flops=1.0,
        prefill_overhead=0.0,
        lora_overhead=0.0,
        lora_token_rank=0.0,
        lora_row=0.0,
        decode_overhead=0.0,
        host=calibration.host,
        link_bandwidth=1.0,
        link_latency=0.0,
        itemsize=itemsize,
        page_tokens=page_tokens,
        num_pages_override=num_pages,
    )
