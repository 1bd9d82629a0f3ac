"""Attention over the page pool for NVIDIA GPUs, in Pallas Triton: reads pages in place through the block table.

One kernel serves prefill and decode, over a grid of (groups of query heads, tiles, splits). A program takes a tile's tokens in
several query heads of one key head, as many as make a full tile: they are the rows of products on tensor cores. Keys and values
are fetched up to two blocks ahead into shared memory. Decode is the case of one token, its rows padded to 16. It does not wait
for the products. Multiplying single queries in registers took twice the instructions and left the compiler free to wait for
each load in turn.

A split takes an equal share of its tile's own sequence, in whole blocks, so that few sequences fill the device. A split
without a share returns at once and leaves its results unwritten; `_merge_kernel`, which joins the shares, does not read them.
Where one split is enough there is nothing to merge.

Floor of decode: `2 * head_dim * itemsize` bytes for each token of a sequence and key head, once, at the memory bandwidth.
Offsets into the pool have 64 bits where a layer's pool exceeds 2**32 bytes and 32 below (jax's lowering chooses by the size of
the array), and single indices are small: a layer may have 2**31 elements and more, of 2 or 4 bytes each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from chameleon_jax.models.ops import pallas_triton as pt

if TYPE_CHECKING:
    from jaxtyping import Array, Int

    from chameleon_jax.models.ops.shapes import Pool, Queries, Tables, Tiles

BLOCK_BYTES = 128
"""Bytes of one lane of a head in a block of keys: 64 keys of 2 bytes. Float32 is multiplied without tensor cores, and larger
tiles of it would not fit the registers."""
TILE_BYTES = 256
"""Bytes of one lane in the query vectors, tokens times heads, that one program takes at most."""
DECODE_PROGRAMS = 2 * 132
"""Programs that decode is split into where it has fewer: two for each multiprocessor of an H100 keep its memory busy."""
PREFILL_PROGRAMS = 132
"""Programs that prefill is split into: one for each multiprocessor, as its partial results cost more."""
SHARE_TOKENS = 2048
"""Tokens of a share in decode, however many programs there are. With larger shares the longest sequence would finish last."""
MOST_PROGRAMS = 8192
"""Programs that SHARE_TOKENS may lead to at most. Programs without a share cost time too."""
MAX_SPLITS = 64
TOKENS_PER_ROW = 4
"""Keys in a share, at least, for each query vector: a partial result costs as much traffic as 2 keys."""
NO_SCORE, NO_PEAK = -1e30, -1e20
"""Score of a masked key, and a bound below every peak. Weights are exp2(NO_SCORE - NO_PEAK) = 0 where no key is visible. Were
the two near each other, a fused multiply-add could round to exp2 of something large."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """Division of a sequence among programs.

    Attributes:
        splits: Programs.
        block_tokens: Keys handled in one iteration.
        least_blocks: Blocks that each program but the last takes at least.
    """

    splits: int
    block_tokens: int
    least_blocks: int

    @classmethod
    def of(cls, programs: int, rows: int, decode: bool, capacity: int, block_tokens: int) -> Shares:
        """Choose how many programs share a sequence.

        Args:
            programs: Programs that there are without splits.
            rows: Query vectors of a program.
            decode: Whether a tile is one token.
            capacity: Longest sequence, in tokens.
            block_tokens: Keys handled in one iteration.
        """
        least_blocks = pt.ceil_div(TOKENS_PER_ROW * rows, block_tokens)
        wanted = (DECODE_PROGRAMS if decode else PREFILL_PROGRAMS) // programs
        if decode:
            wanted = max(wanted, min(pt.ceil_div(capacity, SHARE_TOKENS), MOST_PROGRAMS // programs))
        most = pt.ceil_div(capacity, least_blocks * block_tokens)
        return cls(max(1, min(wanted, most, MAX_SPLITS)), block_tokens, least_blocks)

    def bounds(self, starts: Any, counts: Any, tile: Int[Array, ""], split: Int[Array, "..."]) -> tuple[Int[Array, "..."], ...]:
        """Find a tile's first position, its sequence's end, and the first and the last (excluded) block of a split's share."""
        start, count = pt.load(starts, (tile,)), pt.load(counts, (tile,))
        end = jnp.where(count > 0, start + count, 0)
        blocks = lax.div(end + (self.block_tokens - 1), self.block_tokens)
        share = jnp.maximum(lax.div(blocks + (self.splits - 1), self.splits), self.least_blocks)
        return start, end, split * share, jnp.minimum((split + 1) * share, blocks)


def paged_attention(
    q: Queries,
    pages: Pool,
    block_tables: Tables,
    firsts: Tiles,
    starts: Tiles,
    counts: Tiles,
    *,
    tile_tokens: int,
    num_kv_heads: int,
    interpret: bool = False,
) -> Queries:
    """Attend as in `api.paged_attention`, in place of q. `interpret` runs the kernels without a GPU."""
    (_, heads, head_dim), tiles = q.shape, len(counts)
    group, itemsize = heads // num_kv_heads, pages.dtype.itemsize
    # keys of head h are at h, its values at num_kv_heads + h
    kv = pages.reshape(pages.shape[0], 2 * num_kv_heads, -1, head_dim)
    fitting = [n for n in range(1, group + 1) if group % n == 0 and n * tile_tokens * itemsize <= TILE_BYTES]
    rows = max([1, *fitting]) * tile_tokens
    programs = heads * tile_tokens // rows
    capacity = block_tables.shape[1] * kv.shape[2]
    full = tiles if tile_tokens == 1 else pt.ceil_div(len(q), tile_tokens)  # of prompts' tiles half are empty, as a rule
    shares = Shares.of(programs * full, rows, tile_tokens == 1, capacity, max(16, BLOCK_BYTES // itemsize))
    num_warps = 4 if rows * itemsize <= 128 else 8
    partial = jax.ShapeDtypeStruct((tiles, shares.splits, tile_tokens, heads, head_dim), jnp.float32)
    statistic = jax.ShapeDtypeStruct(partial.shape[:-1], jnp.float32)
    result = jax.ShapeDtypeStruct(q.shape, q.dtype)
    # with 5 keys and values are fetched two blocks ahead, with 3 one; heads of more than 128 lanes leave no room for two
    num_stages = 5 if head_dim <= 128 else 3
    inputs = (q, kv, block_tables, firsts, starts, counts, jnp.arange(tiles)[::-1])
    whole = shares.splits == 1
    outputs = [result] if whole else [partial, statistic, statistic]
    name = "decode_attention" if tile_tokens == 1 else "prefill_attention"
    static = (("shares", shares), ("rows", rows), ("tile_tokens", tile_tokens))
    attend = pt.Kernel(_attention_kernel, static, num_warps, num_stages, name, aliases=((0, 0),) if whole else ())
    out = attend.call(*inputs, out_shape=outputs, grid=(programs, tiles, shares.splits), interpret=interpret)
    if whole:
        return out[0]
    merge = pt.Kernel(_merge_kernel, (("shares", shares),), num_warps, num_stages, "merge_attention", aliases=((0, 0),))
    inputs, grid = (q, *out, firsts, starts, counts), (heads, tile_tokens, tiles)
    return merge.call(*inputs, out_shape=result, grid=grid, interpret=interpret)


def _attention_kernel(
    q: Any,
    kv: Any,
    tables: Any,
    firsts: Any,
    starts: Any,
    counts: Any,
    order: Any,
    *outs: Any,
    shares: Shares,
    rows: int,
    tile_tokens: int,
) -> None:
    tile, split = pt.program_id(1), pt.program_id(2)
    if tile_tokens > 1:  # a prompt's later tiles see more keys: tiles that start last should end soon
        tile = pt.load(order, (tile,))
    (_, heads, head_dim), (_, kv_heads, page_tokens, _) = q.shape, kv.shape
    first_token = pt.load(firsts, (tile,))
    first_head = pt.program_id(0) * (rows // tile_tokens)
    kv_head = lax.div(first_head, heads // (kv_heads // 2))
    start, end, first, last = shares.bounds(starts, counts, tile, split)
    lanes, inside = _lanes(head_dim)
    across = None if inside is None else inside[None, :]
    row = jnp.arange(max(16, _power_of_two(rows)))
    token, head = lax.rem(row, tile_tokens), first_head + lax.div(row, tile_tokens)
    scale = head_dim**-0.5 * math.log2(math.e)  # of a product of query and key, before `exp2`

    def attend() -> None:
        live = (row < rows) & (token < end - start)
        query = pt.load(q, (first_token + token[:, None], head[:, None], lanes[None, :]), _both(live[:, None], across), 0)

        def one_block(block, carry, *, whole: bool):
            peak, total, acc = carry  # [rows], [rows], [rows, lanes]
            position = block * shares.block_tokens + jnp.arange(shares.block_tokens)
            written: Any = None if whole else position < end
            page = pt.load(tables, (tile, lax.div(position, page_tokens)), written, None if whole else 0)
            slot = lax.rem(position, page_tokens)[:, None]
            # values too: an earlier owner may have left anything in a page, even NaN, and 0 * NaN is NaN
            mask = _both(None if whole else written[:, None], across)
            at = [(page[:, None], part, slot, lanes[None, :]) for part in (kv_head, kv_heads // 2 + kv_head)]
            k, v = (pt.load(kv, index, mask, None if mask is None else 0).astype(query.dtype) for index in at)
            scores = pt.dot(query, k, transpose_b=True)
            if not whole:
                scores = jnp.where(position[None, :] <= (start + token)[:, None], scores, NO_SCORE)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=1) * scale)
            weights, decay = jnp.exp2(scores * scale - new_peak[:, None]), jnp.exp2(peak - new_peak)
            update = pt.dot(weights.astype(v.dtype), v)
            return new_peak, total * decay + jnp.sum(weights, axis=1), acc * decay[:, None] + update

        size = row.shape[0]
        carry = (jnp.full((size,), NO_PEAK), jnp.zeros((size,)), jnp.zeros((size, lanes.shape[0])))
        middle = first
        if tile_tokens > 1:  # most blocks of a tile are seen by each of its tokens in full
            middle = jnp.clip(lax.div(start + 1, shares.block_tokens), first, last)
            carry = lax.fori_loop(first, middle, functools.partial(one_block, whole=True), carry)
        peak, total, acc = lax.fori_loop(middle, last, functools.partial(one_block, whole=False), carry)
        at, exists = (tile, split, token, head), row < rows
        wide = (tile, split, token[:, None], head[:, None], lanes[None, :])
        if len(outs) == 1:
            place = (first_token + token[:, None], *wide[3:])
            pt.store(outs[0], place, _normalised(acc, total[:, None], outs[0]), _both(live[:, None], across))
        else:
            pt.store(outs[0], wide, acc, _both(exists[:, None], across))
            pt.store(outs[1], at, peak, exists)
            pt.store(outs[2], at, total, exists)

    attend() if len(outs) == 1 else pt.when(first < last)(attend)


def _merge_kernel(
    _q: Any, accs: Any, peaks: Any, totals: Any, firsts: Any, starts: Any, counts: Any, out: Any, *, shares: Shares
) -> None:
    head, token, tile = pt.program_id(0), pt.program_id(1), pt.program_id(2)
    split = jnp.arange(_power_of_two(shares.splits))
    _, _, first, last = shares.bounds(starts, counts, tile, split)
    live = first < last
    lanes, inside = _lanes(out.shape[2])
    peak = pt.load(peaks, (tile, split, token, head), live, NO_PEAK)
    weights = jnp.exp2(peak - jnp.max(peak))
    total = jnp.sum(weights * pt.load(totals, (tile, split, token, head), live, 0))
    mask = _both(live[:, None], None if inside is None else inside[None, :])
    acc = pt.load(accs, (tile, split[:, None], token, head, lanes[None, :]), mask, 0)
    place, exists = (pt.load(firsts, (tile,)) + token, head, lanes), token < pt.load(counts, (tile,))
    pt.store(out, place, _normalised(jnp.sum(acc * weights[:, None], axis=0), total, out), _both(exists, inside))


def _normalised(acc: jax.Array, total: jax.Array, out: Any) -> jax.Array:
    """Divide by the total weight, in the dtype of `out`. Zeros where there was no key."""
    return (acc / jnp.maximum(total, 1e-30)).astype(out.dtype)


def _lanes(head_dim: int) -> tuple[jax.Array, jax.Array | None]:
    """Count the elements of a head up to a power of two, and mask those that exist. None: all exist."""
    lanes = jnp.arange(_power_of_two(head_dim))
    return lanes, None if lanes.shape[0] == head_dim else lanes < head_dim


def _power_of_two(n: int) -> int:
    """Round up to a power of two."""
    return 1 << (n - 1).bit_length()


def _both(a: Any, b: Any) -> Any:
    """Combine two masks. None holds everywhere."""
    return b if a is None else a if b is None else a & b
