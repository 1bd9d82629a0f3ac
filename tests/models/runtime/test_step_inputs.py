from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.config import ATTENTION_TARGETS, PRESETS, TARGETS
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


@pytest.mark.parametrize("alone", [False, True])
def test_the_program_covers_the_targets_of_the_batch(alone):
    buckets = dataclasses.replace(BUCKETS, attention_alone=alone)
    narrow, wide = placed(*ATTENTION_TARGETS), placed("q_proj", "up_proj")
    cases = {
        (None, None): 0,
        (narrow, None): 4 if alone else 7,
        (placed("v_proj"), narrow): 4 if alone else 7,
        (narrow, wide): 7,
        (placed("down_proj"),): 7,
    }
    for adapters, adapted in cases.items():
        assert pack_step(rows(*adapters), {}, buckets).program == (len(adapters), 1, adapted)
        assert adapted in buckets.adapted(1)
    assert pack_step([chunk(40, narrow)], {}, buckets).program == (2, 32, 7)  # prompts are bound by computing


def test_padding_is_marked():
    packed, program, last, mode = pack_step([chunk(40), chunk(3)], {}, BUCKETS)
    assert program == (4, 32, 0) and last == [1, 2] and mode is None
    inputs = BUCKETS.view(packed, program)
    assert inputs.tiles[:, 1].tolist() == [32, 8, 3, 0]
    assert inputs.tiles[:, 0].tolist() == [32, 64, 32, 0]
    assert inputs.tiles[:, 2].tolist() == [3, 3, 3, BUCKETS.max_num_seqs]
    np.testing.assert_array_equal(inputs.tiles[:3, 3:], [[5, 6, 9, 0, 0, 0]] * 3)
    np.testing.assert_array_equal(inputs.tokens[:40], np.arange(100, 140))


def test_decode_takes_tokens_from_their_slots():
    packed, program, last, _ = pack_step(rows(None, None, None), {}, BUCKETS)
    inputs = BUCKETS.view(packed, program)
    assert inputs.tokens.tolist() == [FROM_SLOT] * 3 + [0] and last == [0, 1, 2]
    assert inputs.tiles[:, 2].tolist() == [0, 1, 2, BUCKETS.max_num_seqs]


def test_sampling_rows_stand_with_the_last_tile_of_their_chunk():
    first = SamplingRow(3, 72, (1 << 63) + 5, 0.5, -1, 0.9, 0.1, (7, 11), False)
    packed, program, last, mode = pack_step(
        [chunk(40), chunk(3)], {0: first, 1: first._replace(slot=4, logprobs=True)}, BUCKETS
    )
    sampling_rows = BUCKETS.view(packed, program).sampling_rows
    assert last == [1, 2] and mode is SamplingMode.LOGPROBS
    assert sampling_rows[:, 0].tolist() == [BUCKETS.max_num_seqs, 3, 4, BUCKETS.max_num_seqs]
    low, high = 5, -(1 << 31)
    assert sampling_rows[1, :5].tolist() == [3, 72, low, high, 0]
    np.testing.assert_array_equal(sampling_rows[1, 5:8].copy().view(np.float32), np.float32([0.5, 0.9, 0.1]))
    assert sampling_rows[1, 8:].tolist() == [7, 11, -1, -1, -1, -1, -1, -1]


@pytest.mark.parametrize("program", [Program(4, 1, 0), Program(8, 1, 4), Program(4, 32, 7)])
def test_parts_of_a_step_fill_its_array_without_overlap(program):
    packed = np.zeros(BUCKETS.packed_size(program), np.int32)
    inputs = BUCKETS.view(packed, program)
    parts = [inputs.tokens, inputs.tiles, inputs.sampling_rows]
    if inputs.lora is not None:
        parts += [inputs.lora.adapters, inputs.lora.rank_rows, inputs.lora.first_blocks, inputs.lora.tile_adapter]
    for part in parts:
        part += 1
    assert (packed == 1).all() and (inputs.lora is None) == (program.adapted == 0)
    on_device = BUCKETS.view(jnp.asarray(packed), program)
    assert [on_device.tokens.shape, on_device.tiles.shape] == [inputs.tokens.shape, inputs.tiles.shape]
