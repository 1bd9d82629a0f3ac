"""Device ops on this machine's CPU, beside their floors and the alternatives that lost.

Shapes are SmolLM2-135M's in float32. Every figure is the best of some runs of a program that does the op for several layers,
divided by the layers; each layer has weights or pages of its own, so that caches do not flatter it. The floor is the larger of
the bytes that must be read over the read bandwidth and the operations over the rate of a large matrix product, both measured
here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.machine import Out, describe, matmul_rate, publish, read_bandwidth, seconds_of
from chameleon_jax.models.config import PRESETS, TARGETS
from chameleon_jax.models.ops.batched_lora import blocked as lora_blocked
from chameleon_jax.models.ops.batched_lora import plan as lora_plan
from chameleon_jax.models.ops.linear import linear
from chameleon_jax.models.ops.paged_attention import blocked as attention
from chameleon_jax.models.ops.paged_attention import reference as attention_reference
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter

CONFIG = PRESETS["smollm2-135m"]
LAYOUT = PageLayout.for_model(CONFIG)
LAYERS = 8
RNG = np.random.default_rng(0)


def best_ms(run: Callable[..., Any], *arguments: Any, repeat: int = 9) -> float:
    """Time `run` compiled, the best of some calls, milliseconds a layer."""
    program = jax.jit(run)
    jax.block_until_ready(program(*arguments))
    return min(seconds_of(lambda: jax.block_until_ready(program(*arguments)), repeat)) / LAYERS * 1e3


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape).astype(np.float32))


def linears(rows: int) -> dict[str, float]:
    """Time the four matrix products of a layer."""
    d, f, q = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_heads * CONFIG.head_dim
    kv = CONFIG.num_kv_heads * CONFIG.head_dim
    layers = [[normal(q + 2 * kv, d), normal(d, q), normal(2 * f, d), normal(d, f)] for _ in range(LAYERS)]

    def run(multiply: Callable[..., jax.Array], x: jax.Array, layers: list[list[jax.Array]]) -> jax.Array:
        for qkv, o, gate_up, down in layers:
            h = multiply(x, qkv)
            x = x + multiply(h[:, :q] * h[:, 2 * kv :], o)
            h = multiply(x, gate_up)
            x = x + multiply(jax.nn.silu(h[:, :f]) * h[:, f:], down)
        return x

    forms = {"x W^T": lambda x, w: x @ w.T, "linear": linear}
    return {name: best_ms(functools.partial(run, form), normal(rows, d), layers) for name, form in forms.items()}


def attentions(rows: int, context: int) -> dict[str, float]:
    """Time attention of a decode step, every row at the same context."""
    width = LAYOUT.pages_for_tokens(context)
    pages = [normal(1 + rows * width, LAYOUT.page_elems) for _ in range(LAYERS)]
    tables = jnp.asarray(1 + np.arange(rows * width, dtype=np.int32).reshape(rows, width))
    firsts, starts, counts = jnp.arange(rows), jnp.full(rows, context - 1, jnp.int32), jnp.ones(rows, jnp.int32)
    sizes = {"tile_tokens": 1, "num_kv_heads": CONFIG.num_kv_heads}

    def run(attend: Callable[..., jax.Array], q: jax.Array, pages: list[jax.Array]) -> jax.Array:
        for layer in pages:
            q = q + attend(q, layer, tables, firsts, starts, counts, **sizes)
        return q

    q = normal(rows, CONFIG.num_heads, CONFIG.head_dim)
    result = {"one gather": best_ms(functools.partial(run, attention_reference.paged_attention), q, pages)}
    for group in (1, 8, 16):
        for block in (64, 128):
            with mock.patch.multiple(attention, GROUP_QUERIES=group, BLOCK_TOKENS=block):
                measured = best_ms(functools.partial(run, attention.paged_attention), q, pages)
            result[f"{group} rows x {block} tokens"] = measured
    return result


def loras(adapters: int, rank: int, rows: int = 32) -> dict[str, float]:
    """Time LoRA on all seven targets of a layer; names are rank rows of a block x rows of a window."""
    placement = LAYOUT.place({t: rank for t in TARGETS})
    n = placement.num_pages
    placed = [PlacedAdapter(placement, tuple(range(1 + i * n, 1 + i * n + n))) for i in range(adapters)]
    owner = sorted(i % adapters for i in range(rows))
    pages = [normal(1 + adapters * n, LAYOUT.page_elems) for _ in range(LAYERS)]
    inputs = {width: normal(rows, width) for t in TARGETS for width in CONFIG.target_shape(t)}

    def run(plan: Any, pages: list[jax.Array], inputs: dict[int, jax.Array]) -> jax.Array:
        targets = lora_plan.resolve(plan, LAYOUT, rows)
        total = jnp.float32(0)
        for layer in pages:
            for t in TARGETS:
                d_in, d_out = CONFIG.target_shape(t)
                y, x = inputs[d_out] + total * 0, inputs[d_in] + total * 1e-9
                total = total + lora_blocked.batched_lora(y, x, layer, targets, (t,)).sum()
        return total

    result = {}
    for block, window in ((16, 8), (32, 4), (32, 8), (32, 16), (64, 8), (128, 32)):
        with mock.patch.object(lora_plan, "BLOCK_ROWS", block):
            plan = lora_plan.plan_batch(
                [placed[o] for o in owner],
                tokens=rows,
                runs=rows,
                window_tokens=window,
                max_rank=max(rank, 128),
                max_pages=n,
            )
            result[f"{block} x {window}"] = best_ms(run, plan, pages, inputs)
    return result


def measure() -> dict[str, Any]:
    bandwidth, rate = read_bandwidth(), matmul_rate()
    per_layer = sum(i * o for i, o in map(CONFIG.target_shape, TARGETS))
    per_rank = sum(sum(CONFIG.target_shape(t)) for t in TARGETS)
    token = 2 * CONFIG.num_kv_heads * CONFIG.head_dim

    def floor(elements: float, flops: float) -> float:
        return max(4 * elements / bandwidth, flops / rate) * 1e3

    cases: list[tuple[str, Callable[[], dict[str, float]], float]] = []
    for rows in (1, 2, 8, 32, 128, 512):
        cases.append((f"matrices, {rows} rows", functools.partial(linears, rows), floor(per_layer, 2 * rows * per_layer)))
    for rows, context in ((8, 192), (32, 192), (32, 480)):
        flops = 4 * rows * context * CONFIG.num_heads * CONFIG.head_dim
        name = f"attention, {rows} rows, context {context}"
        cases.append((name, functools.partial(attentions, rows, context), floor(rows * context * token, flops)))
    for adapters, rank in ((16, 8), (32, 8), (16, 64)):
        name = f"LoRA, 32 rows, {adapters} adapters of rank {rank}"
        cases.append((name, functools.partial(loras, adapters, rank), floor(adapters * rank * per_rank, 64 * rank * per_rank)))
    table = [
        {"op, ms a layer": name, "floor": round(low, 3)} | {k: round(v, 3) for k, v in run().items()}
        for name, run, low in cases
    ]
    return {"read_gb_per_s": round(bandwidth / 1e9, 1), "matmul_gflop_per_s": round(rate / 1e9), "table": table}


def main(out: Out = None) -> None:
    """Measure device ops on this CPU beside their floors and their alternatives."""
    publish(describe() | measure(), out)
