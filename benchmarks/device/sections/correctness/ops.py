"""Each op against its reference on random data: mixed lengths and ranks, padding, NaN in all places that no op may read.

An error is the largest `||out - ref|| / ||ref||` of any token. References compute in float32, without tf32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.report import Case, Row
from benchmarks.device.scale import Scale, on_gpu
from benchmarks.kernels.cases import GROUPS, adapter_ranks, attention_rows, paged_kv
from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.ops.batched_lora import BACKENDS as LORA
from chameleon_jax.models.ops.batched_lora import triton as lora_triton
from chameleon_jax.models.ops.batched_lora.plan import PROMPT_WINDOW, plan_batch, resolve
from chameleon_jax.models.ops.linear import linear
from chameleon_jax.models.ops.paged_attention import BACKENDS as ATTENTION
from chameleon_jax.models.ops.paged_attention import triton as attention_triton
from chameleon_jax.models.ops.paged_attention import write_kv
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter
from chameleon_jax.models.runtime.buckets import shapes_for

LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}


def cases(scale: Scale, checks: Sequence[tuple[str, str]]) -> list[Case]:
    """Cases of some of the scale's checks."""
    configs = {"alike": scale.config, "grouped": scale.grouped}
    found = []
    for dtype, heads in checks:
        for tile_tokens in (1, scale.prefill_tile):
            kind = "decode" if tile_tokens == 1 else "prefill"
            for op, check in (("paged_attention", attention), ("batched_lora", lora)):
                name = f"{op}, {kind}, heads {heads}, {dtype}"
                found.append(Case(name, functools.partial(check, scale, configs[heads], tile_tokens, dtype, name)))
        if heads == next(heads for other, heads in scale.checks if other == dtype):  # once, as these have no heads
            found.append(Case(f"linear, {dtype}", functools.partial(products, scale, dtype)))
            found.append(Case(f"write_kv, {dtype}", functools.partial(writes, scale, dtype)))
    return found


def candidates(op: dict[str, Callable[..., Any]], kernel: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Forms of an op to compare with the reference; without a GPU the interpreted kernel and the CPU's backend."""
    if on_gpu():
        return {"triton": op["triton"]}
    return {"triton, interpreted": functools.partial(kernel, interpret=True), "blocked": op["blocked"]}


def worst(out: Any, reference: Any) -> float:
    """Largest error of a token, infinite for NaN; arrays are `[tokens, ...]`."""
    a, b = (np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in (out, reference))
    errors = np.linalg.norm(a - b, axis=1) / np.maximum(np.linalg.norm(b, axis=1), 1e-30)
    return float(np.nan_to_num(errors, nan=np.inf).max(initial=0.0))


def run_exactly(fn: Callable[..., Any], *arguments: Any) -> Any:
    """Run `fn` compiled, without rounding of float32 products to tf32."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(fn)(*arguments)


def run_as(dtype: str, fn: Callable[..., Any], *arguments: Any) -> Any:
    """Run `fn` as serving does, except that serving may round float32."""
    return run_exactly(fn, *arguments) if dtype == "float32" else jax.jit(fn)(*arguments)


def _row(name: str, error: float, dtype: str) -> Row:
    return {"check": name, "error": f"{error:.1e}", "limit": LIMITS[dtype], "ok": error < LIMITS[dtype]}


def attention(scale: Scale, config: LlamaConfig, tile_tokens: int, dtype: str, name: str) -> list[Row]:
    rng = np.random.default_rng(1)
    layout = PageLayout.for_model(config)
    starts, counts = map(np.array, attention_rows(tile_tokens, scale.max_tokens, layout.page_tokens))
    if tile_tokens == 1:
        starts = np.append(starts, rng.integers(1, scale.max_tokens, 6))
        counts = np.append(counts, np.ones(6, int))
    width = layout.pages_for_tokens(scale.max_tokens)
    lengths = np.where(counts, starts + counts, 0).tolist()
    pool, tables = paged_kv(rng, lengths, width, config.num_kv_heads, layout.page_tokens, config.head_dim)
    poisoned = pool.reshape(len(pool), layout.page_elems)
    q = _normal(rng, (counts.sum(), config.num_heads, config.head_dim))
    queries, clean, foul = (jnp.asarray(a, dtype) for a in (q, np.nan_to_num(poisoned), poisoned))
    rest = [jnp.asarray(a, jnp.int32) for a in (tables, np.cumsum(counts) - counts, starts, counts)]

    def attend(op: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(op, tile_tokens=tile_tokens, num_kv_heads=config.num_kv_heads)

    ops = candidates(ATTENTION, attention_triton.paged_attention)
    outs = {backend: run_as(dtype, attend(op), queries, foul, *rest) for backend, op in ops.items()}
    reference = run_exactly(attend(ATTENTION["reference"]), queries, clean, *rest)  # last: its memory is used again
    rows = []
    for backend, out in outs.items():
        error = worst(out, reference) if bool(jnp.isfinite(out).all()) else np.inf
        rows.append(_row(f"{name}, {backend}", error, dtype))
    return rows


def lora(scale: Scale, config: LlamaConfig, tile_tokens: int, dtype: str, name: str) -> list[Row]:
    rng = np.random.default_rng(2)
    layout = PageLayout.for_model(config)
    placements = [layout.place(ranks) for ranks in adapter_ranks(scale.ranks)]
    num_pages = 1 + sum(p.num_pages for p in placements) + 3
    deal = iter((1 + rng.permutation(num_pages - 1)).tolist())
    placed = [PlacedAdapter(p, tuple(next(deal) for _ in range(p.num_pages))) for p in placements]
    owners: list[PlacedAdapter | None] = [*placed, None]
    runs = 38 if tile_tokens == 1 else 11  # neither is a whole number of windows
    tokens = runs * tile_tokens
    batch = [owners[i] for i in rng.integers(0, len(owners), runs - 3)]
    batch[: len(owners)] = owners[: len(batch)]
    plan = plan_batch(
        batch,
        [tile_tokens] * len(batch),
        tokens=tokens,
        runs=runs,
        window_tokens=shapes_for("triton")["decode_window"] if tile_tokens == 1 else PROMPT_WINDOW,
        max_rank=scale.max_rank,
        max_pages=max(p.num_pages for p in placements),
    )
    pages = _normal(rng, (num_pages, layout.page_elems)) * 0.05
    mine = np.isin(np.arange(num_pages), [page for adapter in placed for page in adapter.pages])
    clean, poisoned = (jnp.asarray(np.where(mine[:, None], pages, fill), dtype) for fill in (0.0, np.nan))
    inputs = [config.target_shape(group[0])[0] for group in GROUPS]
    outputs = [sum(config.target_shape(t)[1] for t in group) for group in GROUPS]
    xs = [jnp.asarray(_normal(rng, (tokens, width)), dtype) for width in inputs]
    ys = [jnp.asarray(0.1 * _normal(rng, (tokens, width)), dtype) for width in outputs]

    def adapt(op: Callable[..., Any], plan: Any, pool: jax.Array, xs: list[jax.Array], ys: list[jax.Array]) -> list[jax.Array]:
        targets = resolve(plan, layout, tokens)
        return [op(y, x, pool, targets, group) for x, y, group in zip(xs, ys, GROUPS)]

    ops = candidates(LORA, lora_triton.batched_lora)
    outs = {backend: run_as(dtype, functools.partial(adapt, op), plan, poisoned, xs, ys) for backend, op in ops.items()}
    reference = run_exactly(functools.partial(adapt, LORA["reference"]), plan, clean, xs, ys)  # last: its memory is used again
    rows = []
    for backend, results in outs.items():
        for group, out, right in zip(GROUPS, results, reference):
            rows.append(_row(f"{name}, {' '.join(group)}, {backend}", worst(out, right), dtype))
    return rows


def products(scale: Scale, dtype: str) -> list[Row]:
    """Check the product of few rows and of many with a weight matrix."""
    d_in, d_out = scale.config.target_shape("down_proj")
    keys = jax.random.split(jax.random.key(0))
    weight = (jax.random.normal(keys[0], (d_out, d_in)) * d_in**-0.5).astype(dtype)
    rows = []
    for count in (1, 7, 32, 128, scale.prompt_tokens):
        x = jax.random.normal(keys[1], (count, d_in)).astype(dtype)
        out = run_as(dtype, linear, x, weight)
        right = run_exactly(lambda x, w: x.astype(jnp.float32) @ w.astype(jnp.float32).T, x, weight)
        rows.append(_row(f"linear, {count} rows, {dtype}", worst(out, right), dtype))
    return rows


def writes(scale: Scale, dtype: str) -> list[Row]:
    """Check that new tokens are in their places, to the bit, and nothing else has changed."""
    config, rng = scale.config, np.random.default_rng(3)
    layout = PageLayout.for_model(config)
    rows = []
    for count in (1, 9, 128):
        pages = jnp.asarray(_normal(rng, (40, layout.page_elems)), dtype)
        place = rng.permutation(np.arange(layout.page_tokens, 40 * layout.page_tokens))[:count].astype(np.int32)
        ids, slots = place // layout.page_tokens, place % layout.page_tokens
        k, v = (jnp.asarray(_normal(rng, (count, config.num_kv_heads, config.head_dim)), dtype) for _ in "kv")
        expected = np.array(pages).reshape(40, 2, config.num_kv_heads, layout.page_tokens, config.head_dim)
        expected[ids, 0, :, slots], expected[ids, 1, :, slots] = np.asarray(k), np.asarray(v)
        out = np.asarray(jax.jit(write_kv, donate_argnums=0)(pages, k, v, ids, slots))
        same = np.array_equal(out, expected.reshape(out.shape))
        rows.append({"check": f"write_kv, {count} tokens, {dtype}", "error": 0 if same else "wrong", "limit": 0, "ok": same})
    return rows


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)
