"""Both forms of writing pages put every byte where it belongs and touch nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.ops.write_pages import CHUNK, write_by_layers, write_in_one_launch, write_pages

FORMS: dict[str, Callable[..., Any]] = {
    "layers": write_by_layers,
    "one launch": functools.partial(write_in_one_launch, interpret=True),
}


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_layers,page_elems", [(1, CHUNK), (3, 2 * CHUNK), (9, 96), (17, CHUNK + 8)])
@pytest.mark.parametrize("num_written", [1, 4])
def test_written_pages_hold_the_block_and_others_are_unchanged(form, dtype, num_layers, page_elems, num_written):
    rng = np.random.default_rng(page_elems)
    pool = [jnp.asarray(rng.standard_normal((7, page_elems)), dtype) for _ in range(num_layers)]
    block = jnp.asarray(rng.standard_normal((num_layers, num_written, page_elems)), dtype)
    page_ids = rng.permutation(7)[:num_written].astype(np.int32)
    expected = [np.array(layer) for layer in pool]
    for layer, content in zip(expected, np.asarray(block)):
        layer[page_ids] = content
    written = jax.jit(FORMS[form])(pool, block, page_ids)
    for got, want in zip(written, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)


def test_a_block_of_another_shape_is_refused():
    pool = [jnp.zeros((4, 16))] * 2
    with pytest.raises(AssertionError, match="shape"):
        write_pages(pool, jnp.zeros((3, 1, 16)), jnp.zeros(1, jnp.int32), backend="blocked")
