"""Sizes of steps, and the size that is chosen where a step would be padded."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.scheduler.step_shapes import ANY_SIZE, StepShapes
from tests.properties import examples

SHAPES = StepShapes((32, 64, 128, 256, 384, 512), tile=32)
MOST = SHAPES.sizes[-1]
any_shapes = st.one_of(
    st.just(ANY_SIZE),
    st.builds(
        lambda sizes, tile: StepShapes(tuple(sorted(sizes)), tile),
        st.sets(st.integers(1, 200), min_size=1, max_size=6),
        st.sampled_from([1, 8, 32]),
    ),
)


@pytest.mark.parametrize(("tokens", "padded"), [(0, 0), (1, 32), (32, 32), (33, 64), (129, 256), (512, 512), (513, 513)])
def test_a_step_is_padded_to_the_next_size(tokens, padded):
    assert SHAPES.padded(tokens) == padded
    assert ANY_SIZE.padded(tokens) == tokens


@pytest.mark.parametrize(("tokens", "tiles", "padded"), [(24, 2, 32), (24, 3, 64), (64, 4, 64), (64, 5, 128), (32, 9, 256)])
def test_a_step_of_many_prompts_needs_room_for_their_tiles(tokens, tiles, padded):
    assert SHAPES.padded(tokens, tiles) == padded
    assert ANY_SIZE.padded(tokens, tiles) == tokens


def test_every_step_up_to_the_largest_size_is_padded_to_the_smallest_size_that_holds_it():
    for tokens in range(1, MOST + 1):
        assert SHAPES.padded(tokens) == min(size for size in SHAPES.sizes if size >= tokens)


@pytest.mark.parametrize(
    ("tokens", "rows", "pass_tokens", "size"),
    [
        (97, 0, 30, 64),  # 31 tokens of padding cost more than another step
        (97, 0, 31, 128),
        (97, 20, 10.9, 64),  # the rows are part of the step: 11 tokens of padding are left
        (97, 20, 11, 128),
        (150, 10, 95, 128),
        (150, 10, 96, 256),
        (300, 0, math.inf, 384),
        (480, 0, 0, 384),
    ],
)
def test_a_step_is_padded_where_another_would_cost_more(tokens, rows, pass_tokens, size):
    assert SHAPES.size(tokens, SHAPES.tiles(tokens), rows, pass_tokens) == size


def test_a_last_tile_that_a_size_fills_in_part_counts():
    shapes = StepShapes((20, 40), tile=32)
    assert [shapes.room(size) for size in shapes.sizes] == [2, 4] and shapes.most_tiles == 4
    assert [shapes.padded(8, tiles) for tiles in (2, 3, 4)] == [20, 40, 40]


@pytest.mark.parametrize(("pass_tokens", "size"), [(39, 32), (40, 64)])
def test_prompts_whose_tiles_need_a_larger_size_are_parted_where_padding_costs_more(pass_tokens, size):
    assert SHAPES.size(24, 3, 0, pass_tokens) == size


@pytest.mark.parametrize("rows", [0, 1, 31])
@pytest.mark.parametrize("size", SHAPES.sizes)
def test_a_full_size_is_taken_as_it_is(size, rows):
    tiles = SHAPES.tiles(size - rows)
    assert SHAPES.size(size - rows, tiles, rows, 0) == SHAPES.size(size - rows, tiles, rows, math.inf) == size


@pytest.mark.parametrize(("tokens", "rows", "size"), [(3, 0, 64), (3, 64, 256), (3, 100, 256)])
def test_a_step_with_no_smaller_size_for_its_prompts_is_padded(tokens, rows, size):
    """Not even the rows fit the next smaller size, or they fill it."""
    assert StepShapes((64, 256)).size(tokens, 1, rows, 0) == size


@examples(300)
@given(shapes=any_shapes, tokens=st.integers(1, 250), rows=st.integers(0, 60), pass_tokens=st.integers(0, 300))
def test_the_choice_is_the_cheapest_of_all(shapes, tokens, rows, pass_tokens):
    """A single prompt's tiles bind no size."""

    def cost(taken: int) -> int:
        rest = tokens - taken
        return shapes.padded(rows + taken) - rows + (rest + pass_tokens if rest else 0)

    taken = min(shapes.size(tokens, shapes.tiles(tokens), rows, pass_tokens) - rows, tokens)
    cheapest = min(map(cost, range(1, tokens + 1)))
    assert 1 <= taken <= tokens
    assert taken == max(taken for taken in range(1, tokens + 1) if cost(taken) == cheapest)


@examples(300)
@given(
    shapes=any_shapes,
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=9),
    rows=st.integers(0, 60),
    pass_tokens=st.integers(0, 100),
)
def test_a_size_has_room_for_all_or_is_the_next_smaller_one(shapes, prompts, rows, pass_tokens):
    tokens, tiles = sum(prompts), sum(map(shapes.tiles, prompts))
    size, padded = shapes.size(tokens, tiles, rows, pass_tokens), shapes.padded(rows + tokens, tiles)
    assert size == padded or (size < padded and size > rows and padded - rows - tokens > pass_tokens)
    if size in shapes.sizes:
        assert size != padded or (size >= rows + tokens and shapes.room(size) >= tiles)
        assert not [other for other in shapes.sizes if size < other < padded]


@given(tokens=st.integers(1, 1000), rows=st.integers(0, 100), pass_tokens=st.floats(0, 1e4))
def test_a_device_of_any_size_takes_all(tokens, rows, pass_tokens):
    assert ANY_SIZE.size(tokens, tokens, rows, pass_tokens) == rows + tokens
    assert ANY_SIZE.most_tiles == math.inf
