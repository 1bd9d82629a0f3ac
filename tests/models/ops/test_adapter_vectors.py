"""Scales and shifts of outputs against plain NumPy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks.kernels.cases import GROUPS
from chameleon_jax.models.adapters import packing
from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.config import ALL_TARGETS, PRESETS, TARGETS
from chameleon_jax.models.ops.adapter_vectors import resolve_vectors, scale_and_shift
from chameleon_jax.models.ops.batched_lora.plan import plan_batch
from chameleon_jax.models.page_layout import PageLayout, PlacedAdapter

CONFIG = dataclasses.replace(PRESETS["tiny"], num_layers=1)
LAYOUT = PageLayout.for_model(CONFIG)


def draw(rng: np.random.Generator, targets: tuple[str, ...], vectors: tuple[str, ...], rank: int) -> AdapterWeights:
    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    shapes = {t: CONFIG.target_shape(t) for t in targets}
    return AdapterWeights(
        {(0, t): (normal(rank, d_in), normal(d_out, rank)) for t, (d_in, d_out) in shapes.items()},
        scales={(0, t): normal(shapes[t][1]) for t in vectors[::2]},
        shifts={(0, t): normal(shapes[t][1]) for t in vectors[1:]},
    )


def test_scales_near_1_keep_their_digits_in_a_narrow_format():
    rng = np.random.default_rng(0)
    weights = draw(rng, ("o_proj",), (), 2)
    scale = 1 + 0.003 * rng.standard_normal(64).astype(np.float32)
    weights = dataclasses.replace(weights, scales={(0, "o_proj"): scale})
    placement = LAYOUT.place(weights.ranks, weights.vectors)
    block = packing.pack_on_host(weights, LAYOUT, np.dtype(ml_dtypes.bfloat16))[0]
    pool = np.concatenate([np.zeros((1, LAYOUT.page_elems), block.dtype), block])
    placed = PlacedAdapter(placement, range(1, len(pool)))
    sizes = dict(tokens=1, runs=1, window_tokens=1, max_rank=2, max_pages=placement.num_pages, num_targets=len(ALL_TARGETS))
    vectors = resolve_vectors(plan_batch([placed], **sizes), LAYOUT, 1)
    y = rng.standard_normal((1, 64)).astype(np.float32)
    found = scale_and_shift(jnp.array(y), jnp.array(pool), vectors, ("o_proj",))
    np.testing.assert_allclose(found, scale * y, atol=1e-4)  # a scale in bfloat16 would be off by up to 4e-3 of y


@pytest.mark.parametrize("run_tokens", [[1] * 6, [32] * 6, [3, 50, 1, 17, 2, 9]])
@pytest.mark.parametrize("begin", [0, 5])
def test_each_token_has_the_vectors_of_its_adapter(run_tokens, begin):
    rng = np.random.default_rng(0)
    adapters = [
        draw(rng, TARGETS, TARGETS, 3),
        draw(rng, ("k_proj", "down_proj"), (), 70),
        draw(rng, ("k_proj", "down_proj"), ("down_proj",), 40),
    ]
    placements = [LAYOUT.place(weights.ranks, weights.vectors) for weights in adapters]
    numbers = iter(1 + rng.permutation(sum(p.num_pages for p in placements)))
    pool = np.full((1 + sum(p.num_pages for p in placements), LAYOUT.page_elems), np.nan, np.float32)
    placed = []
    for weights, placement in zip(adapters, placements):
        pages = [int(next(numbers)) for _ in range(placement.num_pages)]
        pool[pages] = packing.pack_on_host(weights, LAYOUT, np.dtype(np.float32))[0]
        placed.append(PlacedAdapter(placement, pages))
    owners = [2, None, 0, 1, 0, 2]
    tokens = begin + sum(run_tokens) + 2
    plan = plan_batch(
        [None if i is None else placed[i] for i in owners],
        run_tokens,
        begin,
        tokens=tokens,
        runs=8,
        window_tokens=8,
        max_rank=70,
        max_pages=max(p.num_pages for p in placements),
        num_targets=len(ALL_TARGETS),
    )
    vectors = jax.jit(resolve_vectors, static_argnums=(1, 2))(plan, LAYOUT, tokens + 4)
    for names in GROUPS:
        y = rng.standard_normal((tokens + 4, sum(CONFIG.target_shape(t)[1] for t in names))).astype(np.float32)
        expected, first = y.copy(), begin
        for count, number in zip(run_tokens, owners):
            column = 0
            for t in names:
                here = slice(column, column + CONFIG.target_shape(t)[1])
                if number is not None:
                    expected[first : first + count, here] *= adapters[number].scales.get((0, t), 1)
                    expected[first : first + count, here] += adapters[number].shifts.get((0, t), 0)
                column = here.stop
            first += count
        found = scale_and_shift(jnp.array(y), jnp.array(pool), vectors, names)
        np.testing.assert_allclose(found, expected, atol=1e-6, err_msg=str(names))
