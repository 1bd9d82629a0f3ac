"""Comparison of every backend with NumPy, over lengths, pages, group and head sizes; kernels run interpreted but on a GPU."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.kernels.cases import attention_rows, paged_kv
from chameleon_jax.models.ops.paged_attention import BACKENDS, paged_attention, triton, write_kv

HEAD_DIM, PAGE_TOKENS = 16, 8


@pytest.fixture(autouse=True)
def _interpret(monkeypatch):
    monkeypatch.setitem(BACKENDS, "triton", functools.partial(triton.paged_attention, interpret=jax.default_backend() != "gpu"))


@dataclasses.dataclass(frozen=True)
class Geometry:
    heads: int
    kv_heads: int
    head_dim: int = HEAD_DIM
    page_tokens: int = PAGE_TOKENS


def naive(q, k, v, start):
    """Attend from `q [tokens, heads, d]` at positions start, start + 1, ... to `k, v [context, kv, d]`."""
    group = q.shape[1] // k.shape[1]
    out = np.zeros(q.shape)
    for i, h in np.ndindex(q.shape[:2]):
        scores = k[: start + i + 1, h // group] @ q[i, h] / np.sqrt(q.shape[2])
        weights = np.exp(scores - scores.max())
        out[i, h] = weights @ v[: start + i + 1, h // group] / weights.sum()
    return out


def check(backend, geometry, tile_tokens, starts, counts, dtype=jnp.float32, tolerance=2e-5, before=3):
    """Attend in tiles of sequences on scattered pages. All other places hold NaN, as earlier owners may have left it.

    The tiles' tokens stand side by side, in another order than the tiles and `before` tokens behind the begin of the batch.
    """
    rng = np.random.default_rng(0)
    ends = np.where(counts, np.add(starts, counts), 0)
    width = -(-ends.max() // geometry.page_tokens) + 1
    pool, tables = paged_kv(rng, ends.tolist(), width, geometry.kv_heads, geometry.page_tokens, geometry.head_dim)
    pool = pool.astype(dtype)
    order = rng.permutation(len(counts))
    firsts = np.zeros(len(counts), np.int32)
    firsts[order] = before + np.cumsum(np.array(counts)[order]) - np.array(counts)[order]
    firsts[np.array(counts) == 0] = 0  # as the host leaves padding
    q = rng.standard_normal((before + sum(counts) + 2, geometry.heads, geometry.head_dim)).astype(dtype)
    if backend == "reference":
        pool = np.nan_to_num(pool)  # it reads scores of all positions; only values are guarded
    sizes = dict(tile_tokens=tile_tokens, num_kv_heads=geometry.kv_heads, backend=backend)
    places = [firsts, np.array(starts, np.int32), np.array(counts, np.int32)]
    out = jax.jit(functools.partial(paged_attention, **sizes))(q, pool.reshape(len(pool), -1), tables, *places)
    chex.assert_shape(out, q.shape)
    assert out.dtype == dtype
    attended = np.zeros(len(q), bool)
    for i, (first, start, count) in enumerate(zip(firsts, starts, counts)):
        mine = slice(first, first + count)
        k, v = pool[tables[i]].astype(np.float32).transpose(1, 0, 3, 2, 4).reshape(2, -1, geometry.kv_heads, geometry.head_dim)
        expected = naive(q[mine].astype(np.float32), k, v, start)
        np.testing.assert_allclose(np.array(out[mine], np.float32), expected, atol=tolerance, rtol=tolerance)
        attended[mine] = True
    assert attended.sum() == sum(counts)
    np.testing.assert_array_equal(np.array(out)[~attended], q[~attended])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "geometry", [Geometry(4, 4), Geometry(6, 2, page_tokens=24), Geometry(4, 1, head_dim=80), Geometry(4, 2, 64, 16)], ids=str
)
@pytest.mark.parametrize("tile_tokens,longest", [(1, 301), (8, 208), (32, 202)], ids=["decode", "short-tiles", "prefill"])
def test_every_backend_agrees_with_numpy(backend, geometry, tile_tokens, longest):
    check(backend, geometry, tile_tokens, *attention_rows(tile_tokens, longest, geometry.page_tokens))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "tile_tokens,starts,counts", [(1, [0, 150], [1, 1]), (32, [0, 70], [32, 30])], ids=["decode", "prefill"]
)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_every_backend_agrees_with_numpy_in_bfloat16(backend, tile_tokens, starts, counts, kv_heads):
    check(backend, Geometry(4, kv_heads, 64), tile_tokens, starts, counts, jnp.bfloat16, tolerance=1e-2)


@pytest.mark.parametrize("splits", [1, 3, 64])
@pytest.mark.parametrize("tile_tokens,starts,counts", [(1, [0, 400, 0, 63], [1, 1, 0, 1]), (16, [0, 240], [16, 3])])
def test_splits_do_not_matter(monkeypatch, splits, tile_tokens, starts, counts):
    geometry = Geometry(2, 1)
    monkeypatch.setattr(triton, "TOKENS_PER_ROW", 1)
    programs = len(starts)
    monkeypatch.setattr(triton, "DECODE_PROGRAMS", splits * programs)
    monkeypatch.setattr(triton, "PREFILL_PROGRAMS", splits * programs)
    check("triton", geometry, tile_tokens, starts, counts)


def test_write_kv_touches_its_own_places_only():
    pages = jnp.arange(4 * 2 * 2 * PAGE_TOKENS * HEAD_DIM, dtype=jnp.float32).reshape(4, -1)
    k, v = (jnp.full((1, 2, HEAD_DIM), value) for value in (-1.0, -2.0))
    after = np.array(write_kv(pages, k, v, jnp.array([2]), jnp.array([3]))).reshape(4, 2, 2, PAGE_TOKENS, HEAD_DIM)
    before = np.array(pages).reshape(after.shape)
    np.testing.assert_array_equal(after[2, 0, :, 3], -1)
    np.testing.assert_array_equal(after[2, 1, :, 3], -2)
    after[2, :, :, 3] = before[2, :, :, 3]
    np.testing.assert_array_equal(after, before)
