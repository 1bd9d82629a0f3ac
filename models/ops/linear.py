"""The product with a weight matrix `[d_out, d_in]`, the form in which each platform multiplies fastest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

WEIGHTS_FIRST_ROWS = range(2, 257)
"""With one row XLA has a matrix-vector product of its own; with more than 256 the transposition costs what is won."""


def linear(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """`[..., d_out]` of `x [..., d_in]` and `weight [d_out, d_in]`.

    On CPU the weights come first: XLA's matrix product packs its second operand anew at every call, which for a few rows
    costs as much as multiplying (up to 1.6 times the whole, docs/experiments.md).
    """
    out_dtype = out_dtype or x.dtype

    def rows_first(x: jax.Array, weight: jax.Array) -> jax.Array:
        return lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=out_dtype)

    def weights_first(x: jax.Array, weight: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        product = lax.dot_general(weight, rows, (((1,), (1,)), ((), ())), preferred_element_type=out_dtype)
        # without the barrier XLA moves the transposition into the product and has it rows first again
        return lax.optimization_barrier(product).T.reshape(*x.shape[:-1], weight.shape[0])

    if x.size // x.shape[-1] not in WEIGHTS_FIRST_ROWS:
        return rows_first(x, weight)
    return lax.platform_dependent(x, weight, cpu=weights_first, default=rows_first)
