from __future__ import annotations

import dataclasses

from chameleon_jax.models.runtime.buckets import DECODE_TILE, StepBuckets, powers_of_two

BUCKETS = StepBuckets(max_num_seqs=6, max_prefill_tokens=96, table_width=4, max_rank=16, max_adapter_pages=1)


def test_every_size_has_a_bucket():
    assert BUCKETS.decode == (1, 2, 4, 6) and BUCKETS.prefill == (1, 2, 3)
    assert [BUCKETS.bucket(n, DECODE_TILE) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]
    assert set(BUCKETS.decode) | set(BUCKETS.prefill) == set(BUCKETS.sample_rows)
    assert powers_of_two(1, 1) == (1,)
    assert dataclasses.replace(BUCKETS, max_prefill_tokens=1024).prefill == (1, 2, 4, 8, 12, 16, 24, 32)
    assert dataclasses.replace(BUCKETS, max_prefill_tokens=1024, prefill_tile=64).prefill == (1, 2, 4, 8, 12, 16)
