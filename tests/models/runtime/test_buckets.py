from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.models.runtime.buckets import Program, StepBuckets, powers_of_two, shapes_for
from tests.properties import examples

BUCKETS = StepBuckets(max_num_seqs=6, max_prefill_tokens=96, table_width=4, max_rank=16, max_adapter_pages=1)
GPU = dataclasses.replace(BUCKETS, **shapes_for("triton"))


def test_sizes():
    assert BUCKETS.decode == (1, 2, 4, 6) and BUCKETS.prompts == (32, 64, 96, 104)
    assert powers_of_two(1, 1) == (1,)
    large = dataclasses.replace(BUCKETS, max_prefill_tokens=1024)
    assert large.prompts == (32, 64, 128, 256, 384, 512, 768, 1024, 1032)
    assert dataclasses.replace(large, prefill_tile=64).prompts == (64, 128, 256, 512, 768, 1024, 1032)
    many = dataclasses.replace(BUCKETS, max_num_seqs=256, max_prefill_tokens=32)
    assert many.prompts == (32, 64, 128, 256, 288)  # sizes between prompts alone and all rows beside them
    assert BUCKETS.most_tokens == 128 and large.most_tokens == 1056


def test_on_a_cpu_one_program_takes_prompts_with_and_without_rows_that_decode():
    decodes = [Program(rows, rows, 0, adapted) for rows in (1, 2, 4, 6) for adapted in (0, 7)]
    tiles = {32: 2, 64: 4, 96: 6, 104: 8}
    assert list(BUCKETS.programs) == decodes + [Program(n, 6, tiles[n], adapted) for n in tiles for adapted in (0, 7)]


def test_on_a_gpu_programs_have_the_work_of_their_steps_and_no_more():
    assert [p for p in GPU.programs if not p.tiles] == [Program(n, n, 0, a) for n in (1, 2, 4, 6) for a in (0, 4, 7)]
    assert [p[0::3] for p in GPU.programs if not p.rows] == [(n, adapted) for n in (64, 96) for adapted in (0, 7)]
    assert [p for p in GPU.programs if p.rows and p.tiles] == [
        Program(64, 6, 2, 7),
        Program(96, 6, 4, 7),
        Program(104, 6, 4, 7),
    ]
    base = dataclasses.replace(GPU, max_adapter_pages=0)
    assert {p.adapted for p in base.programs} == {0} and any(p.rows and p.tiles for p in base.programs)
    extras = dataclasses.replace(GPU, extras=True)
    assert {p.adapted for p in extras.programs if p.rows and p.tiles} == {7, 9}  # plain adapters do not pay for extras


MANY_ROWS = dataclasses.replace(BUCKETS, max_num_seqs=200, max_prefill_tokens=160)


@pytest.mark.parametrize("buckets", [BUCKETS, GPU, dataclasses.replace(GPU, max_prefill_tokens=512, extras=True), MANY_ROWS])
@examples(200)
@given(data=st.data())
def test_every_step_that_the_scheduler_may_plan_has_the_program_that_it_expects(buckets, data):
    shapes = buckets.step_shapes
    rows = data.draw(st.integers(0, buckets.max_num_seqs))
    prompts, left, tiles = [], buckets.max_prefill_tokens, shapes.most_tiles
    for wanted in data.draw(st.lists(st.one_of(st.integers(1, left), st.integers(1, 5)), max_size=buckets.max_num_seqs - rows)):
        tokens = int(min(wanted, left, tiles * shapes.tile))
        if tokens:
            prompts.append(tokens)
            left, tiles = left - tokens, tiles - shapes.tiles(tokens)
    if not rows and not prompts:
        prompts = [1]
    adapted = data.draw(st.sampled_from(buckets.adapted(alone=False)))
    step = Program(rows + sum(prompts), rows, sum(map(buckets.step_shapes.tiles, prompts)), adapted)
    chosen = buckets.choose(step)
    assert chosen.can_run(step) and chosen in buckets.programs
    if prompts:
        assert chosen.tokens == shapes.padded(step.tokens, step.tiles)
        assert chosen == min(program for program in buckets.programs if program.can_run(step))
    else:
        assert not chosen.tiles and chosen.tokens == min(n for n in buckets.decode if n >= rows)


def test_a_step_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no program has room for"):
        BUCKETS.choose(Program(105, 7, 3, 0))
