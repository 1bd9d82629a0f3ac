"""Picks a backend. Every backend has the signature and the meaning of `batched_lora` below."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax

from chameleon_jax.models.ops.batched_lora import blocked, reference, triton
from chameleon_jax.models.ops.batched_lora.plan import LoraTargets

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.batched_lora,
    "blocked": blocked.batched_lora,
    "triton": triton.batched_lora,
}


def batched_lora(
    y: jax.Array,
    x: jax.Array,
    pages: jax.Array,
    targets: LoraTargets,
    names: tuple[str, ...],
    *,
    backend: str = "blocked",
) -> jax.Array:
    """Adds each token's own adapter: `y[n] + B @ (A @ x[n])`, with the A and B of token n's adapter.

    Matrices that share an input are adapted together: their outputs stand side by side in y.

    Args:
        y: `[tokens, d_out of names[0] + d_out of names[1] + ...]`, what the base matrices gave.
        x: `[tokens, d_in]`, what went into them.
        pages: one layer's pool, `[num_pages, page_elems]`.
        targets: where the rank rows of the batch lie (`plan.resolve`).
        names: which matrices, of `models.config.TARGETS`.

    Returns:
        y's shape and dtype. Tokens without an adapter, or whose adapter lacks a target, are unchanged in its columns.
    """
    chex.assert_rank([y, x, pages], 2)
    chex.assert_equal_shape_prefix([y, x], 1)
    return BACKENDS[backend](y, x, pages, targets, names)
