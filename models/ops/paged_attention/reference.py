"""Oracle for tests: gather every page of the table, then one dense softmax. Memory grows with the table's width."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from chameleon_jax.models.ops.shapes import Pool, Queries, Tables, Tiles


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
    within = jnp.arange(tile_tokens)
    token = jnp.where(within < counts[:, None], firsts[:, None] + within, tokens)  # [tiles, tile_tokens]
    kv = pages[block_tables].reshape(tiles, block_tables.shape[1], 2, num_kv_heads, -1, head_dim).astype(jnp.float32)
    k, v = (kv[:, :, i].transpose(0, 2, 1, 3, 4).reshape(tiles, num_kv_heads, -1, head_dim) for i in (0, 1))
    tiled = q.at[token].get(mode="fill", fill_value=0).astype(jnp.float32)
    grouped = tiled.reshape(tiles, tile_tokens, num_kv_heads, heads // num_kv_heads, head_dim)
    scores = jnp.einsum("tqkgd,tknd->tqkgn", grouped, k) * head_dim**-0.5
    visible = jnp.arange(k.shape[2]) <= (starts[:, None] + within)[..., None]
    written = jnp.arange(k.shape[2]) < (starts + counts)[:, None]
    scores = jnp.where(visible[:, :, None, None], scores, -1e30)
    out = jnp.einsum("tqkgn,tknd->tqkgd", jax.nn.softmax(scores, -1), jnp.where(written[:, None, :, None], v, 0.0))
    return q.at[token].set(out.reshape(tiled.shape).astype(q.dtype), mode="drop")
