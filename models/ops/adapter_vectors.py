"""Scales and shifts of outputs, which adapters with DoRA or biases have beside their low-rank updates.

The rows are read from the page pool, one pair a tile of tokens and matrix. This is plain XLA on every backend: a gather and one
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
from chameleon_jax.models.ops.batched_lora.plan import LoraPlan, gather_rows, locate_rows
from chameleon_jax.models.page_layout import NO_RUN, RUNS, TRASH_PAGE, VECTOR_ROWS, PageLayout

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Int

    from chameleon_jax.models.ops.shapes import Outputs, Pool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TileVectors:
    """Places of the vectors of each tile's adapter, for the targets of the layers.

    Attributes:
        addresses: Page and offset of the scale less 1, and of the shift.
        there: Whether the tile's adapter has them.
        d_out: Outputs of each target's matrix (static).
    """

    addresses: Int[Array, "tiles targets 2 2"]
    there: Bool[Array, "tiles targets"]
    d_out: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def resolve_vectors(plan: LoraPlan, layout: PageLayout) -> TileVectors:
    """Find the vectors of each tile's adapter, once a step and for every layer (device)."""
    adapters, owner = jnp.asarray(plan.adapters), jnp.asarray(plan.tile_adapter)
    d_out = tuple(layout.config.target_shape(t)[1] for t in TARGETS)
    owner, adapted = jnp.maximum(owner, 0)[:, None], owner >= 0
    start = adapters.at[owner, RUNS * np.arange(len(TARGETS), dtype=np.int32) + 2].get(**INSIDE)
    there = adapted[:, None] & (start != NO_RUN)
    start = jnp.broadcast_to(jnp.where(there, start, 0)[:, :, None], (*start.shape, VECTOR_ROWS))
    row, width = jnp.arange(VECTOR_ROWS), np.array(d_out, np.int32)[:, None]
    page, offset = locate_rows(adapters, owner[:, :, None], start, row, width, layout)
    page, offset = jnp.where(there[:, :, None], page, TRASH_PAGE), jnp.where(there[:, :, None], offset, 0)
    return TileVectors(jnp.stack([page, offset], -1), there, d_out)


def scale_and_shift(y: Outputs, pages: Pool, vectors: TileVectors, names: tuple[str, ...]) -> Outputs:
    """Compute `scale * y + shift` with the vectors of each token's adapter; y where it has none.

    Args:
        y: Outputs of the base matrices `names`, side by side.
        pages: Pool of one layer.
        vectors: Places of the vectors (`resolve_vectors`).
        names: Matrices, of `models.config.TARGETS`.
    """
    tiles = vectors.there.shape[0]
    scales, shifts = [], []
    for t in map(TARGETS.index, names):
        # the trash page may hold NaN, so that its rows are replaced and not multiplied
        there = vectors.there[:, t, None]
        found = [gather_rows(pages, vectors.addresses[:, t, row], vectors.d_out[t]) for row in range(VECTOR_ROWS)]
        scale, shift = (jnp.where(there, rows.astype(jnp.float32), 0.0) for rows in found)
        scales.append(1 + scale)
        shifts.append(shift)
    scale, shift = (jnp.concatenate(parts, axis=1)[:, None] for parts in (scales, shifts))
    tiled = y.reshape(tiles, -1, y.shape[1]).astype(jnp.float32)
    return (scale * tiled + shift).astype(y.dtype).reshape(y.shape)
