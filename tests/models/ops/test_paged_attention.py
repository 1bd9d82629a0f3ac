"""Every backend against plain NumPy, over random lengths, pages and group sizes."""

from __future__ import annotations

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.ops.paged_attention import BACKENDS, paged_attention, write_kv

HEAD_DIM, PAGE_TOKENS = 16, 8


def naive(q, k, v, start):
    """`q [tokens, heads, d]` at positions start, start + 1, ... over `k, v [context, kv, d]`."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape)
    for i, h in np.ndindex(q.shape[:2]):
        scores = k[: start + i + 1, h // group] @ q[i, h] / np.sqrt(q.shape[2])
        weights = np.exp(scores - scores.max())
        out[i, h] = weights @ v[: start + i + 1, h // group] / weights.sum()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads,kv_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("tile_tokens,starts,counts", [(1, [0, 300, 17, 0], [1, 1, 1, 0]), (8, [0, 8, 200, 0], [8, 5, 8, 0])])
def test_against_numpy(backend, heads, kv_heads, tile_tokens, starts, counts):
    rng = np.random.default_rng(0)
    width = 40
    tables = rng.permutation(np.arange(1, 1 + 4 * width)).reshape(4, width).astype(np.int32)
    # what earlier owners left behind must not matter
    pages = jnp.full((200, 2 * kv_heads * PAGE_TOKENS * HEAD_DIM), jnp.nan)
    q = rng.standard_normal((4, tile_tokens, heads, HEAD_DIM)).astype(np.float32)
    contexts = []
    for table, start, count in zip(tables, starts, counts):
        k, v = rng.standard_normal((2, start + count, kv_heads, HEAD_DIM)).astype(np.float32)
        position = np.arange(start + count)
        pages = write_kv(pages, jnp.array(k), jnp.array(v), table[position // PAGE_TOKENS], position % PAGE_TOKENS)
        contexts.append((k, v))
    if backend == "reference":
        pages = jnp.nan_to_num(pages)  # it reads scores of all positions; only values are guarded
    out = paged_attention(
        jnp.array(q), pages, tables, jnp.array(starts), jnp.array(counts), num_kv_heads=kv_heads, backend=backend
    )
    chex.assert_shape(out, q.shape)
    chex.assert_tree_all_finite(out)
    for i, (start, count) in enumerate(zip(starts, counts)):
        np.testing.assert_allclose(out[i, :count], naive(q[i, :count], *contexts[i], start), atol=2e-5)


def test_write_kv_touches_its_own_places_only():
    pages = jnp.arange(4 * 2 * 2 * PAGE_TOKENS * HEAD_DIM, dtype=jnp.float32).reshape(4, -1)
    k, v = (jnp.full((1, 2, HEAD_DIM), value) for value in (-1.0, -2.0))
    after = np.array(write_kv(pages, k, v, jnp.array([2]), jnp.array([3]))).reshape(4, 2, 2, PAGE_TOKENS, HEAD_DIM)
    before = np.array(pages).reshape(after.shape)
    np.testing.assert_array_equal(after[2, 0, :, 3], -1)
    np.testing.assert_array_equal(after[2, 1, :, 3], -2)
    after[2, :, :, 3] = before[2, :, :, 3]
    np.testing.assert_array_equal(after, before)
