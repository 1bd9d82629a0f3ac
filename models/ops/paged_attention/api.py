"""Choice of a backend. Every backend has the signature and the meaning of `paged_attention` below."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import chex
import jax
import jax.numpy as jnp

from chameleon_jax.models.ops.paged_attention import blocked, reference, triton

if TYPE_CHECKING:
    from chameleon_jax.models.ops.shapes import KeyValues, Pool, Queries, Tables, Tiles, Tokens

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.paged_attention,
    "blocked": blocked.paged_attention,
    "triton": triton.paged_attention,
}


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
    backend: str = "blocked",
) -> Queries:
    """Attend causally from tiles of new tokens to everything that their sequences have in the pool.

    A tile is a run of consecutive tokens of one sequence: one token in decode, up to `tile_tokens` in prefill. The tokens'
    own keys and values are in the pool already (`write_kv`), so a token at position p reads positions 0 to p.

    Args:
        q: Queries of a step's tokens.
        pages: Pool of one layer. A page with KV is `[2, num_kv_heads, page_tokens, head_dim]`.
        block_tables: Pages of each tile's sequence, in order; int32.
        firsts: Number of each tile's first token; int32. No two tiles share a token.
        starts: Position of that token; int32.
        counts: Tokens in each tile; int32. 0 marks padding.
        tile_tokens: Most tokens of a tile.
        num_kv_heads: Key and value heads.
        backend: One of BACKENDS.

    Returns:
        q with attended values in place of the tiles' tokens. Tokens of no tile keep their queries.
    """
    # kernels read by address, so a wrong shape must not reach them
    chex.assert_rank([q, pages, block_tables, firsts, starts, counts], [3, 2, 2, 1, 1, 1])
    chex.assert_equal_shape_prefix([block_tables, firsts, starts, counts], 1)
    sizes = {"tile_tokens": tile_tokens, "num_kv_heads": num_kv_heads}
    return BACKENDS[backend](q, pages, block_tables, firsts, starts, counts, **sizes)


def write_kv(pages: Pool, k: KeyValues, v: KeyValues, page_ids: Tokens, slots: Tokens) -> Pool:
    """Write new tokens' keys and values into their pages, in place where `pages` is donated.

    Args:
        pages: Pool of one layer.
        k: Keys.
        v: Values.
        page_ids: Page of each token; int32. A page past the pool's end (`num_pages`) marks padding, which is not written.
        slots: Place of each token in its page; int32. No two tokens share a page and a place.
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
