"""Costs of simulated steps: what one pass for prompts and decodes saves."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulator.cost_model import PROFILES, CostModel
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import SamplingParams
from chameleon_jax.scheduler import PrefillChunk, StepPlan
from tests.properties import examples

RANKS = {"a": 8, "b": 128}
A40 = PROFILES["a40-llama-7b"]
ONE_PASS = PROFILES["a40-llama-7b-one-pass"]
TENSOR_PARALLEL = dataclasses.replace(PROFILES["a100-tp4"], passes=1)
names = st.sampled_from([None, *RANKS])
chunks_drawn = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 600), names), min_size=1, max_size=4)
rows_drawn = st.lists(st.tuples(st.integers(1, 500), names), min_size=1, max_size=80)


def request(num_computed: int, adapter: str | None) -> Request:
    made = Request("r", [1], SamplingParams(), 0.0, 0, adapter=adapter)
    made.num_computed = num_computed
    return made


def prompts(*drawn: tuple[int, int, str | None]) -> list[PrefillChunk]:
    return [PrefillChunk(request(0, adapter), start, tokens, True) for start, tokens, adapter in drawn]


def rows(*drawn: tuple[int, str | None]) -> list[Request]:
    return [request(*each) for each in drawn]


def seconds(profile, prefills=(), decodes=()) -> float:
    return CostModel(profile, RANKS).step(StepPlan(prefills=list(prefills), decodes=list(decodes)))


def weights(profile) -> float:
    return profile.weight_bytes / profile.bandwidth / profile.tensor_parallel


def test_steps_of_one_kind_cost_what_the_a40_was_calibrated_to():
    """The seconds were computed when every step had a pass for each kind."""
    chunks = prompts((0, 100, "a"), (200, 312, "b"), (5, 20, None))
    decodes = rows((50, "a"), (90, "b"), (10, None))
    for profile in (A40, ONE_PASS):
        assert seconds(profile, chunks) == pytest.approx(0.19407425819286078, rel=1e-9)
        assert seconds(profile, (), decodes) == pytest.approx(0.04036551268571429, rel=1e-9)
        assert seconds(profile) == 0


@examples(100)
@given(chunks=chunks_drawn, decodes=rows_drawn, profile=st.sampled_from([ONE_PASS, TENSOR_PARALLEL]))
def test_two_passes_cost_both_kinds_and_one_pass_less(chunks, decodes, profile):
    apart = [seconds(profile, prompts(*chunks)), seconds(profile, (), rows(*decodes))]
    two = seconds(dataclasses.replace(profile, passes=2), prompts(*chunks), rows(*decodes))
    one = seconds(profile, prompts(*chunks), rows(*decodes))
    assert two == pytest.approx(sum(apart))
    assert max(apart) < one < two
    collectives = profile.tp_overhead * (profile.tensor_parallel.bit_length() - 1)
    least = min(profile.prefill_overhead, profile.decode_overhead) + collectives
    assert least - 1e-12 <= two - one <= least + weights(profile) + 1e-12


def test_one_pass_reads_the_weights_once():
    saved = [
        seconds(A40, prompts((0, tokens, None)), rows((1, None)))
        - seconds(ONE_PASS, prompts((0, tokens, None)), rows((1, None)))
        for tokens in (8, 2000)
    ]
    token = 2 * A40.model.num_params / A40.flops
    assert saved == pytest.approx([A40.decode_overhead + weights(A40), A40.decode_overhead + weights(A40) - token])
