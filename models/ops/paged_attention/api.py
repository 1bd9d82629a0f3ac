"""Picks a backend. Every backend has the signature and the meaning of `paged_attention` below."""

from __future__ import annotations

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from chameleon_jax.models.ops.paged_attention import blocked, reference, triton

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.paged_attention,
    "blocked": blocked.paged_attention,
    "triton": triton.paged_attention,
}


def paged_attention(
    q: jax.Array,
    pages: jax.Array,
    block_tables: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    *,
    num_kv_heads: int,
    backend: str = "blocked",
) -> jax.Array:
    """Causal attention of tiles of new tokens over what their sequences have in the pool.

    A tile is a run of consecutive tokens of one sequence: one token in decode, up to `tile_tokens` in prefill. The tokens'
    own keys and values are in the pool already (`write_kv`), so a token at position p reads positions 0 to p.

    Args:
        q: `[tiles, tile_tokens, heads, head_dim]`.
        pages: one layer's pool, `[num_pages, page_elems]`; as KV a page is `[2, num_kv_heads, page_tokens, head_dim]`.
        block_tables: `[tiles, width]` int32, the pages of each tile's sequence in order.
        starts: `[tiles]` int32, the position of the tile's first token.
        counts: `[tiles]` int32, tokens in the tile; 0 marks padding.

    Returns:
        `[tiles, tile_tokens, heads, head_dim]`; rows past a tile's count are unspecified but finite.
    """
    chex.assert_rank([q, pages, block_tables, starts, counts], [4, 2, 2, 1, 1])
    chex.assert_equal_shape_prefix([q, block_tables, starts, counts], 1)
    return BACKENDS[backend](q, pages, block_tables, starts, counts, num_kv_heads=num_kv_heads)


def write_kv(pages: jax.Array, k: jax.Array, v: jax.Array, page_ids: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes new tokens' keys and values into their pages, in place where `pages` is donated.

    Args:
        pages: `[num_pages, page_elems]`.
        k, v: `[tokens, num_kv_heads, head_dim]`.
        page_ids, slots: `[tokens]` int32, the page and the place in it of each token, no two the same; what has a page past the
            pool's end (`num_pages`) is padding and is not written.
    """
    chex.assert_equal_shape([k, v])
    if k.shape[0] == 1:  # XLA would make one write a slice update, fuse that into each reader and copy the pool for each
        k, v, slots = (jnp.repeat(a, 2, axis=0) for a in (k, v, slots))
        page_ids = jnp.append(page_ids, pages.shape[0])
    _, kv_heads, head_dim = k.shape
    view = pages.reshape(pages.shape[0], 2, kv_heads, -1, head_dim)
    kv = jnp.stack([k, v], axis=1).astype(pages.dtype)
    # where indices may repeat, XLA writes two-byte elements on a GPU one by one, by compare and swap
    written = view.at[page_ids, :, :, slots, :].set(kv, mode="drop", unique_indices=True)
    return written.reshape(pages.shape)
