"""Programs of a 7B, compiled for an H100: nothing copies the pool, every kernel is there, nothing waits for the host."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.kernels.compile_h100 import LAUNCHES, LAYER_BYTES, Model, compile_for_h100, kernels, operations
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.ops.batched_lora.plan import BLOCK_ROWS
from chameleon_jax.models.ops.sampling import ADJUSTMENT_COLUMNS, SAMPLING_COLUMNS, SamplingMode, mask_words
from chameleon_jax.models.runtime import steps

MIB = 1 << 20
model = functools.cache(Model.of)


def scratch_bound(of: Model, tiles: int, tile_tokens: int, lora: bool) -> int:
    """Bound the bytes that a step needs besides weights and pool.

    They are a layer's activations, float32 where products are split over d_in (8 parts at most) or wait for an adapter's
    update. With adapters the partial products of the largest launch and every target's addresses are added.
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
    "preset,num_layers,tiles,tile_tokens,adapted",
    [
        # the largest steps with every layer; the others repeat a layer's code four times, which shows as much in half the time
        pytest.param("llama-7b", 4, 1, 1, 7, id="7b-1-row"),
        pytest.param("llama-7b", 4, 32, 1, 0, id="7b-32-rows-base"),
        pytest.param("llama-7b", 32, 128, 1, 7, id="7b-128-rows"),
        pytest.param("llama-7b", 4, 32, 1, 4, id="7b-32-rows-attention"),
        pytest.param("llama-7b", 4, 32, 64, 0, id="7b-prefill-base"),
        pytest.param("llama-7b", 32, 32, 64, 7, id="7b-prefill"),
        pytest.param("llama-3-8b", 4, 32, 1, 7, id="8b-32-rows"),
        pytest.param("llama-3-8b", 4, 32, 64, 7, id="8b-prefill"),
        pytest.param("llama-7b", 4, 32, 1, 9, id="7b-32-rows-extras"),
        pytest.param("llama-7b", 4, 32, 64, 9, id="7b-prefill-extras"),
    ],
)
def test_a_step_fits_its_bound_and_launches_every_kernel(preset, num_layers, tiles, tile_tokens, adapted):
    of = model(preset, num_layers)
    compiled = of.compile_step(tiles, tile_tokens, adapted)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == num_layers * LAYER_BYTES
    bound = scratch_bound(of, tiles, tile_tokens, adapted > 0)
    assert memory.temp_size_in_bytes <= bound
    assert tile_tokens > 1 or bound < LAYER_BYTES // 2  # or the bound would not notice a copy

    launched = operations(compiled)
    assert not {"while", "conditional", "copy-start", "all-reduce"} & set(launched)
    assert launched["copy"] <= 2
    pool = f"[{of.pages[0].shape[0]},"
    assert not [line for line in compiled.as_text().splitlines() if " copy(" in line and pool in line]
    found = kernels(compiled)
    assert sum(n for name, n in found.items() if "attention" in name) >= num_layers
    a_layer = {0: 0, 4: 2, 7: 4, 9: 4 + 2}[adapted]  # with extras, a part of the embedding and one of the head too
    assert [found["lora_shrink"], found["lora_expand"]] == [a_layer * num_layers] * 2


@pytest.mark.parametrize("tiles,tile_tokens", [(4, 1), (4, 64), (128, 1)])
def test_the_largest_rank_fits_the_device(tiles, tile_tokens):
    of = model("llama-7b", 1, max_rank=MAX_RANK)
    compiled = of.compile_step(tiles, tile_tokens, 7)
    assert compiled.memory_analysis().temp_size_in_bytes <= scratch_bound(of, tiles, tile_tokens, True)
    found = kernels(compiled)
    assert [found["lora_shrink"], found["lora_expand"]] == [4, 4]


@pytest.mark.parametrize("mode", list(SamplingMode))
@pytest.mark.parametrize("adjusted", [False, True])
def test_sampling_waits_for_nothing(mode, adjusted):
    sampling_rows = jax.ShapeDtypeStruct((128, SAMPLING_COLUMNS), jnp.int32)
    head, hidden = (jax.ShapeDtypeStruct((n, 4096), jnp.bfloat16) for n in (32_000, 128))
    slots = jax.ShapeDtypeStruct((129,), jnp.int32)
    state: tuple[Any, ...] = (head, hidden, slots)
    if adjusted:
        counts = jax.ShapeDtypeStruct((129, 32_000), jnp.uint16)
        adjustments = jax.ShapeDtypeStruct((128, ADJUSTMENT_COLUMNS + mask_words(32_000)), jnp.int32)
        fn = functools.partial(steps.sample_adjusted_step, mode=mode, backend="triton")
        compiled = compile_for_h100(fn, *state, counts, sampling_rows, adjustments, donate_argnums=(2, 3))
        assert compiled.memory_analysis().alias_size_in_bytes >= counts.size * 2  # the counts are not copied
    else:
        fn = functools.partial(steps.sample_step, mode=mode, backend="triton")
        compiled = compile_for_h100(fn, *state, sampling_rows, donate_argnums=2)
    launched = operations(compiled)
    assert not {"while", "conditional"} & set(launched)
    assert launched["fusion"] < 100


@pytest.mark.parametrize("num_pages", [1, 2])
def test_writing_an_adapter_is_in_place(num_pages):
    of = model("llama-7b", 32)
    piece = jax.ShapeDtypeStruct((32, num_pages, of.layout.page_elems), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((num_pages,), jnp.int32)
    write = functools.partial(steps.write_adapter, backend="triton")
    compiled = compile_for_h100(write, of.pages, piece, ids, donate_argnums=0)
    memory, launched = compiled.memory_analysis(), operations(compiled)
    assert memory.alias_size_in_bytes == 32 * LAYER_BYTES
    assert memory.temp_size_in_bytes < MIB
    assert kernels(compiled) == {"write_pages": 1}
    assert sum(launched[kind] for kind in LAUNCHES) <= 2  # the kernel, and the number that tells when it has run


@pytest.mark.parametrize("head_dim", [96, 256])
@pytest.mark.parametrize("tiles,tile_tokens", [(4, 1), (4, 64)])
def test_other_sizes_of_heads_fit_the_device(head_dim, tiles, tile_tokens):
    compiled = model("llama-3-8b", 1, head_dim).compile_step(tiles, tile_tokens, 7)
    assert compiled.memory_analysis().alias_size_in_bytes > 0.99 * LAYER_BYTES
