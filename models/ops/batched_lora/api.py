"""Choice of a backend. Every backend has the signature and the meaning of `batched_lora` below."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import chex
import jax

from chameleon_jax.models.ops.batched_lora import blocked, reference, triton
from chameleon_jax.models.ops.batched_lora.plan import LoraTargets

if TYPE_CHECKING:
    from chameleon_jax.models.ops.shapes import Inputs, Outputs, Pool

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.batched_lora,
    "blocked": blocked.batched_lora,
    "triton": triton.batched_lora,
}


def batched_lora(
    y: Outputs, x: Inputs, pages: Pool, targets: LoraTargets, names: tuple[str, ...], *, backend: str = "blocked"
) -> Outputs:
    """Add each token's own adapter: `y[n] + B @ (A @ x[n])`, with the A and B of token n's adapter.

    Matrices that share an input are adapted together: their outputs stand side by side in y.

    Args:
        y: Outputs of the base matrices; d_out is the sum over `names`.
        x: Inputs of the matrices.
        pages: Pool of one layer.
        targets: Addresses of the batch's rank rows (`plan.resolve`).
        names: Matrices, of `models.config.TARGETS`.
        backend: One of BACKENDS.

    Returns:
        y with the updates, in its dtype. Tokens without an adapter, or whose adapter lacks a target, keep its columns.
    """
    # kernels read by address, so a wrong shape must not reach them
    chex.assert_rank([y, x, pages], 2)
    chex.assert_equal_shape_prefix([y, x], 1)
    return BACKENDS[backend](y, x, pages, targets, names)
