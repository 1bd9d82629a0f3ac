"""Copy of packed pages into the pool, in place where the pool is donated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp

from chameleon_jax.models.ops import pallas_triton as pt

if TYPE_CHECKING:
    from chameleon_jax.models.ops.shapes import Block, PageIds, Pools

CHUNK = 1024
"""Elements of a page that one program copies, in every layer: 16 bytes a thread in bfloat16."""
LOADS_AHEAD = 8
"""Layers that a program loads before it stores the first one: a store waits for its load, and eight waits pass together."""


def write_pages(pages: Pools, block: Block, page_ids: PageIds, *, backend: str) -> Pools:
    """Write a packed block into some pages of the pool, in place where the pool is donated.

    Args:
        pages: Pool of each layer.
        block: Content of the pages.
        page_ids: Pages to write; int32, all different, each below num_pages.
        backend: One of `ops.BACKENDS`.
    """
    # the kernel writes by address, so a wrong shape must not reach it
    chex.assert_shape(block, (len(pages), page_ids.shape[0], pages[0].shape[1]))
    return write_in_one_launch(pages, block, page_ids) if backend == "triton" else write_by_layers(pages, block, page_ids)


def write_by_layers(pages: Pools, block: Block, page_ids: PageIds) -> Pools:
    """Write as `write_pages`, in plain JAX: a scatter a layer."""
    return [layer.at[page_ids].set(block[i], mode="promise_in_bounds", unique_indices=True) for i, layer in enumerate(pages)]


def write_in_one_launch(pages: Pools, block: Block, page_ids: PageIds, *, interpret: bool = False) -> Pools:
    """Write as `write_pages`, in one kernel. `interpret` runs it without a GPU.

    XLA launches a scatter for each layer, and two for a single page: 33 launches a piece of Llama-7B, 66 for one page, 264 in
    128 MiB (0.6 ms). One kernel that is handed all layers' arrays copies as fast and is launched once.
    """
    aliases = tuple((2 + i, i) for i in range(len(pages)))
    kernel = pt.Kernel(_kernel, (("num_layers", len(pages)),), num_warps=4, num_stages=1, name="write_pages", aliases=aliases)
    shapes = [jax.ShapeDtypeStruct(layer.shape, layer.dtype) for layer in pages]
    grid = (page_ids.shape[0], pt.ceil_div(block.shape[2], CHUNK))
    return kernel.call(block, page_ids, *pages, out_shape=shapes, grid=grid, interpret=interpret)


def _kernel(block: Any, page_ids: Any, *pools: Any, num_layers: int) -> None:
    """Copy one chunk of one page. `pools` are all layers' arguments, then all layers' results, in the same memory."""
    written, page_elems = pools[num_layers:], block.shape[2]
    n, chunk = pt.program_id(0), pt.program_id(1)
    page = pt.load(page_ids, (n,))
    elems = chunk * CHUNK + jnp.arange(CHUNK)
    inside = None if page_elems % CHUNK == 0 else elems < page_elems
    for first in range(0, num_layers, LOADS_AHEAD):
        layers = range(first, min(first + LOADS_AHEAD, num_layers))
        values = [pt.load(block, (layer, n, elems), inside) for layer in layers]
        for layer, value in zip(layers, values):
            pt.store(written[layer], (page, elems), value, inside)
