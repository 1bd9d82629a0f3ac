"""Terms in which a measured cost model counts a step: the engine's packing of the same step is the oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.calibration import STEP_TERMS, Calibration, MeasuredCostModel, choose_program, step_terms
from benchmarks.simulator.cost_model import PROFILES
from chameleon_jax.models.config import PRESETS, TARGETS
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter
from chameleon_jax.models.runtime.buckets import StepBuckets, shapes_for
from chameleon_jax.models.runtime.step_inputs import SequenceChunk, pack_step
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import PrefillChunk, StepPlan
from tests.properties import examples

RANKS = {"a": 8, "b": 16, "c": 40, "d": 128}
LAYOUT = PageLayout.for_model(PRESETS["tiny"])
PLACED = {
    name: PlacedAdapter(placement, tuple(range(1, 1 + placement.num_pages)))
    for name, placement in ((name, LAYOUT.place(dict.fromkeys(TARGETS, rank))) for name, rank in RANKS.items())
}
MOST_PAGES = max(adapter.placement.num_pages for adapter in PLACED.values())
CPU, GPU = (StepBuckets(24, 512, 4, 128, MOST_PAGES, **shapes_for(backend)) for backend in ("cpu", "triton"))
names = st.sampled_from([None, *RANKS])


def request(adapter: str | None, num_computed: int = 0) -> Request:
    made = Request("r", [1], SamplingParams(), 0.0, 0, adapter=adapter)
    made.num_computed = num_computed
    return made


def make_plan(prompts: list[tuple[str | None, int, int]] = (), rows: list[tuple[str | None, int]] = ()) -> StepPlan:
    chunks = [PrefillChunk(request(adapter), start, tokens, True) for adapter, start, tokens in prompts]
    return StepPlan(prefills=chunks, decodes=[request(*row) for row in rows])


def terms_of(plan: StepPlan, buckets: StepBuckets) -> dict[str, float]:
    return {name: term for name, term in zip(STEP_TERMS, step_terms(plan, RANKS, buckets), strict=True) if term}


def test_terms_of_prompts_beside_decodes():
    plan = make_plan([("a", 10, 100), ("d", 0, 60)], [("a", 50), ("b", 60), (None, 70)])
    assert terms_of(plan, CPU) == {
        "step": 1,
        "prompts": 1,
        "prompt token": 253,  # 163 tokens run as 256, three of which are rows
        "prompt LoRA block token": (5 + 4) * 128,  # ranks 8 + 128 up to token 128, then 128
        "prompt key": 100 * 60 + 60 * 30,
        "decode": 1,
        "decode row": 3,
        "decode LoRA block": 1,  # ranks 8 + 16
        "decode key": 180,
    }


def test_terms_of_a_step_that_only_decodes():
    assert terms_of(make_plan(rows=[("d", 5)] * 5), CPU) == {
        "step": 1,
        "decode": 1,
        "decode row": 8,
        "decode LoRA block": 4,
        "decode key": 25,
    }


def test_terms_of_prompts_alone():
    assert terms_of(make_plan([(None, 0, 33)]), CPU) == {"step": 1, "prompts": 1, "prompt token": 64, "prompt key": 33 * 16.5}
    assert terms_of(make_plan(), CPU) == {}


@examples(100)
@given(
    prompts=st.lists(st.tuples(names, st.integers(0, 50), st.integers(1, 80)), max_size=6),
    rows=st.lists(st.tuples(names, st.integers(1, 50)), max_size=24),
    buckets=st.sampled_from([CPU, GPU]),
)
def test_terms_are_those_of_the_packed_step(prompts, rows, buckets):
    plan = make_plan(prompts, rows)
    if not plan.runs:
        return

    def chunk(tokens, start, adapter) -> SequenceChunk:
        return SequenceChunk(tokens, start, 0, (1,), PLACED[adapter] if adapter else None)

    decodes = [chunk(None, context - 1, adapter) for adapter, context in rows]
    packed = pack_step([*decodes, *(chunk([1] * n, start, adapter) for adapter, start, n in prompts)], {}, buckets)
    assert choose_program(plan, buckets) == packed.program
    inputs, terms = buckets.view(packed.packed, packed.program), terms_of(plan, buckets)
    blocks = {"decode LoRA block": 0, "prompt LoRA block token": 0}
    if inputs.decode_lora is not None:
        blocks["decode LoRA block"] = int(np.asarray(inputs.decode_lora.first_blocks)[0, -1])
    if inputs.prompt_lora is not None:
        lora = inputs.prompt_lora
        blocks["prompt LoRA block token"] = int(np.asarray(lora.first_blocks)[0, -1]) * lora.window_tokens
    assert {name: terms.get(name, 0) for name in blocks} == blocks
    computed = terms.get("prompt token", 0) + terms.get("decode row", 0)
    assert computed == packed.program.tokens


def test_a_measured_step_is_the_sum_of_its_terms_and_of_the_pages_loaded_before_it():
    cost = np.arange(1.0, 1 + len(STEP_TERMS))
    profile = PROFILES["a40-llama-7b"]
    model = MeasuredCostModel(profile, RANKS, Calibration(tuple(cost), (0.5, 0.25), 0.0, 0.0, 0, 0), CPU)
    plan = make_plan([("a", 0, 20)], [("b", 9)])
    expected = cost @ step_terms(plan, RANKS, CPU)
    assert model.step(plan) == pytest.approx(expected)
    assert model.load(3 * profile.page_bytes) == (0.0, 0.5 + 3 * 0.25)
    assert model.step(plan) == pytest.approx(expected + 3 * cost[-1])
    assert model.step(plan) == pytest.approx(expected)
