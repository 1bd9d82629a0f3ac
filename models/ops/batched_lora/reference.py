"""Oracle for tests: every listed rank row against every token, then a mask. Work grows with tokens times rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp

from chameleon_jax.models.ops.batched_lora.plan import BLOCK_ROWS, LoraTargets, gather_rows

if TYPE_CHECKING:
    from chameleon_jax.models.ops.shapes import Inputs, Outputs, Pool


def batched_lora(y: Outputs, x: Inputs, pages: Pool, targets: LoraTargets, names: tuple[str, ...]) -> Outputs:
    """Add the adapters' updates as in `api.batched_lora`."""
    updates = []
    for t, _, d_out in targets.columns(names):
        a, b = (
            gather_rows(pages, targets.addresses[:, t, side].reshape(-1, 2), width).astype(jnp.float32)
            for side, width in enumerate((x.shape[1], d_out))
        )
        row = jnp.arange(a.shape[0])
        window = targets.block_window[row // BLOCK_ROWS, t]
        token = jnp.arange(x.shape[0])[:, None]
        mine = (targets.token_adapter[: x.shape[0], None] == targets.row_adapter[:, t].ravel()) & (
            row < targets.num_blocks[t] * BLOCK_ROWS
        )
        mine &= token // targets.window_tokens == window
        updates.append(jnp.where(mine, x.astype(jnp.float32) @ a.T, 0.0) @ b)
    return (y.astype(jnp.float32) + jnp.concatenate(updates, axis=1)).astype(y.dtype)
