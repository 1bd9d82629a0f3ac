"""Plan of a batch's LoRA work: the rank rows that it needs, and where they lie in the pool.

The tokens of a batch are cut into windows. For each target the host lists, window after window, the rank rows of the
adapters that occur in the window: true ranks, no rows for an absent target, each list filled up to whole blocks of
BLOCK_ROWS. A device step walks the blocks. It gathers a block's rows of A and B from the pool, multiplies the window's
tokens by them, and keeps the products of a token with its own adapter's rows. Work grows with the ranks that are in the
batch, never with the largest rank or with the number of resident adapters.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.models.config import ALL_TARGETS, TARGETS
from chameleon_jax.models.ops import INSIDE
from chameleon_jax.models.page_layout import RUNS, TRASH_PAGE, PageLayout, PlacedAdapter

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Shaped

    from chameleon_jax.models.ops.shapes import Pool

BLOCK_ROWS = 32
"""Rank rows gathered and multiplied in one iteration (docs/experiments.md has the cost of other sizes)."""
DECODE_WINDOW = 8
"""Rows of a window in decode on a CPU, where products with other adapters' rows cost (docs/experiments.md)."""
NO_TOKEN = -3
"""Adapter number of padding tokens."""
TOKENS_ROUNDED_TO = 128
"""Tokens that kernels see are a multiple of this."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraPlan:
    """Adapters of a batch, as the host packs them, for the first targets of ALL_TARGETS. All arrays are int32.

    The program that takes the plan adapts no other targets.

    Attributes:
        adapters: For each adapter of the batch the starts of its runs (`AdapterPlacement.start_of_runs`), then its pages.
        rank_rows: Codes, adapter * MAX_RANK + row; -1 where a block is not full.
        first_blocks: Blocks of all windows before each one; the last entry is the number of blocks.
        tile_adapter: Number of each tile's adapter in the batch; -1 for the base model.
        window_tiles: Tiles of a window (static).
    """

    adapters: Int[Array | np.ndarray, "tiles starts_and_pages"]
    rank_rows: Int[Array | np.ndarray, "targets capacity"]
    first_blocks: Int[Array | np.ndarray, "targets windows+1"]
    tile_adapter: Int[Array | np.ndarray, " tiles"]
    window_tiles: int = dataclasses.field(metadata={"static": True})

    @property
    def num_targets(self) -> int:
        """Targets that the plan covers."""
        return self.rank_rows.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraTargets:
    """A `LoraPlan` with addresses, resolved once a step and used by every layer. All arrays are int32.

    The first axis of each array grows with the batch, and the others do not: a kernel's code does not depend on the batch. A
    block's rows stand side by side.

    Attributes:
        addresses: Page and offset of the rows of A and of B.
        row_adapter: Adapter of each rank row; -2 where there is no row.
        first_blocks: Blocks before each window, as in the plan.
        block_window: Window of each block.
        token_adapter: Adapter of each token of all windows, rounded up; -1 for the base model, NO_TOKEN behind the last token.
        window_tokens: Tokens of a window (static).
        d_out: Outputs of each target's matrix (static).
        row_unit: Number that divides every offset and every row's width (static).
    """

    addresses: Int[Array, "blocks targets 2 block_rows 2"]
    row_adapter: Int[Array, "blocks targets block_rows"]
    first_blocks: Int[Array, "windows+1 targets"]
    block_window: Int[Array, "blocks targets"]
    token_adapter: Int[Array, " tokens"]
    window_tokens: int = dataclasses.field(metadata={"static": True})
    d_out: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    row_unit: int = dataclasses.field(metadata={"static": True})

    def columns(self, names: Sequence[str]) -> list[tuple[int, int, int]]:
        """Locate each matrix of `names` where their outputs stand side by side: `(target, first column, columns)`."""
        numbers = [ALL_TARGETS.index(name) for name in names]
        ends = itertools.accumulate(self.d_out[t] for t in numbers)
        return [(t, end - self.d_out[t], self.d_out[t]) for t, end in zip(numbers, ends)]

    @property
    def num_blocks(self) -> Int[Array, " targets"]:
        """Blocks of each target."""
        return self.first_blocks[-1]

    def adapts(self, names: Sequence[str]) -> bool:
        """Tell whether the program may find rows for any matrix of `names`."""
        return ALL_TARGETS.index(names[0]) < self.first_blocks.shape[1]


def window_tiles(tiles: int, tile_tokens: int, decode_window: int) -> int:
    """Count the tiles of a window: `decode_window` rows in decode, 128 tokens in prefill."""
    return min(tiles, decode_window if tile_tokens == 1 else max(1, 128 // tile_tokens))


def plan_shapes(
    *,
    tiles: int,
    tile_tokens: int,
    max_rank: int,
    max_pages: int,
    num_targets: int = len(TARGETS),
    decode_window: int = DECODE_WINDOW,
) -> dict[str, tuple[int, ...]]:
    """Compute the shapes of a plan's arrays by name, in the order in which a step packs them.

    Args:
        tiles: Tiles of the step.
        tile_tokens: Tokens of a tile.
        max_rank: Rank for which there is room if every tile has another adapter.
        max_pages: Pages of the largest adapter that is served.
        num_targets: Targets from the first of ALL_TARGETS on. No adapter of the batch has others.
        decode_window: Rows of a window in decode.
    """
    # only a tile whose rank is a whole number of blocks needs no padding; rounding up keeps the worst case safe
    capacity = tiles * -(-max_rank // BLOCK_ROWS) * BLOCK_ROWS
    windows = -(-tiles // window_tiles(tiles, tile_tokens, decode_window))
    return {
        "adapters": (tiles, RUNS * len(ALL_TARGETS) + max_pages),
        "rank_rows": (num_targets, capacity),
        "first_blocks": (num_targets, windows + 1),
        "tile_adapter": (tiles,),
    }


def plan_batch(
    tile_adapters: Sequence[PlacedAdapter | None],
    *,
    tiles: int,
    tile_tokens: int,
    max_rank: int,
    max_pages: int,
    num_targets: int = len(TARGETS),
    decode_window: int = DECODE_WINDOW,
) -> LoraPlan:
    """List the rank rows of a batch (host).

    Args:
        tile_adapters: Adapter of each tile. Fewer than `tiles` leave padding at the end. Tiles of one adapter that stand side
            by side share reads.
        tiles: Tiles of the step. This and all further arguments are as in `plan_shapes`.
        tile_tokens: As there.
        max_rank: As there.
        max_pages: As there.
        num_targets: As there.
        decode_window: As there.
    """
    sizes = {"max_rank": max_rank, "max_pages": max_pages, "num_targets": num_targets, "decode_window": decode_window}
    shapes = plan_shapes(tiles=tiles, tile_tokens=tile_tokens, **sizes)
    arrays = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
    plan = LoraPlan(**arrays, window_tiles=window_tiles(tiles, tile_tokens, decode_window))
    fill_plan(plan, tile_adapters)
    return plan


def fill_plan(plan: LoraPlan, tile_adapters: Sequence[PlacedAdapter | None]) -> None:
    """Write a batch into a plan whose arrays are zeros (host)."""
    adapters, rank_rows, first_blocks, tile_adapter = map(
        np.asarray, (plan.adapters, plan.rank_rows, plan.first_blocks, plan.tile_adapter)
    )
    rank_rows.fill(-1)
    tile_adapter.fill(-1)
    numbers: dict[PlacedAdapter, int] = {}
    tile_adapter[: len(tile_adapters)] = [-1 if a is None else numbers.setdefault(a, len(numbers)) for a in tile_adapters]
    for adapter, number in numbers.items():
        adapters[number, : len(adapter.table_row)] = adapter.table_row
    # entries: the (window, adapter) pairs that occur, window after window
    tiles, windows = len(tile_adapter), first_blocks.shape[1] - 1
    with_adapter = np.flatnonzero(tile_adapter >= 0)
    entries = np.unique(with_adapter // plan.window_tiles * tiles + tile_adapter[with_adapter])
    window, owner = np.divmod(entries, tiles)
    ranks_of = np.array([a.placement.rank_of_targets for a in numbers], np.int32).reshape(-1, len(ALL_TARGETS))
    ranks = ranks_of[owner].T
    for t in range(plan.num_targets):
        if t and (ranks[t] == ranks[t - 1]).all():  # most adapters have one rank, so that most targets are alike
            rank_rows[t], first_blocks[t] = rank_rows[t - 1], first_blocks[t - 1]
            continue
        rows = np.bincount(window, ranks[t], windows).astype(np.int32)
        np.cumsum(-(-rows // BLOCK_ROWS), out=first_blocks[t, 1:])
        # where an entry's rows begin: its window's first block, then the rows of the window's entries before it
        ends = np.cumsum(ranks[t])
        begin = first_blocks[t, window] * BLOCK_ROWS + (ends - ranks[t]) - (np.cumsum(rows) - rows)[window]
        row = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - ranks[t], ranks[t])
        rank_rows[t, np.repeat(begin, ranks[t]) + row] = np.repeat(owner * MAX_RANK, ranks[t]) + row


def resolve(plan: LoraPlan, layout: PageLayout, tile_tokens: int) -> LoraTargets:
    """Turn codes into addresses (device)."""
    adapters, rank_rows, first_blocks = (jnp.asarray(a) for a in (plan.adapters, plan.rank_rows, plan.first_blocks))
    rank_rows, first_blocks = rank_rows.T, first_blocks.T
    valid = rank_rows >= 0
    owner, row = lax.div(rank_rows, MAX_RANK), lax.rem(rank_rows, MAX_RANK)
    owner, row = (jnp.where(valid, x, 0)[:, :, None] for x in (owner, row))  # [capacity, targets, 1]
    widths = np.array([layout.config.target_shape(t) for t in ALL_TARGETS[: plan.num_targets]], np.int32)
    runs = (RUNS * np.arange(plan.num_targets)[:, None] + np.arange(2)).astype(np.int32)
    start = adapters.at[owner, runs].get(**INSIDE)
    page, offset = locate_rows(adapters, owner, start, row, widths, layout)
    page = jnp.where(valid[:, :, None], page, TRASH_PAGE)
    blocks = rank_rows.shape[0] // BLOCK_ROWS
    block = jnp.arange(blocks)[:, None, None]

    def by_blocks(rows: Shaped[Array, "capacity ..."]) -> Shaped[Array, "blocks ..."]:
        """Group the rows by blocks, `[blocks, ..., BLOCK_ROWS]`, the page and the offset of an address last."""
        last = min(3, rows.ndim)
        return jnp.moveaxis(rows.reshape(blocks, BLOCK_ROWS, *rows.shape[1:]), 1, last)

    tokens = plan.tile_adapter.shape[0] * tile_tokens
    window_tokens = plan.window_tiles * tile_tokens
    # a kernel reads a tile from where the last window begins
    tile = 1 << (max(TOKENS_ROUNDED_TO, window_tokens) - 1).bit_length()
    padding = (first_blocks.shape[0] - 2) * window_tokens + tile - tokens
    return LoraTargets(
        addresses=by_blocks(jnp.stack([page, jnp.where(valid[:, :, None], offset, 0)], -1)),
        row_adapter=by_blocks(jnp.where(valid, owner[:, :, 0], -2)),
        first_blocks=first_blocks,
        block_window=jnp.sum(first_blocks[1:] <= block, axis=1, dtype=jnp.int32),
        token_adapter=jnp.pad(jnp.repeat(plan.tile_adapter, tile_tokens), (0, padding), constant_values=NO_TOKEN),
        window_tokens=window_tokens,
        d_out=tuple(layout.config.target_shape(t)[1] for t in ALL_TARGETS),
        row_unit=layout.row_unit,
    )


def locate_rows(
    adapters: Int[Array, "tiles starts_and_pages"],
    owner: Int[Array, "*#rows"],
    start: Int[Array, "*rows"],
    row: Int[Array, "*#rows"],
    width: Int[np.ndarray, "*#rows"],
    layout: PageLayout,
) -> tuple[Int[Array, "*rows"], Int[Array, "*rows"]]:
    """Compute the pages and offsets of rows (device; the arithmetic of `PageLayout.row_address`).

    Args:
        adapters: Table of a plan.
        owner: Line of the row's adapter in it. This and all further arrays are broadcast to the shape of `start`.
        start: Start of the row's run.
        row: Number of the row in its run.
        width: Elements of a row.
        layout: Geometry of a page.
    """
    per_page = jnp.asarray(layout.page_elems // width)
    owner, row, widths, per_page = (jnp.broadcast_to(x, start.shape) for x in (owner, row, width, per_page))
    page, offset = lax.div(start, layout.page_elems), lax.rem(start, layout.page_elems)
    beyond = row - lax.div(layout.page_elems - offset, widths)
    page = jnp.where(beyond < 0, page, page + 1 + lax.div(beyond, per_page))
    offset = jnp.where(beyond < 0, offset + row * widths, lax.rem(beyond, per_page) * widths)
    return adapters.at[owner, RUNS * len(ALL_TARGETS) + page].get(**INSIDE), offset


def gather_rows(pages: Pool, addresses: Int[Array, "rank_rows 2"], width: int) -> Float[Array, "rank_rows _"]:
    """Gather rows of `width` elements at `(page, offset)` addresses. A row never straddles a page."""
    dimensions = lax.GatherDimensionNumbers(offset_dims=(1,), collapsed_slice_dims=(0,), start_index_map=(0, 1))
    return lax.gather(pages, addresses, dimensions, (1, width), mode="promise_in_bounds")
