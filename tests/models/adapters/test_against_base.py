"""Parts of adapters against the base model's weights: DoRA's scales, and rows in the place of the base's."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models import llama
from chameleon_jax.models.adapters.against_base import resolve_against
from chameleon_jax.models.adapters.weights import AdapterWeights, ReplacedRows
from chameleon_jax.models.config import PRESETS, TARGETS

CONFIG = PRESETS["tiny"]
MODEL = llama.random_model(CONFIG, jnp.dtype(jnp.float32))
HALF: Any = llama.random_model(CONFIG, jnp.dtype(jnp.bfloat16))


def dense(target: str) -> np.ndarray:
    return np.asarray(MODEL.embed[...] if target == "embed_tokens" else MODEL.output_matrix)


def whole(weights: AdapterWeights, target: str) -> np.ndarray:
    """Put the parts of a matrix's update together."""
    updates = [b @ a for a, b in (weights.tensors[layer, target] for layer in range(CONFIG.num_layers))]
    return np.concatenate(updates, axis=1).T if target == "embed_tokens" else np.concatenate(updates)


def base_matrix(target: str) -> np.ndarray:
    """Find a matrix of layer 1 among those that are stored side by side."""
    layer = MODEL.layers[1]
    places = {
        "q_proj": (layer.qkv, 0),
        "k_proj": (layer.qkv, 64),
        "v_proj": (layer.qkv, 96),
        "o_proj": (layer.o, 0),
        "gate_proj": (layer.gate_up, 0),
        "up_proj": (layer.gate_up, 128),
        "down_proj": (layer.down, 0),
    }
    module, begin = places[target]
    return np.asarray(module.weight[...][begin : begin + CONFIG.target_shape(target)[1]])


@pytest.mark.parametrize("target", TARGETS)
def test_scales_give_the_rows_their_magnitudes(target):
    rng = np.random.default_rng(0)
    d_in, d_out = CONFIG.target_shape(target)
    a, b = rng.standard_normal((5, d_in)).astype(np.float32), rng.standard_normal((d_out, 5)).astype(np.float32)
    magnitude = rng.uniform(0.1, 3, d_out).astype(np.float32)
    given = AdapterWeights({(1, target): (a, b)}, magnitudes={(1, target): magnitude})
    found = resolve_against(given, 512, MODEL)
    assert not found.magnitudes and given.magnitudes
    scale = found.scales[1, target]
    base = base_matrix(target)
    served = scale[:, None] * base + found.tensors[1, target][1] @ found.tensors[1, target][0]
    np.testing.assert_allclose(np.linalg.norm(served, axis=1), magnitude, rtol=1e-5)
    np.testing.assert_allclose(served, scale[:, None] * (base + b @ a), atol=1e-4)


def test_a_zero_row_has_no_scale():
    model = llama.random_model(CONFIG, jnp.dtype(jnp.float32))
    weight = model.layers[0].o.weight
    weight.set_value(weight[...].at[3].set(0))
    pair = np.zeros((1, 64), np.float32), np.zeros((64, 1), np.float32)
    weights = AdapterWeights({(0, "o_proj"): pair}, magnitudes={(0, "o_proj"): np.ones(64, np.float32)})
    with pytest.raises(ValueError, match=r"layers\.0\.o_proj: DoRA divides by the norm of a row that is zero"):
        resolve_against(weights, 512, model)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("tokens", [None, (7, 0, 511, 300)])
def test_replaced_rows_become_an_update_of_those_that_differ(target, tokens):
    rng = np.random.default_rng(0)
    base = dense(target)
    values = base.copy() if tokens is None else base[list(tokens)]
    changed = [0, 7, 300] if tokens is None else [1, 2]
    values[changed] = rng.standard_normal((len(changed), 64))
    found = resolve_against(AdapterWeights({}, replaced={target: ReplacedRows(tokens, values)}), 512, MODEL)
    assert found.ranks == {target: len(changed)} and not found.replaced
    expected = np.zeros_like(base)
    rows = changed if tokens is None else [tokens[i] for i in changed]
    expected[rows] = values[changed] - base[rows]
    np.testing.assert_allclose(whole(found, target), expected, atol=1e-6)


def test_rows_are_added_to_the_lora_of_their_matrix():
    rng = np.random.default_rng(0)
    values = dense("lm_head").copy()
    values[5] += 1
    low_rank = {(i, "lm_head"): (np.ones((2, 64)), rng.standard_normal((256, 2))) for i in range(2)}
    found = resolve_against(AdapterWeights(low_rank, replaced={"lm_head": ReplacedRows(None, values)}), 512, MODEL)
    assert found.ranks == {"lm_head": 3}
    expected = np.concatenate([b @ a for a, b in low_rank.values()])
    expected[5] += 1
    np.testing.assert_allclose(whole(found, "lm_head"), expected, atol=1e-5)


def test_rows_that_nobody_trained_are_equal_to_a_base_in_another_format():
    values = np.asarray(HALF.output_matrix.astype(jnp.float32))
    nudged = values * (1 + 1e-4)  # as the float32 file of a model that is served in bfloat16
    found = resolve_against(AdapterWeights({}, replaced={"lm_head": ReplacedRows(None, nudged)}), 512, HALF)
    assert not found.tensors


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_copy_in_a_coarser_format_is_equal_to_its_base(dtype):
    for model in (MODEL, HALF):
        weight = np.asarray(model.output_matrix) * np.asarray(
            1e-4, model.output_matrix.dtype
        )  # float16 loses bits of such values
        model = SimpleNamespace(output_matrix=jnp.asarray(weight), config=CONFIG)
        values = weight.astype(dtype)
        values[3] += np.asarray(0.5, dtype)
        found = resolve_against(AdapterWeights({}, replaced={"lm_head": ReplacedRows(None, values)}), 512, model)
        assert found.ranks == {"lm_head": 1}


def test_no_trained_tokens_change_nothing():
    rows = ReplacedRows((), np.zeros((0, 64), np.float32))
    assert not resolve_against(AdapterWeights({}, replaced={"lm_head": rows}), 512, MODEL).tensors


def test_rows_and_lora_share_the_largest_rank():
    rows = ReplacedRows(tuple(range(7)), np.ones((7, 64), np.float32))
    pair = np.ones((4, 64), np.float32), np.ones((256, 4), np.float32)
    weights = AdapterWeights({(layer, "lm_head"): pair for layer in range(2)}, replaced={"lm_head": rows})
    assert resolve_against(weights, 11, MODEL).ranks == {"lm_head": 11}
    with pytest.raises(ValueError, match="7 rows of lm_head differ from the base model's; allowed: 6"):
        resolve_against(weights, 10, MODEL)


def test_too_many_rows_are_refused():
    config = dataclasses.replace(CONFIG, vocab_size=600)
    model = llama.random_model(config, jnp.dtype(jnp.float32))
    rows = ReplacedRows(None, np.zeros((600, 64), np.float32))
    with pytest.raises(ValueError, match="600 rows of embed_tokens differ from the base model's; allowed: 512"):
        resolve_against(AdapterWeights({}, replaced={"embed_tokens": rows}), 512, model)
