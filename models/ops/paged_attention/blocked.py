"""Attention in plain XLA that reads only a sequence's own pages: a loop over groups of tiles, inside it over blocks of pages.

The loops' trip counts are data, so one program serves every length. Tiles of like length share a group, so that little is
padded to the longest one, and a group's block of keys and values stays in the core's cache between the two products. On
CPU this is 5 times as fast as one large gather for 32 rows, whose temporary is touched once and thrown away. Groups of
8 rows are 1.5 times as fast as row by row (docs/experiments.md). On a GPU such loops synchronise with the host: a kernel
belongs there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from chameleon_jax.models.ops import FORWARD, INSIDE

if TYPE_CHECKING:
    from chameleon_jax.models.ops.shapes import Pool, Queries, Tables, Tiles

BLOCK_TOKENS = 64
"""Tokens of a sequence handled in one iteration."""
GROUP_QUERIES = 8
"""Query tokens handled in one iteration: 8 decode rows, or one tile of a prompt."""


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
) -> Queries:
    """Attend as in `api.paged_attention`."""
    (tokens, heads, head_dim), tiles = q.shape, len(counts)
    page_tokens = pages.shape[1] // (2 * num_kv_heads * head_dim)
    block_pages = max(1, BLOCK_TOKENS // page_tokens)
    block_tokens = block_pages * page_tokens
    queries = heads // num_kv_heads * tile_tokens
    group = min(tiles, max(1, GROUP_QUERIES // tile_tokens))
    within = jnp.arange(tile_tokens)
    place = jnp.tile(within, heads // num_kv_heads)  # of each query of a key head in its tile
    # a page's keys of one head are one row of this view, its values the row num_kv_heads further
    heads_of_pages = pages.reshape(-1, page_tokens * head_dim)
    tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % block_pages)))
    key_rows = tables[:, None, :] * (2 * num_kv_heads) + jnp.arange(num_kv_heads)[:, None]  # [tiles, kv, width]
    ends = jnp.where(counts > 0, starts + counts, 0)
    by_length = jnp.argsort(ends, descending=True)  # padding tiles come last
    # all that needs no queries is computed here, which all layers share, and the loops have fewer operations
    whole_groups = ((0, -tiles % group),)
    start, end, first, key_rows = (
        jnp.pad(x.at[by_length].get(**INSIDE), whole_groups + ((0, 0),) * (x.ndim - 1))
        for x in (starts, ends, firsts, key_rows)
    )
    there = within < (end - start)[:, None]
    tokens_of = jnp.where(there, first[:, None] + within, tokens)  # [tiles, tile_tokens], out of bounds where there is none
    sees = start[:, None] + place  # [tiles, queries]: the last position that a query sees
    trips = lax.div(end[::group] + block_tokens - 1, block_tokens)

    def one_group(index, q):
        def mine(x, size=group):
            return lax.dynamic_slice_in_dim(x, index * size, size, **FORWARD)

        token, rows, last, length, trip = mine(tokens_of), mine(key_rows), mine(sees), mine(end), mine(trips, 1)[0]
        # [group, kv, queries, d]: the queries that share a key head are the rows of one product
        query = (
            q.at[token].get(mode="clip", wrap_negative_indices=False).reshape(group, tile_tokens, num_kv_heads, -1, head_dim)
        )
        query = query.transpose(0, 2, 3, 1, 4).reshape(group, num_kv_heads, queries, head_dim) * head_dim**-0.5

        def one_block(block, carry):
            peak, total, acc = carry
            keys = lax.dynamic_slice_in_dim(rows, block * block_pages, block_pages, axis=2, **FORWARD)
            k, v = (
                heads_of_pages.at[at].get(**INSIDE).reshape(group, num_kv_heads, block_tokens, head_dim)
                for at in (keys, keys + num_kv_heads)
            )
            position = block * block_tokens + jnp.arange(block_tokens)
            written = position < length[:, None]
            # an earlier owner may have left anything in a page, even NaN, and 0 * NaN is NaN
            v = jnp.where(written[:, None, :, None], v, 0)
            scores = jnp.einsum("gkqd,gknd->gkqn", query, k, preferred_element_type=jnp.float32)
            scores = jnp.where((position <= last[:, :, None])[:, None], scores, -1e30)
            new_peak = jnp.maximum(peak, scores.max(-1))
            weights = jnp.exp(scores - new_peak[..., None])
            decay = jnp.exp(peak - new_peak)
            update = jnp.einsum("gkqn,gknd->gkqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return new_peak, total * decay + weights.sum(-1), acc * decay[..., None] + update

        size = (group, num_kv_heads, queries)
        carry = (jnp.full(size, -1e30), jnp.zeros(size), jnp.zeros((*size, head_dim)))
        _, total, acc = lax.fori_loop(0, trip, one_block, carry)
        attended = (acc / jnp.maximum(total, 1e-30)[..., None]).astype(q.dtype)
        attended = attended.reshape(group, num_kv_heads, -1, tile_tokens, head_dim).transpose(0, 3, 1, 2, 4)
        attended = attended.reshape(group, tile_tokens, heads, head_dim)
        return q.at[token].set(attended, mode="drop", wrap_negative_indices=False)

    return lax.fori_loop(0, jnp.sum(trips > 0), one_group, q)
