"""Which rank rows a batch needs and where they lie.

The tokens of a batch are cut into windows. For each target the host lists, window after window, the rank rows of the
adapters that occur in the window: true ranks, nothing for an absent target, each list filled up to whole blocks of
BLOCK_ROWS. A device step walks the blocks: it gathers a block's rows of A and B from the pool, multiplies the window's
tokens by them, and keeps the products of a token with its own adapter's rows. Work grows with the ranks that are in the
batch, never with the largest rank or with how many adapters are resident.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.page_layout import TRASH_PAGE, AdapterPlacement, PageLayout

BLOCK_ROWS = 32
"""Rank rows gathered and multiplied in one iteration (docs/experiments.md has what others cost)."""
MAX_RANK = 256
"""A rank row is coded as adapter * MAX_RANK + row."""


class PlacedAdapter(Protocol):
    """An adapter that is in the pool."""

    @property
    def placement(self) -> AdapterPlacement: ...
    @property
    def pages(self) -> Sequence[int]: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraPlan:
    """What the host sends of the adapters in a batch. Three arrays, so that a dispatch has few arguments.

    Attributes:
        adapters: `[tiles, 2 * targets + max_pages]` int32; for each adapter of the batch the starts of its A and B runs
            (`PageLayout.place`), then its pages.
        rank_rows: `[targets, capacity]` int32 codes, -1 where a block is not full.
        blocks: `[targets, 1 + capacity / BLOCK_ROWS]` int32; the number of blocks, then the first tile of each one's window.
        tile_adapter: `[tiles]` int32, the batch's index of each tile's adapter, -1 for the base model.
    """

    adapters: jax.Array | np.ndarray
    rank_rows: jax.Array | np.ndarray
    blocks: jax.Array | np.ndarray
    tile_adapter: jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraTargets:
    """A `LoraPlan` with addresses, resolved once a step and used by every layer.

    Attributes:
        addresses: `[targets, 2, capacity, 2]` int32: page and offset of the row of A and of B.
        row_adapter: `[targets, capacity]` int32, -2 where there is no row.
        num_blocks: `[targets]` int32.
        windows: `[targets, capacity / BLOCK_ROWS]` int32, the first token of each block's window.
        token_adapter: `[tokens]` int32.
        window_tokens: tokens of a window (static).
    """

    addresses: jax.Array
    row_adapter: jax.Array
    num_blocks: jax.Array
    windows: jax.Array
    token_adapter: jax.Array
    window_tokens: int = dataclasses.field(metadata={"static": True})


def window_tiles(tiles: int, tile_tokens: int) -> int:
    """Tiles of a window: 8 rows in decode (docs/experiments.md has what others cost on CPU), 128 tokens in prefill."""
    return min(tiles, 8 if tile_tokens == 1 else max(1, 128 // tile_tokens))


def plan_batch(
    tile_adapters: Sequence[PlacedAdapter | None], *, tiles: int, tile_tokens: int, max_rank: int, max_pages: int
) -> LoraPlan:
    """Lists the rank rows of a batch (host).

    Args:
        tile_adapters: the adapter of each tile; fewer than `tiles` leave padding at the end. Tiles of one adapter that stand
            side by side share reads.
        max_rank: capacity is for every tile to have another adapter of this rank.
        max_pages: pages of the largest adapter that is served.
    """
    # A tile needs a whole number of blocks of its own only if ranks are; rounding up keeps the worst case safe.
    capacity = tiles * -(-max_rank // BLOCK_ROWS) * BLOCK_ROWS
    adapters = np.zeros((tiles, 2 * len(TARGETS) + max_pages), np.int32)
    rank_rows = np.full((len(TARGETS), capacity), -1, np.int32)
    blocks = np.zeros((len(TARGETS), 1 + capacity // BLOCK_ROWS), np.int32)
    tile_adapter = np.full(tiles, -1, np.int32)

    index: dict[int, int] = {}
    distinct: list[PlacedAdapter] = []
    for tile, adapter in enumerate(tile_adapters):
        if adapter is None:
            continue
        if id(adapter) not in index:
            index[id(adapter)] = number = len(distinct)
            distinct.append(adapter)
            for t, target in enumerate(TARGETS):
                adapters[number, 2 * t : 2 * t + 2] = adapter.placement.starts.get(target, (0, 0))
            adapters[number, 2 * len(TARGETS) : 2 * len(TARGETS) + len(adapter.pages)] = adapter.pages
        tile_adapter[tile] = index[id(adapter)]

    step = window_tiles(tiles, tile_tokens)
    for first in range(0, tiles, step):
        present = [a for a in dict.fromkeys(tile_adapter[first : first + step].tolist()) if a >= 0]
        for t, target in enumerate(TARGETS):
            ranks = [(a, distinct[a].placement.ranks.get(target, 0)) for a in present]
            total = sum(rank for _, rank in ranks)
            if not total:
                continue
            done = int(blocks[t, 0])
            at = done * BLOCK_ROWS
            for a, rank in ranks:
                rank_rows[t, at : at + rank] = np.arange(a * MAX_RANK, a * MAX_RANK + rank)
                at += rank
            new = -(-total // BLOCK_ROWS)
            blocks[t, 1 + done : 1 + done + new] = first
            blocks[t, 0] = done + new
    return LoraPlan(adapters=adapters, rank_rows=rank_rows, blocks=blocks, tile_adapter=tile_adapter)


def resolve(plan: LoraPlan, layout: PageLayout, tile_tokens: int) -> LoraTargets:
    """Turns codes into addresses (device; the arithmetic of `PageLayout.row_address`)."""
    adapters, rank_rows, blocks = (jnp.asarray(a) for a in (plan.adapters, plan.rank_rows, plan.blocks))
    tiles = plan.tile_adapter.shape[0]
    page_table = adapters[:, 2 * len(TARGETS) :]
    valid = rank_rows >= 0
    owner = jnp.where(valid, rank_rows // MAX_RANK, 0)
    row = jnp.where(valid, rank_rows % MAX_RANK, 0)
    per_target = []
    for t, target in enumerate(TARGETS):
        sides = []
        for side, width in enumerate(layout.config.target_shape(target)):
            start = adapters[owner[t], 2 * t + side]
            page, offset = start // layout.page_elems, start % layout.page_elems
            first = (layout.page_elems - offset) // width
            per_page = layout.page_elems // width
            beyond = row[t] - first
            page = jnp.where(row[t] < first, page, page + 1 + beyond // per_page)
            offset = jnp.where(row[t] < first, offset + row[t] * width, beyond % per_page * width)
            page = jnp.where(valid[t], page_table[owner[t], page], TRASH_PAGE)
            sides.append(jnp.stack([page, jnp.where(valid[t], offset, 0)], -1))
        per_target.append(jnp.stack(sides))
    return LoraTargets(
        addresses=jnp.stack(per_target),
        row_adapter=jnp.where(valid, owner, -2),
        num_blocks=blocks[:, 0],
        windows=blocks[:, 1:] * tile_tokens,
        token_adapter=jnp.repeat(jnp.asarray(plan.tile_adapter), tile_tokens),
        window_tokens=window_tiles(tiles, tile_tokens) * tile_tokens,
    )


def gather_rows(pages: jax.Array, addresses: jax.Array, width: int) -> jax.Array:
    """`[rows, width]` elements at `addresses` `[rows, 2]` (page, offset); a row never straddles a page."""
    dimensions = jax.lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    return jax.lax.gather(pages, addresses, dimensions, (1, width), mode="promise_in_bounds")
