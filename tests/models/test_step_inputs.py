from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from chameleon_jax.models.config import ATTENTION_TARGETS, PRESETS, TARGETS
from chameleon_jax.models.page_layout import AdapterPlacement, PageLayout
from chameleon_jax.models.step_inputs import Segment, pack_step
from chameleon_jax.models.steps import FROM_SLOT, StepBuckets

LAYOUT = PageLayout.for_model(PRESETS["tiny"])
BUCKETS = StepBuckets(
    max_num_seqs=8,
    max_prefill_tokens=128,
    table_width=6,
    max_rank=8,
    max_adapter_pages=LAYOUT.place({t: 8 for t in TARGETS}).num_pages,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    placement: AdapterPlacement
    pages: tuple[int, ...]

    @classmethod
    def of(cls, *targets: str) -> Placed:
        placement = LAYOUT.place({t: 8 for t in targets})
        return cls(placement, tuple(range(1, 1 + placement.num_pages)))


def rows(*adapters: Placed | None) -> list[Segment]:
    return [Segment(None, 20 + i, i, (7, 8), adapter) for i, adapter in enumerate(adapters)]


def chunk(tokens: int, adapter: Placed | None = None) -> Segment:
    return Segment(list(range(100, 100 + tokens)), 32, 3, (5, 6, 9), adapter)


@pytest.mark.parametrize("alone", [False, True])
def test_the_program_follows_what_the_batch_adapts(alone):
    buckets = dataclasses.replace(BUCKETS, attention_alone=alone)
    narrow, wide = Placed.of(*ATTENTION_TARGETS), Placed.of("q_proj", "up_proj")
    cases = {
        (None, None): 0,
        (narrow, None): 4 if alone else 7,
        (Placed.of("v_proj"), narrow): 4 if alone else 7,
        (narrow, wide): 7,
        (Placed.of("down_proj"),): 7,
    }
    for adapters, adapted in cases.items():
        inputs, _ = pack_step(rows(*adapters), buckets)
        assert inputs.program == (len(adapters), 1, adapted)
        assert adapted in buckets.adapted(1)
    assert pack_step([chunk(40, narrow)], buckets)[0].program == (2, 32, 7)  # prompts are bound by computing


def test_padding_is_marked():
    inputs, last = pack_step([chunk(40), chunk(3)], BUCKETS)
    assert inputs.program == (4, 32, 0) and last == [1, 2]
    assert inputs.tiles[:, 1].tolist() == [32, 8, 3, 0]
    assert inputs.tiles[:, 0].tolist() == [32, 64, 32, 0]
    assert inputs.tiles[:, 2].tolist() == [3, 3, 3, BUCKETS.max_num_seqs]
    np.testing.assert_array_equal(inputs.tiles[:3, 3:], [[5, 6, 9, 0, 0, 0]] * 3)
    np.testing.assert_array_equal(inputs.tokens[:40], np.arange(100, 140))


def test_decode_takes_tokens_from_their_slots():
    inputs, last = pack_step(rows(None, None, None), BUCKETS)
    assert inputs.tokens.tolist() == [FROM_SLOT] * 3 + [0] and last == [0, 1, 2]
    assert inputs.tiles[:, 2].tolist() == [0, 1, 2, BUCKETS.max_num_seqs]
