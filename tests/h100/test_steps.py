"""Programs of a 7B, compiled for an H100: nothing copies the pool, every kernel is there, nothing waits for the host."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.kernels.compile_h100 import (
    LAUNCHES,
    LAYER_BYTES,
    Model,
    compile_for_h100,
    kernels,
    operations,
    weight_reads,
)
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.models.config import TARGETS
from chameleon_jax.models.ops.batched_lora.plan import BLOCK_ROWS, plan_shapes
from chameleon_jax.models.ops.sampling import ADJUSTMENT_COLUMNS, SAMPLING_COLUMNS, SamplingMode, mask_words
from chameleon_jax.models.runtime import steps
from chameleon_jax.models.runtime.buckets import Program

MIB = 1 << 20
model = functools.cache(Model.of)


def scratch_bound(of: Model, program: Program) -> int:
    """Bound the bytes that a step needs besides weights and pool.

    They are a layer's activations, float32 where products are split over d_in (8 parts at most) or wait for an adapter's
    update. With adapters the partial products of the largest launch of each plan and every target's addresses are added.
    """
    config, tokens, heads = of.config, program.tokens, of.config.num_heads * of.config.head_dim
    widest = max(2 * config.intermediate_size, heads + 2 * config.num_kv_heads * config.head_dim)
    parts = 8 if tokens <= 128 else 1
    size = tokens * widest * (4 * parts + 2 * 4) + 4 * MIB
    for plan in of.buckets.lora_plans(program).values():
        shapes = plan_shapes(**plan, max_rank=of.buckets.max_rank, max_pages=of.buckets.max_adapter_pages)
        blocks = shapes["rank_rows"][1] // BLOCK_ROWS
        size += 4 * 3 * blocks * max(16, plan["window_tokens"]) * BLOCK_ROWS * 4
        size += 6 * len(TARGETS) * 2 * blocks * BLOCK_ROWS * 2 * 4
    return size


@pytest.mark.parametrize(
    "preset,num_layers,program",
    [
        # the largest steps with every layer; the others repeat a layer's code four times, which shows as much in half the time
        pytest.param("llama-7b", 4, Program(1, 1, 0, 7), id="7b-1-row"),
        pytest.param("llama-7b", 4, Program(32, 32, 0, 0), id="7b-32-rows-base"),
        pytest.param("llama-7b", 32, Program(128, 128, 0, 7), id="7b-128-rows"),
        pytest.param("llama-7b", 4, Program(32, 32, 0, 4), id="7b-32-rows-attention"),
        pytest.param("llama-7b", 4, Program(2048, 0, 64, 0), id="7b-prefill-base"),
        pytest.param("llama-7b", 32, Program(2048, 0, 64, 7), id="7b-prefill"),
        pytest.param("llama-7b", 4, Program(768, 128, 24, 7), id="7b-mixed"),
        pytest.param("llama-3-8b", 4, Program(32, 32, 0, 7), id="8b-32-rows"),
        pytest.param("llama-3-8b", 4, Program(2048, 0, 64, 7), id="8b-prefill"),
        pytest.param("llama-7b", 4, Program(32, 32, 0, 9), id="7b-32-rows-extras"),
        pytest.param("llama-7b", 4, Program(2048, 0, 64, 9), id="7b-prefill-extras"),
        pytest.param("llama-7b", 4, Program(768, 128, 24, 9), id="7b-mixed-extras"),
    ],
)
def test_a_step_fits_its_bound_and_launches_every_kernel(preset, num_layers, program):
    of = model(preset, num_layers)
    compiled = of.compile_step(program)
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == num_layers * LAYER_BYTES
    bound = scratch_bound(of, program)
    assert memory.temp_size_in_bytes <= bound
    assert program.tokens > 1024 or bound < LAYER_BYTES  # or the bound would not notice a copy

    launched = operations(compiled)
    assert not {"while", "conditional", "copy-start", "all-reduce"} & set(launched)
    assert launched["copy"] <= 2
    pool = f"[{of.pages[0].shape[0]},"
    assert not [line for line in compiled.as_text().splitlines() if " copy(" in line and pool in line]
    assert weight_reads(compiled) == [1] * 4 * num_layers
    found, kinds = kernels(compiled), {"decode": program.rows > 0, "prefill": program.tiles > 0}
    assert {kind: found[f"{kind}_attention"] for kind in kinds} == {kind: num_layers * there for kind, there in kinds.items()}
    # each kind has its own launches; with extras a part of the embedding too, and one of the head for both together
    a_kind = {0: 0, 4: 2, 7: 4, 9: 5}[program.adapted]
    a_layer = a_kind * sum(kinds.values()) + program.extras
    assert [found["lora_shrink"], found["lora_expand"]] == [a_layer * num_layers] * 2


@pytest.mark.parametrize(
    "program", [Program(4, 4, 0, 7), Program(256, 0, 8, 7), Program(128, 128, 0, 7), Program(256, 128, 8, 7)]
)
def test_the_largest_rank_fits_the_device(program):
    of = model("llama-7b", 1, max_rank=MAX_RANK)
    compiled = of.compile_step(program)
    assert compiled.memory_analysis().temp_size_in_bytes <= scratch_bound(of, program)
    kinds = (program.rows > 0) + (program.tiles > 0)
    found = kernels(compiled)
    assert [found["lora_shrink"], found["lora_expand"]] == [4 * kinds] * 2


def test_a_matrix_that_two_products_read_counts_twice():
    weights = {"layers": [{"weight": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)} for _ in range(2)]}
    x = jax.ShapeDtypeStruct((512, 4096), jnp.bfloat16)

    def fn(weights: Any, x: jax.Array) -> jax.Array:
        first, second = (layer["weight"] for layer in weights["layers"])
        return jnp.tanh(jnp.tanh(x @ first) @ first) @ second

    assert sorted(weight_reads(compile_for_h100(fn, weights, x))) == [1, 2]


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
        fn = functools.partial(steps.sample_step, rows=128, mode=mode, backend="triton")
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
@pytest.mark.parametrize("program", [Program(4, 4, 0, 7), Program(256, 0, 8, 7)])
def test_other_sizes_of_heads_fit_the_device(head_dim, program):
    compiled = model("llama-3-8b", 1, head_dim).compile_step(program)
    assert compiled.memory_analysis().alias_size_in_bytes > 0.99 * LAYER_BYTES
