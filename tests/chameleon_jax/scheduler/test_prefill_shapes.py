from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chameleon_jax.scheduler.prefill_shapes import ANY_SIZE, PrefillShapes

SHAPES = PrefillShapes(32, (1, 2, 4, 8, 12, 16))


@pytest.mark.parametrize(("tokens", "tiles"), [(1, 1), (32, 1), (33, 2), (96, 3)])
def test_a_sequence_takes_whole_tiles(tokens, tiles):
    assert SHAPES.tiles(tokens) == ANY_SIZE.tiles(tokens) == tiles
    assert SHAPES.padded(tokens) == 32 * tiles
    assert ANY_SIZE.padded(tokens) == tokens


@pytest.mark.parametrize(
    ("chunks", "tokens"), [([], 0), ([1], 32), ([32, 32], 64), ([33, 1], 128), ([32] * 5, 256), ([32] * 9, 384)]
)
def test_a_step_is_padded_to_the_next_size(chunks, tokens):
    assert SHAPES.step_tokens(chunks) == tokens
    assert ANY_SIZE.step_tokens(chunks) == sum(chunks)


@pytest.mark.parametrize(
    ("tiles", "pass_tokens", "size"),
    [
        (3, 31, 2),  # a tile of padding costs more than another step's fixed cost
        (3, 32, 4),
        (5, 95, 4),
        (5, 96, 8),
        (7, 31, 4),
        (7, 32, 8),
        (9, math.inf, 12),
        (15, 0, 12),
    ],
)
def test_a_step_is_padded_where_another_would_cost_more(tiles, pass_tokens, size):
    assert SHAPES.size(tiles, pass_tokens) == size


@pytest.mark.parametrize("tiles", [1, 2, 4, 8, 12, 16])
def test_a_full_size_is_taken_as_it_is(tiles):
    assert SHAPES.size(tiles, 0) == SHAPES.size(tiles, math.inf) == tiles


@given(tiles=st.integers(0, 16), pass_tokens=st.floats(0, 1e4))
def test_a_step_never_stands_still(tiles, pass_tokens):
    assert min(tiles, 1) <= SHAPES.size(tiles, pass_tokens) <= 16
    assert ANY_SIZE.size(tiles, pass_tokens) == tiles


def test_a_step_below_the_smallest_size_is_padded():
    assert PrefillShapes(32, (4, 8)).size(3, 0) == 4
