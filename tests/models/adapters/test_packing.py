from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from chameleon_jax.models.adapters import packing
from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.config import PRESETS
from chameleon_jax.models.page_layout import PageLayout

LAYOUT = PageLayout.for_model(PRESETS["tiny"])


def draw(*matrices: tuple[int, str, int], seed: int = 0) -> AdapterWeights:
    rng = np.random.default_rng(seed)

    def pair(target, rank):
        d_in, d_out = LAYOUT.config.target_shape(target)
        return rng.standard_normal((rank, d_in), np.float32), rng.standard_normal((d_out, rank), np.float32)

    return AdapterWeights({(layer, target): pair(target, rank) for layer, target, rank in matrices})


MIXED = draw((0, "q_proj", 3), (1, "q_proj", 2), (1, "down_proj", 40), (0, "v_proj", 1))


def on_device(weights: AdapterWeights) -> AdapterWeights:
    return AdapterWeights(jax.tree.map(jnp.asarray, weights.tensors))


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)])
def test_the_device_packs_the_block_of_the_host(dtype):
    weights = on_device(MIXED)
    assert weights.on_device and not MIXED.on_device
    block = packing.pack(weights, LAYOUT, dtype)
    expected = packing.pack_on_host(MIXED, LAYOUT, dtype)
    assert block.dtype == dtype and expected.any()
    np.testing.assert_array_equal(block.view(np.uint8), expected.view(np.uint8))
    placement = LAYOUT.place(MIXED.ranks)
    assert packing.content_hash(LAYOUT.place(weights.ranks), block) == packing.content_hash(placement, expected)


def test_another_step_of_a_trainer_compiles_nothing():
    program: Any = packing._pack_on_device
    targets = [(layer, target, 5) for layer in (0, 1) for target in ("q_proj", "up_proj")]
    packing.pack(on_device(draw(*targets)), LAYOUT, np.dtype(np.float32))
    before = program._cache_size()
    packing.pack(on_device(draw(*targets, seed=1)), LAYOUT, np.dtype(np.float32))
    assert program._cache_size() == before


def test_matrices_of_the_host_and_the_device_together_are_packed_on_the_host():
    tensors = MIXED.tensors | {(0, "q_proj"): tuple(jnp.asarray(m) for m in MIXED.tensors[0, "q_proj"])}
    block = packing.pack(AdapterWeights(tensors), LAYOUT, np.dtype(np.float32))
    np.testing.assert_array_equal(block, packing.pack_on_host(MIXED, LAYOUT, np.dtype(np.float32)))


def test_unpacked_matrices_are_those_that_were_packed():
    placement = LAYOUT.place(MIXED.ranks)
    found = packing.unpack(packing.pack_on_host(MIXED, LAYOUT, np.dtype(np.float32)), placement, LAYOUT)
    assert found.ranks == MIXED.ranks and len(found.tensors) == 6
    for (layer, target), (a, b) in found.tensors.items():
        rows_a, rows_b = MIXED.tensors.get((layer, target), (a[:0], b[:, :0]))
        rank = len(rows_a)
        np.testing.assert_array_equal(a[:rank], rows_a)
        np.testing.assert_array_equal(b[:, :rank], rows_b)
        assert not a[rank:].any() and not b[:, rank:].any()
