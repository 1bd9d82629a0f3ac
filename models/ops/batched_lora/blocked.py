"""Batched LoRA in plain XLA: a loop over the plan's blocks of rank rows, each against its own window of tokens.

The trip count is data: without adapters there is no iteration. Floor of a call: the bytes of the distinct adapters' rows in
each window, read once. On a GPU such loops synchronise with the host; `triton.py` is for those.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax

from chameleon_jax.models.ops.batched_lora.plan import LoraTargets, gather_rows

if TYPE_CHECKING:
    from jax import Array

    from chameleon_jax.models.ops.shapes import Inputs, Outputs, Pool


FORWARD: Any = {"allow_negative_indices": False}
"""Indices that do not count from the end, which would take several operations more, in every layer and product."""


def batched_lora(y: Outputs, x: Inputs, pages: Pool, targets: LoraTargets, names: tuple[str, ...]) -> Outputs:
    """Add the adapters' updates as in `api.batched_lora`."""
    for t, column, d_out in targets.columns(names):
        y = _add_target(y, x, pages, targets, t, column, d_out)
    return y


def _add_target(y: Outputs, x: Inputs, pages: Pool, targets: LoraTargets, t: int, column: int, d_out: int) -> Outputs:
    """Add the updates of target `t`, whose outputs are the `d_out` columns from `column` on."""
    window_tokens, d_in = targets.window_tokens, x.shape[1]

    def one_block(block, y):
        addresses, owner = _at(targets.addresses, block, t), _at(targets.row_adapter, block, t)
        # the last window may have to slide back over tokens of the one before, which had this adapter's update already
        begin = _at(targets.block_window, block, t) * window_tokens
        window = jnp.minimum(begin, x.shape[0] - window_tokens)
        mine = (window + jnp.arange(window_tokens) >= begin)[:, None]
        mine &= lax.dynamic_slice(targets.token_adapter, (window,), (window_tokens,), **FORWARD)[:, None] == owner
        tokens = lax.dynamic_slice(x, (window, 0), (window_tokens, d_in), **FORWARD)
        a = gather_rows(pages, addresses[0], d_in)
        b = gather_rows(pages, addresses[1], d_out)
        low = jnp.einsum("nd,rd->nr", tokens, a, preferred_element_type=jnp.float32)
        low = jnp.where(mine, low, 0.0).astype(b.dtype)
        # rows that pad a block are read from the trash page, which may hold NaN, and 0 * NaN is NaN
        b = jnp.where((owner >= 0)[:, None], b, 0)
        update = jnp.einsum("nr,rd->nd", low, b, preferred_element_type=jnp.float32)
        before = lax.dynamic_slice(y, (window, column), (window_tokens, d_out), **FORWARD)
        return lax.dynamic_update_slice(y, (before + update).astype(y.dtype), (window, column), **FORWARD)

    return lax.fori_loop(0, targets.num_blocks[t], one_block, y)


def _at(array: Array, block: Array, t: int) -> Array:
    """Return `array[block, t]`."""
    begin = (block, jnp.int32(t), *[jnp.int32(0)] * (array.ndim - 2))
    return lax.dynamic_slice(array, begin, (1, 1, *array.shape[2:]), **FORWARD).reshape(array.shape[2:])
