"""Batched LoRA in plain XLA: a loop over the plan's blocks of rank rows, each against its own window of tokens.

The trip count is data: without adapters there is no iteration. Floor of a call: the bytes of the distinct adapters' rows in
each window, read once. On a GPU such loops synchronise with the host; `triton.py` is for those.
"""

from __future__ import annotations

import itertools
import operator
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from chameleon_jax.models.ops import FORWARD
from chameleon_jax.models.ops.batched_lora.plan import LoraTargets, gather_rows

if TYPE_CHECKING:
    from jax import Array

    from chameleon_jax.models.ops.shapes import Inputs, Outputs, Pool


def batched_lora(y: Outputs, x: Inputs, pages: Pool, targets: LoraTargets, names: tuple[str, ...]) -> Outputs:
    """Add the adapters' updates as in `api.batched_lora`."""
    for _, alike in itertools.groupby(targets.columns(names), key=operator.itemgetter(2)):
        y = _add_targets(y, x, pages, targets, list(alike))
    return y


def _add_targets(y: Outputs, x: Inputs, pages: Pool, targets: LoraTargets, columns: list[tuple[int, int, int]]) -> Outputs:
    """Add the updates of consecutive targets of one width in one loop, so that programs have fewer operations."""
    first, column, d_out = columns[0]
    d_in, window_tokens, blocks = x.shape[1], targets.window_tokens, targets.listed

    def one_block(number, y):
        addresses, key, begin = (_at(a, number) for a in (blocks.addresses, blocks.row_keys, blocks.begins))
        mine = lax.dynamic_slice(blocks.token_keys, (begin,), (window_tokens,), **FORWARD)[:, None] == key
        tokens = lax.dynamic_slice(x, (begin, 0), (window_tokens, d_in), **FORWARD)
        a = gather_rows(pages, addresses[0], d_in)
        b = gather_rows(pages, addresses[1], d_out)
        # rank rows first, as XLA packs the second operand of a product anew and the window's tokens are fewer. Without the
        # barrier it moves the transposition into the product and has it tokens first again
        low = jnp.einsum("rd,nd->rn", a, tokens, preferred_element_type=jnp.float32)
        low = jnp.where(mine, lax.optimization_barrier(low).T, 0.0).astype(b.dtype)
        update = jnp.einsum("nr,rd->nd", low, b, preferred_element_type=jnp.float32)
        place = sum([(number >= blocks.starts[t]).astype(jnp.int32) for t, _, _ in columns[1:]])
        corner = (begin, jnp.int32(column + place * d_out))
        before = lax.dynamic_slice(y, corner, (window_tokens, d_out), **FORWARD)
        return lax.dynamic_update_slice(y, (before + update).astype(y.dtype), corner, **FORWARD)

    return lax.fori_loop(blocks.starts[first], blocks.starts[first + len(columns)], one_block, y)


def _at(array: Array, number: Array) -> Array:
    """Return `array[number]`."""
    return lax.dynamic_index_in_dim(array, number, keepdims=False, **FORWARD)
