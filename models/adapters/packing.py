"""Packing of adapters into pages, and their way back from packed pages to matrices."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.models.adapters.weights import AdapterWeights

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from chameleon_jax.models.page_layout import AdapterPlacement, PageLayout


def pack(weights: AdapterWeights, layout: PageLayout, dtype: np.dtype) -> Float[np.ndarray, "layers pages page_elems"]:
    """Pack an adapter where its matrices are.

    On a device one program packs it, compiled once for each set of shapes, and only the packed block is copied to the host. It
    takes as much of the device's memory as the adapter takes of the pool, until it was copied.
    """
    if not weights.on_device or weights.vectors:
        return pack_on_host(weights.to_host(), layout, dtype)
    units = layout.row_units(layout.place(weights.ranks))
    return np.asarray(_pack_on_device(weights.tensors, units, layout, dtype))


def pack_on_host(weights: AdapterWeights, layout: PageLayout, dtype: np.dtype) -> Float[np.ndarray, "layers pages page_elems"]:
    """Pack an adapter that is in host memory. Rows that a layer does not have are zero."""
    placement, config = layout.place(weights.ranks, weights.vectors), layout.config
    block = np.zeros((config.num_layers, placement.num_pages, layout.page_elems), dtype)
    units = layout.row_units(placement)
    for layer, pages in enumerate(block.reshape(config.num_layers, -1, layout.row_unit)):
        pages[units] = weights.rows(layer, config, dtype).reshape(-1, layout.row_unit)
    return block


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def _pack_on_device(
    tensors: dict[tuple[int, str], tuple[Any, Any]], units: Int[Array, " units"], layout: PageLayout, dtype: np.dtype
) -> Float[Array, "layers pages page_elems"]:
    weights = AdapterWeights(tensors)
    placement, config = layout.place(weights.ranks), layout.config
    rows = jnp.stack([weights.rows(i, config, dtype, jnp) for i in range(config.num_layers)])
    rows = rows.reshape(config.num_layers, -1, layout.row_unit)
    shape = (config.num_layers, placement.num_pages, layout.page_elems)
    block = jnp.zeros(shape, dtype).reshape(config.num_layers, -1, layout.row_unit)
    return block.at[:, units].set(rows, unique_indices=True).reshape(shape)


def unpack(
    block: Float[np.ndarray, "layers pages page_elems"], placement: AdapterPlacement, layout: PageLayout
) -> AdapterWeights:
    """Read the matrices of a packed adapter without vectors, float32.

    Every layer has every target then, at the target's rank.
    """
    units = layout.row_units(placement)
    tensors = {}
    for layer, pages in enumerate(block.reshape(layout.config.num_layers, -1, layout.row_unit)):
        rows, start = pages[units].ravel().astype(np.float32), 0
        for target, rank in placement.ranks.items():
            pair = []
            for width in layout.config.target_shape(target):
                pair.append(rows[start : start + rank * width].reshape(rank, width))
                start += rank * width
            tensors[layer, target] = (pair[0], pair[1].T)
    return AdapterWeights(tensors)


def content_hash(placement: AdapterPlacement, block: Float[np.ndarray, "layers pages page_elems"]) -> str:
    """Compute the identity of an adapter: equal packed weights have one hash, whatever their name, file or number format."""
    digest = hashlib.sha256(repr((sorted(placement.ranks.items()), sorted(placement.vectors))).encode())
    digest.update(np.ascontiguousarray(block).view(np.uint8).data)
    return digest.hexdigest()
