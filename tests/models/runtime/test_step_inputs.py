from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.config import ATTENTION_TARGETS, PRESETS, TARGETS
from chameleon_jax.models.ops.batched_lora.plan import NO_TOKEN
from chameleon_jax.models.ops.sampling import SamplingMode
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter
from chameleon_jax.models.runtime.buckets import FROM_SLOT, Program, StepBuckets
from chameleon_jax.models.runtime.step_inputs import SamplingRow, SequenceChunk, pack_step

LAYOUT = PageLayout.for_model(PRESETS["tiny"])
BUCKETS = StepBuckets(
    max_num_seqs=8,
    max_prefill_tokens=128,
    table_width=6,
    max_rank=8,
    max_adapter_pages=LAYOUT.place({t: 8 for t in TARGETS}).num_pages,
)


def placed(*targets: str) -> PlacedAdapter:
    placement = LAYOUT.place({t: 8 for t in targets})
    return PlacedAdapter(placement, tuple(range(1, 1 + placement.num_pages)))


def rows(*adapters: PlacedAdapter | None) -> list[SequenceChunk]:
    return [SequenceChunk(None, 20 + i, i, (7, 8), adapter) for i, adapter in enumerate(adapters)]


def chunk(tokens: int, adapter: PlacedAdapter | None = None) -> SequenceChunk:
    return SequenceChunk(list(range(100, 100 + tokens)), 32, 3, (5, 6, 9), adapter)


def chosen(buckets: StepBuckets, chunks: list[SequenceChunk]) -> Program:
    return pack_step(chunks, {}, buckets).program


@pytest.mark.parametrize("few_launches", [False, True])
def test_the_program_covers_the_targets_of_the_batch(few_launches):
    buckets = dataclasses.replace(BUCKETS, few_launches=few_launches)
    narrow, wide = placed(*ATTENTION_TARGETS), placed("q_proj", "up_proj")
    cases = {
        (None, None): 0,
        (narrow, None): 4 if few_launches else 7,
        (placed("v_proj"), narrow): 4 if few_launches else 7,
        (narrow, wide): 7,
        (placed("down_proj"),): 7,
    }
    for adapters, adapted in cases.items():
        assert chosen(buckets, rows(*adapters)) == (len(adapters), len(adapters), 0, adapted)
    alone = (64, 0, 4, 7) if few_launches else (64, 8, 4, 7)
    assert chosen(buckets, [chunk(40, narrow)]) == alone  # prompts are bound by computing
    mixed = (64, 8, 4, 7) if few_launches else (64, 8, 4, 0)
    assert chosen(buckets, [*rows(None), chunk(40)]) == mixed


def test_rows_that_decode_stand_ahead_of_prompts():
    packed, program, first, mode = pack_step([*rows(None, None), chunk(40), chunk(3)], {}, BUCKETS)
    assert program == (64, 8, 4, 0) and first == [0, 1, 2, 42] and mode is None
    inputs = BUCKETS.view(packed, program)
    assert inputs.tokens[:46].tolist() == [FROM_SLOT] * 2 + list(range(100, 140)) + [100, 101, 102, 0]
    # the rows that decode, then the tiles: first token, its position, tokens, slot
    found = inputs.tiles[[0, 1, 2, 8, 9, 10, 11], :4].tolist()
    padding = [0, 0, 0, BUCKETS.max_num_seqs]
    assert found == [[0, 20, 1, 0], [1, 21, 1, 1], padding, [2, 32, 32, 8], [34, 64, 8, 8], [42, 32, 3, 8], padding]
    np.testing.assert_array_equal(inputs.tiles[[0, 1, 9], 4:], [[7, 8, 0, 0, 0, 0]] * 2 + [[5, 6, 9, 0, 0, 0]])
    assert inputs.places is not None
    places = [0, 1, *range(8, 48), *range(72, 75), *[-1] * 19]
    assert inputs.places.tolist() == places


def test_decode_takes_tokens_from_their_slots():
    packed, program, first, _ = pack_step(rows(None, None, None), {}, BUCKETS)
    inputs = BUCKETS.view(packed, program)
    assert inputs.tokens.tolist() == [FROM_SLOT] * 3 + [0] and first == [0, 1, 2] and inputs.places is None
    assert inputs.tiles[:, 3].tolist() == [0, 1, 2, BUCKETS.max_num_seqs]


def test_sampling_rows_name_the_last_tokens_of_their_chunks():
    first = SamplingRow(3, 72, (1 << 63) + 5, 0.5, -1, 0.9, 0.1, (7, 11), False)
    chunks = [*rows(None), chunk(40), chunk(30), chunk(3)]
    packed, program, _, mode = pack_step(chunks, {1: first, 3: first._replace(slot=4, logprobs=True)}, BUCKETS)
    inputs = BUCKETS.view(packed, program)
    assert inputs.sampled[:2].tolist() == [40, 73] and mode is SamplingMode.LOGPROBS
    assert inputs.sampling_rows[:, 0].tolist() == [3, 4] + [BUCKETS.max_num_seqs] * 6
    low, high = 5, -(1 << 31)
    assert inputs.sampling_rows[0, :5].tolist() == [3, 72, low, high, 0]
    np.testing.assert_array_equal(inputs.sampling_rows[0, 5:8].copy().view(np.float32), np.float32([0.5, 0.9, 0.1]))
    assert inputs.sampling_rows[0, 8:].tolist() == [7, 11, -1, -1, -1, -1, -1, -1]


def test_each_kind_of_token_has_a_plan_of_its_own():
    a, b = placed("q_proj"), placed("down_proj")
    packed, program, *_ = pack_step([*rows(a, None, b), chunk(40, b), chunk(3), chunk(5, a)], {}, BUCKETS)
    inputs = BUCKETS.view(packed, program)
    assert inputs.decode_lora is not None and inputs.prompt_lora is not None and inputs.sampled_lora is None
    assert inputs.decode_lora.token_adapter.tolist() == [0, -1, 1] + [NO_TOKEN] * 5
    assert inputs.prompt_lora.token_adapter.tolist() == [NO_TOKEN] * 3 + [0] * 40 + [-1] * 3 + [1] * 5 + [NO_TOKEN] * 13


def test_adapters_of_sampling_rows_that_change_logits():
    buckets = dataclasses.replace(BUCKETS, extras=True, max_adapter_pages=40)
    head, plain = placed("lm_head"), placed("q_proj")
    sampling = SamplingRow(0, 1, 0, 0.0, 0, 1.0, 0.0, (), False)
    packed, program, *_ = pack_step([*rows(plain), chunk(40), chunk(3, head)], {0: sampling, 2: sampling}, buckets)
    inputs = buckets.view(packed, program)
    assert program.extras and inputs.sampled_lora is not None
    assert inputs.sampled_lora.token_adapter.tolist() == [0, 1] + [NO_TOKEN] * 6
    packed, program, *_ = pack_step(rows(head), {0: sampling}, buckets)
    assert buckets.view(packed, program).sampled_lora is None  # the sampling rows are those that decode


@pytest.mark.parametrize("program", [Program(4, 4, 0, 0), Program(8, 8, 0, 4), Program(64, 0, 4, 7), Program(64, 8, 4, 9)])
def test_parts_of_a_step_fill_its_array_without_overlap(program):
    packed = np.zeros(BUCKETS.packed_size(program), np.int32)
    inputs = BUCKETS.view(packed, program)
    parts = [inputs.tokens, inputs.tiles, inputs.places, inputs.sampled, inputs.sampling_rows]
    plans = [inputs.decode_lora, inputs.prompt_lora, inputs.sampled_lora]
    for plan in plans:
        if plan is not None:
            parts += [plan.adapters, plan.rank_rows, plan.first_blocks, plan.token_adapter]
    for part in parts:
        if part is not None:
            part += 1
    assert (packed == 1).all()
    wanted = [program.adapted and program.rows, program.adapted and program.tiles, program.extras and program.tiles]
    assert [plan is not None for plan in plans] == [bool(n) for n in wanted]
    on_device = BUCKETS.view(jnp.asarray(packed), program)
    assert jax.tree.map(jnp.shape, vars(on_device)) == jax.tree.map(jnp.shape, vars(inputs))
