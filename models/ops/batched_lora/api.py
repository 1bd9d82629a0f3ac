"""Picks a backend. Every backend has the signature and the meaning of `batched_lora` below."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax

from chameleon_jax.models.ops.batched_lora import blocked, reference
from chameleon_jax.models.ops.batched_lora.plan import LoraTargets

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.batched_lora,
    "blocked": blocked.batched_lora,
}


def batched_lora(
    y: jax.Array, x: jax.Array, pages: jax.Array, targets: LoraTargets, target: str, *, backend: str = "blocked"
) -> jax.Array:
    """Adds each token's own adapter: `y[n] + B @ (A @ x[n])`, with the A and B of token n's adapter.

    Args:
        y: `[tokens, d_out]`, what the base matrix gave.
        x: `[tokens, d_in]`, what went into it.
        pages: one layer's pool, `[num_pages, page_elems]`.
        targets: where the rank rows of the batch lie (`plan.resolve`).
        target: which matrix, one of `models.config.TARGETS`.

    Returns:
        `[tokens, d_out]` of y's dtype. Tokens without an adapter, or whose adapter lacks the target, are unchanged.
    """
    chex.assert_rank([y, x, pages], 2)
    chex.assert_equal_shape_prefix([y, x, targets.token_adapter], 1)
    return BACKENDS[backend](y, x, pages, targets, target)
