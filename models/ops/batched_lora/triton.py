"""Batched LoRA for NVIDIA GPUs, in Pallas Triton: two launches for all matrices that share an input.

`shrink` walks the plan's blocks of rank rows. A fixed number of programs takes turns, so that work follows the blocks there are
and not those there could be, and d_in is split so that a few blocks still fill the device. `expand` gives each program some
columns of one window's tokens and adds up the window's blocks: every element of y has one writer, so nothing is atomic and sums
do not depend on the rest of the batch. Both read rank rows in place, 16 bytes a load, through addresses that were resolved once
for all layers. Tokens of a window share the rows that are read.

Floor of a call: the bytes of the distinct adapters' true rank rows in each window at the memory bandwidth, and in prefill
y read and written once.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from chameleon_jax.models.ops import pallas_triton as pt
from chameleon_jax.models.ops.batched_lora.plan import BLOCK_ROWS, NO_TOKEN, TOKENS_ROUNDED_TO, LoraTargets

if TYPE_CHECKING:
    from jaxtyping import Array, Int

    from chameleon_jax.models.ops.shapes import Inputs, Outputs, Pool, Products

SHRINK_PROGRAMS = 132
"""Programs, for each part of d_in, that take turns at the blocks: one for each multiprocessor of an H100. Batches of
fewer blocks have as many, so that batches of all sizes share a kernel."""
SPLIT_ELEMS = 1024
"""Elements of a part of d_in, at least."""


class Division(NamedTuple):
    """Division of the work among programs, chosen by measurement on an H200 (docs/experiments.md).

    Attributes:
        splits: Parts of d_in at most; each costs `expand` a partial sum to read.
        rows: Rank rows that a program of `expand` multiplies at a time, whole blocks. It waits for their addresses first, so
            that many rows at a time wait less often.
        columns: Columns of y that it writes.
        num_warps: Its warps.
    """

    splits: int
    rows: int
    columns: int
    num_warps: int


DECODE = Division(splits=2, rows=64, columns=128, num_warps=2)
PROMPTS = Division(splits=4, rows=32, columns=256, num_warps=8)


def batched_lora(
    y: Outputs, x: Inputs, pages: Pool, targets: LoraTargets, names: tuple[str, ...], *, interpret: bool = False
) -> Outputs:
    """Add the adapters' updates as in `api.batched_lora`. `interpret` runs the kernels without a GPU."""
    columns = targets.columns(names)
    division = DECODE if _tile(targets.window_tokens) <= 32 else PROMPTS
    splits = max(1, min(division.splits, x.shape[1] // SPLIT_ELEMS))
    low = _shrink(x, pages, targets, [t for t, _, _ in columns], splits, interpret)
    return _expand(y, low, pages, targets, columns, division, interpret)


def _tile(window_tokens: int) -> int:
    """Round a window up to a tile, a power of two that a tensor core takes: as a rule 16 in decode, 128 in prefill.

    A prompt of fewer tokens fits a smaller tile. That would be another kernel to compile and save nothing, as rank rows are the
    division.
    """
    size = max(16, 1 << (window_tokens - 1).bit_length())
    return size if size <= 32 else max(TOKENS_ROUNDED_TO, size)


def _window_tokens(targets: LoraTargets) -> int:
    """Count the tokens from one window to the next: equal for all batches of a single window, so that they share a kernel."""
    single = targets.first_blocks.shape[0] == 2
    return _tile(targets.window_tokens) if single else targets.window_tokens


def _adapter_of(token_adapter: Any, token: Int[Array, " tile"], window_tokens: int) -> Int[Array, " tile"]:
    """Load the adapters of a window's tokens: NO_TOKEN where the tile exceeds the window, or the window the batch."""
    whole = token.shape[0] == window_tokens
    return pt.load(token_adapter, (token,), None if whole else jnp.arange(token.shape[0]) < window_tokens, NO_TOKEN)


def _shrink(x: Inputs, pages: Pool, targets: LoraTargets, numbers: list[int], splits: int, interpret: bool) -> Products:
    """Multiply windows' tokens by their own adapters' rows of A, in float32, to be summed over the splits.

    Products of blocks that are not there are left unwritten.
    """
    programs = SHRINK_PROGRAMS if not interpret else 4
    tile, window_tokens = _tile(targets.window_tokens), _window_tokens(targets)
    static = (("numbers", tuple(numbers)), ("programs", programs), ("window_tokens", window_tokens), ("unit", targets.row_unit))
    kernel = pt.Kernel(_shrink_kernel, static, num_warps=4, num_stages=4, name="lora_shrink")
    plan = (targets.addresses, targets.row_adapter, targets.num_blocks, targets.block_window, targets.token_adapter)
    shape = (targets.block_window.shape[0], splits, len(numbers), tile, BLOCK_ROWS)
    out_shape = jax.ShapeDtypeStruct(shape, jnp.float32)
    return kernel.call(x, pages, *plan, out_shape=out_shape, grid=(programs, splits), interpret=interpret)


def _shrink_kernel(
    x: Any,
    pages: Any,
    addresses: Any,
    row_adapter: Any,
    num_blocks: Any,
    block_window: Any,
    token_adapter: Any,
    low: Any,
    *,
    numbers: tuple[int, ...],
    programs: int,
    window_tokens: int,
    unit: int,
) -> None:
    d_in = x.shape[1]
    _, splits, _, tile, _ = low.shape
    block_k = 128 if tile <= 32 else 64
    program, split = pt.program_id(0), pt.program_id(1)
    steps = pt.ceil_div(d_in, splits * block_k)
    ends, total = [], jnp.int32(0)
    for t in numbers:
        total = total + pt.load(num_blocks, (t,))
        ends.append(total)

    def one_block(turn, nothing):
        number = program + turn * programs
        place = sum((number >= end).astype(jnp.int32) for end in ends[:-1]) + jnp.int32(0)
        t = pt.pick(numbers, place)
        block = number - pt.pick([0, *ends[:-1]], place)
        within = jnp.arange(BLOCK_ROWS)
        owner = pt.load(row_adapter, (block, t, within))
        page = pt.load(addresses, (block, t, 0, within, 0))
        offset = pt.multiple_of(pt.load(addresses, (block, t, 0, within, 1)), unit)
        token = pt.load(block_window, (block, t)) * window_tokens + jnp.arange(tile)
        adapter = _adapter_of(token_adapter, token, window_tokens)
        live = adapter != NO_TOKEN
        mine = adapter[:, None] == owner[None, :]

        def one_step(step, total):
            k = (split * steps + step) * block_k + jnp.arange(block_k)
            inside = True if d_in % (splits * block_k) == 0 else (k < d_in)[None, :]
            tokens = pt.load(x, (token[:, None], k[None, :]), live[:, None] & inside, 0.0)
            a = pt.load(pages, (page[:, None], offset[:, None] + k[None, :]), (owner >= 0)[:, None] & inside, 0.0)
            return total + pt.dot(tokens, a, transpose_b=True)

        product = lax.fori_loop(0, steps, one_step, jnp.zeros((tile, BLOCK_ROWS), jnp.float32))
        at = (block, split, place, jnp.arange(tile)[:, None], within[None, :])
        pt.store(low, at, jnp.where(mine, product, 0.0))
        return nothing

    turns = lax.div(jnp.maximum(total - program + programs - 1, 0), programs)
    lax.fori_loop(0, turns, one_block, jnp.int32(0))


def _expand(
    y: Outputs,
    low: Products,
    pages: Pool,
    targets: LoraTargets,
    columns: list[tuple[int, int, int]],
    division: Division,
    interpret: bool,
) -> Outputs:
    """Add `low @ B` to y, in place."""
    numbers = (("window_tokens", _window_tokens(targets)), ("unit", targets.row_unit))
    static = (("columns", tuple(columns)), ("division", division), *numbers)
    kernel = pt.Kernel(_expand_kernel, static, division.num_warps, num_stages=3, name="lora_expand", aliases=((0, 0),))
    plan = (targets.addresses, targets.row_adapter, targets.first_blocks, targets.token_adapter)
    windows = targets.first_blocks.shape[0] - 1
    grid = (sum(pt.ceil_div(width, division.columns) for _, _, width in columns), windows)
    out_shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return kernel.call(y, low, pages, *plan, out_shape=out_shape, grid=grid, interpret=interpret)


def _expand_kernel(
    _y: Any,
    low: Any,
    pages: Any,
    addresses: Any,
    row_adapter: Any,
    first_blocks: Any,
    token_adapter: Any,
    y: Any,
    *,
    columns: tuple[tuple[int, int, int], ...],
    window_tokens: int,
    unit: int,
    division: Division,
) -> None:
    _, splits, _, tile, _ = low.shape
    blocks = division.rows // BLOCK_ROWS
    number, window = pt.program_id(0), pt.program_id(1)
    ends, total = [], jnp.int32(0)
    for _, _, width in columns:
        total += pt.ceil_div(width, division.columns)
        ends.append(total)
    place = sum((number >= end).astype(jnp.int32) for end in ends[:-1]) + jnp.int32(0)
    t = pt.pick([t for t, _, _ in columns], place)
    column = (number - pt.pick([0, *ends[:-1]], place)) * division.columns + jnp.arange(division.columns)
    whole = all(width % division.columns == 0 for _, _, width in columns)
    inside = True if whole else (column < pt.pick([width for _, _, width in columns], place))[None, :]
    first, last = pt.load(first_blocks, (window, t)), pt.load(first_blocks, (window + 1, t))

    @pt.when(last > first)
    def add() -> None:
        def one_step(step, total):
            row = jnp.arange(division.rows)
            block, within = first + step * blocks + lax.div(row, BLOCK_ROWS), lax.rem(row, BLOCK_ROWS)
            there = None if blocks == 1 else block < last
            owner = pt.load(row_adapter, (block, t, within), there, -2)
            page = pt.load(addresses, (block, t, 1, within, 0), there, 0)
            offset = pt.multiple_of(pt.load(addresses, (block, t, 1, within, 1), there, 0), unit)
            # rows that pad a block lie on the trash page, which may hold NaN, and 0 * NaN is NaN
            b = pt.load(pages, (page[:, None], offset[:, None] + column[None, :]), (owner >= 0)[:, None] & inside, 0.0)
            at = (place, jnp.arange(tile)[:, None], within[None, :])
            across = None if there is None else there[None, :]
            parts = [pt.load(low, (block[None, :], split, *at), across, 0.0) for split in range(splits)]
            return total + pt.dot(functools.reduce(jnp.add, parts).astype(b.dtype), b)

        steps = lax.div(last - first + (blocks - 1), blocks)
        update = lax.fori_loop(0, steps, one_step, jnp.zeros((tile, division.columns), jnp.float32))
        token = window * window_tokens + jnp.arange(tile)
        live = (_adapter_of(token_adapter, token, window_tokens) != NO_TOKEN)[:, None] & inside
        at = (token[:, None], pt.pick([begin for _, begin, _ in columns], place) + column[None, :])
        pt.store(y, at, (pt.load(y, at, live, 0.0) + update).astype(y.dtype), live)
