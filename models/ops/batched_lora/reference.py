"""The oracle: every listed rank row against every token, then a mask. Work grows with tokens times rows; for tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.ops.batched_lora.plan import BLOCK_ROWS, LoraTargets, gather_rows


def batched_lora(y: jax.Array, x: jax.Array, pages: jax.Array, targets: LoraTargets, target: str) -> jax.Array:
    """See `api.batched_lora`."""
    t = TARGETS.index(target)
    a, b = (
        gather_rows(pages, targets.addresses[t, side], width).astype(jnp.float32)
        for side, width in enumerate((x.shape[1], y.shape[1]))
    )
    row = jnp.arange(a.shape[0])
    window = targets.windows[t][row // BLOCK_ROWS]
    token = jnp.arange(x.shape[0])[:, None]
    mine = (targets.token_adapter[:, None] == targets.row_adapter[t]) & (row < targets.num_blocks[t] * BLOCK_ROWS)
    mine &= (token >= window) & (token < window + targets.window_tokens)
    low = jnp.where(mine, x.astype(jnp.float32) @ a.T, 0.0)
    return (y.astype(jnp.float32) + low @ b).astype(y.dtype)
