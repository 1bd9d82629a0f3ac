"""Parts of adapters that mean something beside the base model's weights alone: magnitudes of DoRA, and rows of embeddings."""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from chameleon_jax.models.adapters.weights import AdapterWeights, ReplacedRows, cut_vocabulary, mix
from chameleon_jax.models.config import TARGETS, LlamaConfig
from chameleon_jax.models.llama import STORED_TOGETHER, Llama

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_one_at_a_time = threading.Lock()
"""Held while the device computes norms, so that `norm_bytes` is enough however many threads read adapters."""


def resolve_against(weights: AdapterWeights, max_rank: int, model: Llama) -> AdapterWeights:
    """Turn magnitudes into scales, and replaced rows into low-rank updates. The result is on the host where it has any.

    Args:
        weights: The adapter.
        max_rank: Largest rank that is served.
        model: The base model.

    Raises:
        ValueError: Too many rows differ from the base model's, or DoRA cannot divide by a row's norm. The message names them.
    """
    if weights.replaced:
        weights = _add_rows(weights.to_host(), max_rank, model)
    return _apply_magnitudes(weights.to_host(), model) if weights.magnitudes else weights


def norm_bytes(config: LlamaConfig, max_rank: int) -> int:
    """Bound the device memory that the norms of DoRA take beside the weights: one matrix in float32, and its A and B twice."""
    shapes = map(config.target_shape, TARGETS)
    return 4 * max(d_in * d_out + 2 * 2 * max_rank * (d_in + d_out) for d_in, d_out in shapes)


def _add_rows(weights: AdapterWeights, max_rank: int, model: Llama) -> AdapterWeights:
    added = {}
    for target, rows in weights.replaced.items():
        room = max_rank - weights.ranks.get(target, 0)
        added.update(_rows_as_lora(target, rows, room, model))
    tensors = mix([(weights, 1.0), (AdapterWeights(added), 1.0)]).tensors
    return dataclasses.replace(weights, tensors=tensors, replaced={})


def _rows_as_lora(
    target: str, rows: ReplacedRows, room: int, model: Llama
) -> dict[tuple[int, str], tuple[np.ndarray, np.ndarray]]:
    """Make an update of the rows that differ from the base model's, of as much rank as there are."""
    matrix = model.embed[...] if target == "embed_tokens" else model.output_matrix
    tokens = np.arange(len(rows.values)) if rows.tokens is None else np.array(rows.tokens, np.int64)
    base, values = np.asarray(matrix if rows.tokens is None else matrix[tokens]), rows.values
    # compared in both number formats: a copy of the base is equal to it in the coarser one
    with np.errstate(over="ignore"):
        differ = (values.astype(base.dtype) != base) & (base.astype(values.dtype) != values)
    [numbers] = np.nonzero(differ.any(axis=1))
    if len(numbers) > room:
        allowed = f"{room}, as each takes the memory of a rank (max_lora_rank); or the adapter merged into its base model"
        raise ValueError(f"{len(numbers)} rows of {target} differ from the base model's; allowed: {allowed}")
    if not len(numbers):
        return {}
    change = values[numbers].astype(np.float32) - base[numbers].astype(np.float32)
    one_hot = np.zeros((len(numbers), model.config.vocab_size), np.float32)
    one_hot[np.arange(len(numbers)), tokens[numbers]] = 1
    a, b = (one_hot, change.T) if target == "embed_tokens" else (change, one_hot.T)
    return cut_vocabulary(target, a, b, model.config)


def _apply_magnitudes(weights: AdapterWeights, model: Llama) -> AdapterWeights:
    """Divide DoRA's norms of the rows of `W + B @ A` by the norms that these have (arXiv 2402.09353).

    The device computes them, by one program for each shape of a matrix and power of two of ranks. The scale is folded into B,
    so that in a step only the base's outputs are scaled.
    """
    tensors, scales = dict(weights.tensors), dict(weights.scales)
    for where, magnitude in weights.magnitudes.items():
        a, b = tensors[where]
        norms = _norms(model, where, a, b)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scale = magnitude / norms
            tensors[where] = a, b * scale[:, None]
        if not (np.isfinite(norms).all() and np.isfinite(scale).all()):
            raise ValueError("layers.{}.{}: DoRA divides by the norm of a row that is zero or too large".format(*where))
        scales[where] = scale
    return dataclasses.replace(weights, tensors=tensors, magnitudes={}, scales=scales)


def _norms(model: Llama, where: tuple[int, str], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the norms of the rows of an adapted matrix, on the device."""
    layer, target = where
    module, names = next((module, names) for module, names in STORED_TOGETHER.items() if target in names)
    begin = sum(model.config.target_shape(name)[1] for name in names[: names.index(target)])
    more = (1 << (len(a) - 1).bit_length()) - len(a)
    with _one_at_a_time:
        stored = getattr(model.layers[layer], module).weight[...]
        return np.asarray(_row_norms(stored, np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more))), begin))


@functools.partial(jax.jit, static_argnums=3)
def _row_norms(
    stored: Float[Array, "rows d_in"], a: Float[Array, "rank_rows d_in"], b: Float[Array, "d_out rank_rows"], begin: int
) -> Float[Array, " d_out"]:
    """Compute the norms of the rows of `w + b @ a` in float32, where w is the part of `stored` from row `begin` on."""
    wide = jax.lax.slice_in_dim(stored, begin, begin + b.shape[0]).astype(jnp.float32)

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)

    own, cross = jnp.sum(wide * wide, 1), jnp.sum(product(wide, a) * b, 1)
    added = jnp.sum(product(b, product(a, a)) * b, 1)
    return jnp.sqrt(jnp.maximum(own + 2 * cross + added, 0))
