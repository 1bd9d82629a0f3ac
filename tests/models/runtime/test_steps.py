"""Promise of the compiled programs: the pool is updated in place."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from chameleon_jax.models.config import PRESETS, TARGETS
from chameleon_jax.models.llama import abstract_model
from chameleon_jax.models.page_layout import PageLayout
from chameleon_jax.models.runtime import steps
from chameleon_jax.models.runtime.buckets import Program, StepBuckets

CONFIG = dataclasses.replace(PRESETS["smollm2-135m"], num_layers=3, vocab_size=1000)
LAYOUT = PageLayout.for_model(CONFIG)
BUCKETS = StepBuckets(
    max_num_seqs=6,
    max_prefill_tokens=96,
    table_width=16,
    max_rank=16,
    max_adapter_pages=LAYOUT.place({t: 16 for t in TARGETS}).num_pages,
    prefill_tile=32,
)
NUM_PAGES = 2000


@pytest.mark.parametrize("adapted", [0, 7])
@pytest.mark.parametrize("tokens,rows,tiles", [(1, 1, 0), (6, 6, 0), (32, 0, 2), (32, 6, 2), (64, 6, 4)])
def test_the_pool_is_updated_in_place(tokens, rows, tiles, adapted):
    graph, params = nnx.split(abstract_model(CONFIG, jnp.dtype("float32")))
    pages = [jax.ShapeDtypeStruct((NUM_PAGES, LAYOUT.page_elems), jnp.float32)] * CONFIG.num_layers
    slots = jax.ShapeDtypeStruct((7,), jnp.int32)
    program = Program(tokens, rows, tiles, adapted)
    options = {"program": program, "buckets": BUCKETS, "layout": LAYOUT, "backend": "blocked"}
    step = jax.jit(functools.partial(steps.forward, graph, **options), donate_argnums=1)
    packed = jax.ShapeDtypeStruct((BUCKETS.packed_size(program),), jnp.int32)
    memory = step.lower(params, pages, slots, packed).compile().memory_analysis()
    one_layer = NUM_PAGES * LAYOUT.page_elems * 4
    assert memory.alias_size_in_bytes == CONFIG.num_layers * one_layer
    assert memory.temp_size_in_bytes < one_layer // 8


def test_writing_an_adapter_is_in_place():
    pages = [jax.ShapeDtypeStruct((NUM_PAGES, LAYOUT.page_elems), jnp.float32)] * CONFIG.num_layers
    block = jax.ShapeDtypeStruct((CONFIG.num_layers, 4, LAYOUT.page_elems), jnp.float32)
    ids = jax.ShapeDtypeStruct((4,), jnp.int32)
    write = jax.jit(functools.partial(steps.write_adapter, backend="blocked"), donate_argnums=0)
    memory = write.lower(pages, block, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**20
