"""Plan of a batch's LoRA work: the rank rows that it needs, and where they lie in the pool.

The tokens of a batch are cut into windows. For each target the host lists, window after window, the rank rows of the
adapters that occur in the window: true ranks, no rows for an absent target, each list filled up to whole blocks of
BLOCK_ROWS. A device step walks the blocks. It gathers a block's rows of A and B from the pool, multiplies the window's
tokens by them, and keeps the products of a token with its own adapter's rows. Work grows with the ranks that are in the
batch, never with the largest rank or with the number of resident adapters.

A step that both decodes and has prompts has two plans over the same tokens: one with small windows for the rows that decode,
one with large windows for the prompts. Each counts the other's tokens as padding.
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
from chameleon_jax.models.page_layout import RUNS, PageLayout, PlacedAdapter

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Shaped

    from chameleon_jax.models.ops.shapes import Pool

BLOCK_ROWS = 32
"""Rank rows gathered and multiplied in one iteration (docs/experiments.md has the cost of other sizes)."""
DECODE_WINDOW = 8
"""Rows of a window in decode on a CPU, where products with other adapters' rows cost (docs/experiments.md)."""
PROMPT_WINDOW = 128
"""Tokens of a window in steps with prompts."""
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
        token_adapter: Number of each token's adapter in the batch; -1 for the base model, NO_TOKEN for tokens that are padding
            or another plan's. The batch may have more tokens, which count as such.
        window_tokens: Tokens of a window (static).
    """

    adapters: Int[Array | np.ndarray, "adapters starts_and_pages"]
    rank_rows: Int[Array | np.ndarray, "targets capacity"]
    first_blocks: Int[Array | np.ndarray, "targets windows+1"]
    token_adapter: Int[Array | np.ndarray, " planned_tokens"]
    window_tokens: int = dataclasses.field(metadata={"static": True})

    @property
    def num_targets(self) -> int:
        """Targets that the plan covers."""
        return self.rank_rows.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockList:
    """Blocks of all targets, one target's after the other's and without gaps, for a loop. All arrays are int32.

    A key is a number of an adapter and a window. A row of a block is a token's own where their keys are equal.

    Attributes:
        addresses: Page and offset of a block's rows of A and of B.
        row_keys: Key of each rank row; negative where there is no row, and no token's.
        begins: First token that a block is multiplied by. The last window slides back over tokens of the one before where the
            batch ends before the window.
        starts: Blocks before each target's; the last entry is the number of blocks.
        token_keys: Key of each token of the batch.
    """

    addresses: Int[Array, "all_blocks 2 block_rows 2"]
    row_keys: Int[Array, "all_blocks block_rows"]
    begins: Int[Array, " all_blocks"]
    starts: Int[Array, " targets+1"]
    token_keys: Int[Array, " tokens"]


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
        token_adapter: Adapter of each token, as in the plan, as many as the batch has and as a kernel reads.
        listed: The blocks in the order of a loop.
        window_tokens: Tokens of a window (static).
        d_out: Outputs of each target's matrix (static).
        row_unit: Number that divides every offset and every row's width (static).
    """

    addresses: Int[Array, "blocks targets 2 block_rows 2"]
    row_adapter: Int[Array, "blocks targets block_rows"]
    first_blocks: Int[Array, "windows+1 targets"]
    block_window: Int[Array, "blocks targets"]
    token_adapter: Int[Array, " tokens"]
    listed: BlockList
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


def plan_shapes(
    *, tokens: int, runs: int, window_tokens: int, max_rank: int, max_pages: int, num_targets: int = len(TARGETS)
) -> dict[str, tuple[int, ...]]:
    """Compute the shapes of a plan's arrays by name, in the order in which a step packs them.

    Args:
        tokens: Tokens that the plan covers.
        runs: Most runs of consecutive tokens of one sequence.
        window_tokens: Tokens of a window.
        max_rank: Rank for which there is room if every run has another adapter.
        max_pages: Pages of the largest adapter that is served.
        num_targets: Targets from the first of ALL_TARGETS on. No adapter of the batch has others.
    """
    windows = -(-tokens // window_tokens)
    entries = min(tokens, runs + windows - 1)  # a run that lies in several windows is listed in each
    # entries that fill whole blocks have no padding, and a window has less than a block of it
    blocks = min(entries * -(-max_rank // BLOCK_ROWS), (entries * max_rank + windows * (BLOCK_ROWS - 1)) // BLOCK_ROWS)
    return {
        "adapters": (runs, RUNS * len(ALL_TARGETS) + max_pages),
        "rank_rows": (num_targets, blocks * BLOCK_ROWS),
        "first_blocks": (num_targets, windows + 1),
        "token_adapter": (tokens,),
    }


def plan_batch(
    adapters: Sequence[PlacedAdapter | None],
    run_tokens: Sequence[int] | None = None,
    begin: int = 0,
    *,
    tokens: int,
    runs: int,
    window_tokens: int,
    max_rank: int,
    max_pages: int,
    num_targets: int = len(TARGETS),
) -> LoraPlan:
    """List the rank rows of a batch (host).

    Args:
        adapters: Adapter of each run of tokens. Runs of one adapter that stand side by side share reads.
        run_tokens: Tokens of each run; None: one each.
        begin: First token of the first run. The others follow without gaps.
        tokens: Tokens that the plan covers. This and all further arguments are as in `plan_shapes`.
        runs: As there.
        window_tokens: As there.
        max_rank: As there.
        max_pages: As there.
        num_targets: As there.
    """
    sizes = {"max_rank": max_rank, "max_pages": max_pages, "num_targets": num_targets}
    shapes = plan_shapes(tokens=tokens, runs=runs, window_tokens=window_tokens, **sizes)
    plan = LoraPlan(**{name: np.zeros(shape, np.int32) for name, shape in shapes.items()}, window_tokens=window_tokens)
    fill_plan(plan, adapters, [1] * len(adapters) if run_tokens is None else run_tokens, begin)
    return plan


def fill_plan(plan: LoraPlan, adapters: Sequence[PlacedAdapter | None], run_tokens: Sequence[int], begin: int = 0) -> None:
    """Write a batch into a plan whose arrays are zeros (host); arguments as in `plan_batch`."""
    table, rank_rows, first_blocks, token_adapter = map(
        np.asarray, (plan.adapters, plan.rank_rows, plan.first_blocks, plan.token_adapter)
    )
    rank_rows.fill(-1)
    token_adapter.fill(NO_TOKEN)
    numbers: dict[PlacedAdapter, int] = {}
    number = np.array([-1 if a is None else numbers.setdefault(a, len(numbers)) for a in adapters], np.int32)
    for adapter, n in numbers.items():
        table[n, : len(adapter.table_row)] = adapter.table_row
    counts = np.array(run_tokens, np.int32)
    ends = begin + np.cumsum(counts)
    token_adapter[begin : ends[-1] if len(ends) else begin] = np.repeat(number, counts)
    # entries: the (window, adapter) pairs that occur, window after window
    most, windows = len(table), first_blocks.shape[1] - 1
    adapted = number >= 0
    first_window, last_window = ((ends - counts)[adapted] // plan.window_tokens, (ends[adapted] - 1) // plan.window_tokens)
    spans = last_window - first_window + 1
    pairs = np.repeat(first_window - (np.cumsum(spans) - spans), spans) + np.arange(spans.sum())
    window, owner = np.divmod(np.unique(pairs * most + np.repeat(number[adapted], spans)), most)
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
        first = first_blocks[t, window] * BLOCK_ROWS + (ends - ranks[t]) - (np.cumsum(rows) - rows)[window]
        row = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - ranks[t], ranks[t])
        rank_rows[t, np.repeat(first, ranks[t]) + row] = np.repeat(owner * MAX_RANK, ranks[t]) + row


def resolve(plan: LoraPlan, layout: PageLayout, tokens: int) -> LoraTargets:
    """Turn codes into addresses (device).

    Args:
        plan: The plan.
        layout: Geometry of a page.
        tokens: Tokens of the batch, those behind the plan's included.
    """
    adapters, rank_rows, first_blocks = (jnp.asarray(a) for a in (plan.adapters, plan.rank_rows, plan.first_blocks))
    rank_rows, first_blocks = rank_rows.T, first_blocks.T
    valid = rank_rows >= 0
    owner, row = lax.div(rank_rows, MAX_RANK), lax.rem(rank_rows, MAX_RANK)
    owner, row = (jnp.where(valid, x, 0)[:, :, None] for x in (owner, row))  # [capacity, targets, 1]
    widths = np.array([layout.config.target_shape(t) for t in ALL_TARGETS[: plan.num_targets]], np.int32)
    runs = (RUNS * np.arange(plan.num_targets)[:, None] + np.arange(2)).astype(np.int32)
    start = adapters.at[owner, runs].get(**INSIDE)
    page, offset = locate_rows(adapters, owner, start, row, widths, layout)
    blocks = rank_rows.shape[0] // BLOCK_ROWS
    block = jnp.arange(blocks)[:, None, None]

    def by_blocks(rows: Shaped[Array, "capacity ..."]) -> Shaped[Array, "blocks ..."]:
        """Group the rows by blocks, `[blocks, ..., BLOCK_ROWS]`, the page and the offset of an address last."""
        last = min(3, rows.ndim)
        return jnp.moveaxis(rows.reshape(blocks, BLOCK_ROWS, *rows.shape[1:]), 1, last)

    addresses, row_adapter = by_blocks(jnp.stack([page, offset], -1)), by_blocks(jnp.where(valid, owner[:, :, 0], -2))
    # rows that fill a block up are read where its first row is: other pages may hold NaN, and 0 * NaN is NaN
    addresses = jnp.where((row_adapter >= 0)[:, :, None, :, None], addresses, addresses[:, :, :, :1])
    block_window = jnp.sum(first_blocks[1:] <= block, axis=1, dtype=jnp.int32)
    # a kernel reads a tile from where the last window begins
    tile = 1 << (max(TOKENS_ROUNDED_TO, plan.window_tokens) - 1).bit_length()
    padded = max(tokens, (first_blocks.shape[0] - 2) * plan.window_tokens + tile)
    token_adapter = jnp.asarray(plan.token_adapter)
    token_adapter = jnp.pad(token_adapter, (0, padded - len(token_adapter)), constant_values=NO_TOKEN)
    return LoraTargets(
        addresses=addresses,
        row_adapter=row_adapter,
        first_blocks=first_blocks,
        block_window=block_window,
        token_adapter=token_adapter,
        listed=_list_blocks(addresses, row_adapter, first_blocks[-1], block_window, token_adapter[:tokens], plan),
        window_tokens=plan.window_tokens,
        d_out=tuple(layout.config.target_shape(t)[1] for t in ALL_TARGETS),
        row_unit=layout.row_unit,
    )


def _list_blocks(
    addresses: Int[Array, "blocks targets 2 block_rows 2"],
    row_adapter: Int[Array, "blocks targets block_rows"],
    num_blocks: Int[Array, " targets"],
    block_window: Int[Array, "blocks targets"],
    token_adapter: Int[Array, " tokens"],
    plan: LoraPlan,
) -> BlockList:
    """List all targets' blocks without gaps (device); arguments as in `LoraTargets`, of a batch's own tokens."""
    (blocks, targets), tokens, most = block_window.shape, len(token_adapter), len(plan.adapters)
    starts = jnp.pad(jnp.cumsum(num_blocks), (1, 0))
    number = jnp.arange(blocks * targets)
    target = jnp.sum(number[:, None] >= starts[1:targets], axis=1, dtype=jnp.int32)
    block = jnp.minimum(number - starts.at[target].get(**INSIDE), blocks - 1)
    addresses, row_adapter, window = (x.at[block, target].get(**INSIDE) for x in (addresses, row_adapter, block_window))
    window_of_token = lax.div(jnp.arange(tokens), plan.window_tokens)
    return BlockList(
        addresses=addresses,
        row_keys=jnp.where(row_adapter < 0, row_adapter, window[:, None] * most + row_adapter),
        begins=jnp.minimum(window * plan.window_tokens, tokens - plan.window_tokens),
        starts=starts,
        token_keys=jnp.where(token_adapter < 0, NO_TOKEN, window_of_token * most + token_adapter),
    )


def locate_rows(
    adapters: Int[Array, "adapters starts_and_pages"],
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
