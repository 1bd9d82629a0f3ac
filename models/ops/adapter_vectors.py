"""Scales and shifts of outputs, which adapters with DoRA or biases have beside their low-rank updates.

The rows are read from the page pool, one pair an adapter and matrix. This is plain XLA on every backend: a gather and one
pass over y, which XLA joins with its neighbours. Floor of a call: y read and written once.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.ops import INSIDE
from chameleon_jax.models.ops.batched_lora.plan import NO_TOKEN, LoraPlan, gather_rows, locate_rows
from chameleon_jax.models.page_layout import NO_RUN, RUNS, TRASH_PAGE, VECTOR_ROWS, PageLayout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

    from chameleon_jax.models.ops.shapes import Outputs, Pool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterVectors:
    """Places of the vectors of a batch's adapters, for the targets of the layers.

    Attributes:
        addresses: Page and offset of the scale less 1, and of the shift.
        there: Whether the adapter has them.
        token_adapter: Number of each token's adapter; negative where it has none.
        d_out: Outputs of each target's matrix (static).
    """

    addresses: Int[Array, "adapters targets 2 2"]
    there: Bool[Array, "adapters targets"]
    token_adapter: Int[Array, " tokens"]
    d_out: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def resolve_vectors(plan: LoraPlan, layout: PageLayout, tokens: int) -> AdapterVectors:
    """Find the vectors of a plan's adapters, once a step of `tokens` tokens and for every layer (device)."""
    adapters = jnp.asarray(plan.adapters)
    d_out = tuple(layout.config.target_shape(t)[1] for t in TARGETS)
    owner = jnp.arange(len(adapters))[:, None]
    start = adapters[:, RUNS * np.arange(len(TARGETS), dtype=np.int32) + 2]
    there = (owner <= jnp.max(plan.token_adapter)) & (start != NO_RUN)  # the table's other lines are empty
    start = jnp.broadcast_to(jnp.where(there, start, 0)[:, :, None], (*start.shape, VECTOR_ROWS))
    row, width = jnp.arange(VECTOR_ROWS), np.array(d_out, np.int32)[:, None]
    page, offset = locate_rows(adapters, owner[:, :, None], start, row, width, layout)
    page, offset = jnp.where(there[:, :, None], page, TRASH_PAGE), jnp.where(there[:, :, None], offset, 0)
    token_adapter = jnp.pad(jnp.asarray(plan.token_adapter), (0, tokens - len(plan.token_adapter)), constant_values=NO_TOKEN)
    return AdapterVectors(jnp.stack([page, offset], -1), there, token_adapter, d_out)


def scale_and_shift(y: Outputs, pages: Pool, vectors: AdapterVectors, names: tuple[str, ...]) -> Outputs:
    """Compute `scale * y + shift` with the vectors of each token's adapter; y where it has none.

    Args:
        y: Outputs of the base matrices `names`, side by side.
        pages: Pool of one layer.
        vectors: Places of the vectors (`resolve_vectors`).
        names: Matrices, of `models.config.TARGETS`.
    """
    owner = jnp.maximum(vectors.token_adapter, 0)
    adapted = (vectors.token_adapter >= 0)[:, None]
    scales, shifts = [], []
    for t in map(TARGETS.index, names):
        # the trash page may hold NaN, so that its rows are replaced and not multiplied
        there = vectors.there[:, t, None]
        found = [gather_rows(pages, vectors.addresses[:, t, row], vectors.d_out[t]) for row in range(VECTOR_ROWS)]
        scale, shift = (
            jnp.where(adapted, jnp.where(there, rows.astype(jnp.float32), 0.0).at[owner].get(**INSIDE), 0.0) for rows in found
        )
        scales.append(1 + scale)
        shifts.append(shift)
    scale, shift = (jnp.concatenate(parts, axis=1) for parts in (scales, shifts))
    return (scale * y.astype(jnp.float32) + shift).astype(y.dtype)
