"""Attention in plain XLA that reads each sequence's own pages only: a loop over tiles, within it over blocks of pages.

The loops' trip counts are data, so one program serves every length and nothing is padded to the longest sequence; a block's
keys and values stay in the core's cache between the two products. On CPU this is 3-4x faster than one large gather, whose
temporary is touched once and thrown away (docs/experiments.md). On a GPU such loops synchronise with the host: a kernel
belongs there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

BLOCK_TOKENS = 128
"""Tokens of a sequence handled in one iteration."""


def paged_attention(q, pages, block_tables, starts, counts, *, num_kv_heads: int) -> jax.Array:
    """See `api.paged_attention`."""
    tiles, tile_tokens, heads, head_dim = q.shape
    page_tokens = pages.shape[1] // (2 * num_kv_heads * head_dim)
    block_pages = max(1, BLOCK_TOKENS // page_tokens)
    block_tokens = block_pages * page_tokens
    block_tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % block_pages)))
    group = heads // num_kv_heads
    # [tiles, kv, group * tile_tokens, d]: the queries that share a key head are the rows of one product
    grouped = q.reshape(tiles, tile_tokens, num_kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    grouped = grouped.reshape(tiles, num_kv_heads, group * tile_tokens, head_dim) * head_dim**-0.5
    query = jnp.tile(jnp.arange(tile_tokens), group)

    def one_tile(tile, out):
        start, end = starts[tile], starts[tile] + counts[tile]

        def one_block(block, carry):
            peak, total, acc = carry
            table = lax.dynamic_slice(block_tables, (tile, block * block_pages), (1, block_pages))[0]
            kv = pages.at[table].get(mode="promise_in_bounds")
            kv = kv.reshape(block_pages, 2, num_kv_heads, page_tokens, head_dim)
            k, v = (kv[:, i].transpose(1, 0, 2, 3).reshape(num_kv_heads, block_tokens, head_dim) for i in (0, 1))
            position = block * block_tokens + jnp.arange(block_tokens)
            written = position < end
            # what an earlier owner left in a page may be anything, even NaN, and 0 * NaN is NaN
            v = jnp.where(written[:, None], v, 0)
            scores = jnp.einsum("kqd,knd->kqn", grouped[tile], k, preferred_element_type=jnp.float32)
            scores = jnp.where(written & (position <= start + query[:, None]), scores, -1e30)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - new_peak[..., None])
            decay = jnp.exp(peak - new_peak)
            update = jnp.einsum("kqn,knd->kqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new_peak, total * decay + weights.sum(-1), acc * decay[..., None] + update

        rows = (num_kv_heads, group * tile_tokens)
        carry = (jnp.full(rows, -1e30), jnp.zeros(rows), jnp.zeros((*rows, head_dim)))
        _, total, acc = lax.fori_loop(0, (end + block_tokens - 1) // block_tokens, one_block, carry)
        attended = acc / jnp.maximum(total, 1e-30)[..., None]
        return lax.dynamic_update_index_in_dim(out, attended.astype(q.dtype), tile, 0)

    live = jnp.sum(counts > 0)  # padding tiles come last
    out = lax.fori_loop(0, live, one_tile, jnp.zeros(grouped.shape, q.dtype))
    out = out.reshape(tiles, num_kv_heads, group, tile_tokens, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(q.shape)
