"""The 7B's programs as an H100 would run them: nothing copies the pool, every kernel is there, nothing waits for the host."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from chameleon_jax.models import steps
from chameleon_jax.models.config import PRESETS, TARGETS, LlamaConfig
from chameleon_jax.models.llama import Llama
from chameleon_jax.models.ops.batched_lora import BLOCK_ROWS
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.sampling import SamplingMode
from chameleon_jax.models.step_inputs import pack_draws
from tests.h100.compiler import compile_for_h100, kernels, operations

MIB = 1 << 20
LAYER_BYTES = 512 * MIB
"""Of the pool: 16 GiB over Llama-7B's layers."""


@dataclasses.dataclass(frozen=True)
class Model:
    config: LlamaConfig
    layout: PageLayout
    buckets: steps.StepBuckets
    graph: nnx.GraphDef
    params: nnx.State
    pages: list[jax.ShapeDtypeStruct]


@functools.cache
def model(preset: str, num_layers: int) -> Model:
    config = dataclasses.replace(PRESETS[preset], num_layers=num_layers)
    layout = PageLayout.for_model(config)
    buckets = steps.StepBuckets(
        max_num_seqs=128,
        max_prefill_tokens=2048,
        table_width=layout.pages_for_tokens(2048),
        max_rank=128,
        max_adapter_pages=layout.place({t: 128 for t in TARGETS}).num_pages,
        prefill_tile=64,
    )
    graph, params = nnx.split(nnx.eval_shape(lambda: Llama(config, jnp.dtype("bfloat16"), nnx.Rngs(0))))
    pages = [jax.ShapeDtypeStruct((LAYER_BYTES // 2 // layout.page_elems, layout.page_elems), jnp.bfloat16)] * num_layers
    return Model(config, layout, buckets, graph, params, pages)


def scratch_bound(of: Model, tiles: int, tile_tokens: int, lora: bool) -> int:
    """Bytes that a step may need besides weights and pool.

    A layer's activations, float32 where products are split over d_in (8 parts at most) or wait for an adapter's update; and
    with adapters the partial products of the largest launch and every target's addresses.
    """
    config, tokens = of.config, tiles * tile_tokens
    widest = max(2 * config.intermediate_size, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    parts = 8 if tokens <= 128 else 1
    size = tokens * widest * (4 * parts + 2 * 4) + 4 * MIB
    if lora:
        blocks = tiles * math.ceil(of.buckets.max_rank / BLOCK_ROWS)
        size += 4 * 3 * blocks * max(16, min(128, tokens)) * BLOCK_ROWS * 4
        size += 6 * len(TARGETS) * 2 * blocks * BLOCK_ROWS * 2 * 4
    return size


@pytest.mark.parametrize(
    "preset,num_layers,tiles,tile_tokens,lora",
    [
        pytest.param("llama-7b", 32, 1, 1, True, id="7b-1-row"),
        pytest.param("llama-7b", 32, 32, 1, False, id="7b-32-rows-base"),
        pytest.param("llama-7b", 32, 128, 1, True, id="7b-128-rows"),
        pytest.param("llama-7b", 32, 32, 64, False, id="7b-prefill-base"),
        pytest.param("llama-7b", 32, 32, 64, True, id="7b-prefill"),
        pytest.param("llama-3-8b", 4, 32, 1, True, id="8b-32-rows"),
        pytest.param("llama-3-8b", 4, 32, 64, True, id="8b-prefill"),
    ],
)
def test_a_step(preset, num_layers, tiles, tile_tokens, lora):
    of = model(preset, num_layers)
    forward = functools.partial(steps.forward, of.graph, layout=of.layout, backend="triton")
    slots = jax.ShapeDtypeStruct((of.buckets.max_num_seqs + 1,), jnp.int32)
    inputs = of.buckets.example(tiles, tile_tokens, lora)
    compiled = compile_for_h100(forward, of.params, of.pages, slots, inputs, donate_argnums=1)

    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == num_layers * LAYER_BYTES
    bound = scratch_bound(of, tiles, tile_tokens, lora)
    assert memory.temp_size_in_bytes <= bound
    assert tile_tokens > 1 or bound < LAYER_BYTES // 2  # or the bound would not notice a copy

    launched = operations(compiled)
    assert not {"while", "conditional", "copy-start", "all-reduce"} & set(launched)
    assert launched["copy"] <= 2
    pool = f"[{of.pages[0].shape[0]},"
    assert not [line for line in compiled.as_text().splitlines() if " copy(" in line and pool in line]
    found = kernels(compiled)
    assert sum(n for name, n in found.items() if "attention" in name) >= num_layers
    assert [found["lora_shrink"], found["lora_expand"]] == [4 * num_layers * lora] * 2


@pytest.mark.parametrize("mode", list(SamplingMode))
def test_sampling_waits_for_nothing(mode):
    rows, _ = pack_draws({}, 128, 128)
    head, hidden = (jax.ShapeDtypeStruct((n, 4096), jnp.bfloat16) for n in (32_000, 128))
    slots = jax.ShapeDtypeStruct((129,), jnp.int32)
    sample_step = functools.partial(steps.sample_step, mode=mode, backend="triton")
    launched = operations(compile_for_h100(sample_step, head, hidden, slots, rows, donate_argnums=2))
    assert not {"while", "conditional"} & set(launched)
    assert launched["fusion"] < 100
