"""Product with a weight matrix `[d_out, d_in]`, in the form in which each platform multiplies fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float

WEIGHTS_FIRST_ROWS = range(2, 257)
"""Rows for which a CPU takes the weights first. XLA has a matrix-vector product of its own for one row; above 256 rows the
transposition costs as much as it saves."""


def linear(
    x: Float[Array, "*batch d_in"], weight: Float[Array, "d_out d_in"], out_dtype: jnp.dtype | None = None
) -> Float[Array, "*batch d_out"]:
    """Multiply `x` by the transposed weights.

    On CPU the weights come first: XLA's matrix product packs its second operand anew at every call, which for a few rows
    costs as much as multiplying (up to 1.6 times the whole, docs/experiments.md).

    Args:
        x: Inputs.
        weight: Matrix.
        out_dtype: Dtype of the result. None takes the dtype of `x`.
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
