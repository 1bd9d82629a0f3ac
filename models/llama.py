"""Llama in Flax NNX: Llama 1 to 3 and what is Llama-shaped.

The layers are unrolled, not scanned: a scan over stacked weights makes XLA copy each layer's weights before its product
(three times the traffic of a decode step). Matrices are `[d_out, d_in]`; q k v and gate up are stored side by side so that
one product serves what shares an input. How tokens attend and what adapters add is passed in, so that serving (paged) and
training (dense) run the same layers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.model_tensors import EMBEDDING, HEAD, ModelTensors
from chameleon_jax.models.ops import INSIDE
from chameleon_jax.models.ops.linear import linear

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""`(q [..., heads, head_dim], k, v [..., kv_heads, head_dim], extra) -> ([..., heads, head_dim], extra)`."""
Adapt = Callable[[tuple[str, ...], jax.Array, jax.Array, Any], jax.Array]
"""`(targets, y [..., sum of their d_out], x [..., d_in], extra) -> y` with the adapters' updates added."""


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Inverse frequencies `[head_dim / 2]` float32; with Llama 3.1's scaling where the config has it."""
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None:
        wavelength = 2 * math.pi / frequencies
        original = scaling.original_max_position_embeddings
        low, high = original / scaling.low_freq_factor, original / scaling.high_freq_factor
        smooth = (original / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
        frequencies = np.where(
            wavelength < high, frequencies, np.where(wavelength > low, frequencies / scaling.factor, blended)
        )
    return frequencies.astype(np.float32)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `x [..., heads, head_dim]` by `cos, sin [..., 1, head_dim / 2]`, halves apart as in Hugging Face's layout."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return self.scale[...] * wide.astype(x.dtype)


class Linear(nnx.Module):
    def __init__(self, d_in: int, d_out: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (d_out, d_in), dtype) * d_in**-0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(x, self.weight[...])


class LlamaLayer(nnx.Module):
    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        d, f = config.hidden_size, config.intermediate_size
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.attention_norm = RMSNorm(d, config.rms_norm_eps, dtype)
        self.qkv = Linear(d, (self.heads + 2 * self.kv_heads) * self.head_dim, dtype, rngs)
        self.o = Linear(self.heads * self.head_dim, d, dtype, rngs)
        self.mlp_norm = RMSNorm(d, config.rms_norm_eps, dtype)
        self.gate_up = Linear(d, 2 * f, dtype, rngs)
        self.down = Linear(f, d, dtype, rngs)

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], extra: Any, attend: Attend, adapt: Adapt | None
    ) -> tuple[jax.Array, Any]:
        def add(targets: tuple[str, ...], y: jax.Array, inputs: jax.Array) -> jax.Array:
            return y if adapt is None else adapt(targets, y, inputs, extra)

        with jax.named_scope("attention"):
            h = self.attention_norm(x)
            q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
            qkv = add(("q_proj", "k_proj", "v_proj"), self.qkv(h), h)
            q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in jnp.split(qkv, (q_size, q_size + kv_size), axis=-1))
            attended, extra = attend(apply_rope(q, *rope), apply_rope(k, *rope), v, extra)
            attended = attended.reshape(*x.shape[:-1], q_size)
            x = x + add(("o_proj",), self.o(attended), attended)
        with jax.named_scope("mlp"):
            h = self.mlp_norm(x)
            gate, up = jnp.split(add(("gate_proj", "up_proj"), self.gate_up(h), h), 2, axis=-1)
            h = jax.nn.silu(gate) * up
            return x + add(("down_proj",), self.down(h), h), extra


class Llama(nnx.Module):
    """The decoder. Weights are random after construction; `load_tensors` puts a checkpoint's in their place."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Param(
            jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size), dtype) * config.hidden_size**-0.5
        )
        self.layers = nnx.List([LlamaLayer(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, dtype, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        extras: Sequence[Any],
        attend: Attend,
        adapt: Adapt | None = None,
    ) -> tuple[jax.Array, list[Any]]:
        """Runs the layers over `tokens` and `positions` `[...]` int32.

        Args:
            extras: what `attend` and `adapt` get beside activations, one for each layer: its pool, or its adapter.

        Returns:
            Hidden states after the final norm, `[..., hidden]`, and the layers' extras as `attend` left them.
        """
        x = self.embed[...].at[tokens].get(**INSIDE)
        angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(self.config)
        rope = (jnp.cos(angles), jnp.sin(angles))

        graph, params = nnx.split(self.layers[0])
        tree = jax.tree.structure(params)
        weights_of = [operator.attrgetter(".".join(map(str, path))) for path, _ in nnx.to_flat_state(params)]

        @jax.jit  # traced once for all layers, which are alike; XLA inlines it
        def run(weights: list[jax.Array], x: jax.Array, extra: Any) -> tuple[jax.Array, Any]:
            return nnx.merge(graph, jax.tree.unflatten(tree, weights))(x, rope, extra, attend, adapt)

        left = []
        for module, extra in zip(self.layers, extras):
            x, extra = run([weight(module)[...] for weight in weights_of], x, extra)
            left.append(extra)
        return self.norm(x), left

    @property
    def output_matrix(self) -> jax.Array:
        """`[vocab, hidden]`; the embedding's where the two are tied."""
        return (self.embed if self.head is None else self.head.weight)[...]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """`[..., vocab]` float32 of `hidden` `[..., hidden]`."""
        return logits(hidden, self.output_matrix)


def logits(hidden: jax.Array, output_matrix: jax.Array) -> jax.Array:
    """`[..., vocab]` float32 of `hidden [..., hidden]` and `Llama.output_matrix`."""
    with jax.named_scope("head"):
        return linear(hidden, output_matrix, jnp.dtype(jnp.float32))


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, extra: Any) -> tuple[jax.Array, Any]:
    """Dense causal attention over `[batch, tokens, heads, head_dim]`: the `attend` of training and of references."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), extra


def load_tensors(config: LlamaConfig, tensors: Mapping[str, np.ndarray], dtype: jnp.dtype) -> Llama:
    """Builds the model from a checkpoint's tensors.

    Args:
        tensors: by Hugging Face name, matrices `[d_out, d_in]`.

    Raises:
        ValueError: see `ModelTensors`.
    """
    checked = ModelTensors(config, tensors)

    def matrix(prefix: str, *targets: str) -> jax.Array:
        return jnp.asarray(np.concatenate([checked[f"{prefix}.{t}.weight"] for t in targets]), dtype)

    def one(name: str) -> jax.Array:
        return jnp.asarray(checked[name], dtype)

    model = nnx.eval_shape(lambda: Llama(config, dtype, nnx.Rngs(0)))
    model.embed.set_value(one(EMBEDDING))
    model.norm.scale.set_value(one("model.norm.weight"))
    if model.head is not None:
        model.head.weight.set_value(one(HEAD))
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        layer.attention_norm.scale.set_value(one(f"{prefix}.input_layernorm.weight"))
        layer.mlp_norm.scale.set_value(one(f"{prefix}.post_attention_layernorm.weight"))
        layer.qkv.weight.set_value(matrix(f"{prefix}.self_attn", "q_proj", "k_proj", "v_proj"))
        layer.o.weight.set_value(matrix(f"{prefix}.self_attn", "o_proj"))
        layer.gate_up.weight.set_value(matrix(f"{prefix}.mlp", "gate_proj", "up_proj"))
        layer.down.weight.set_value(matrix(f"{prefix}.mlp", "down_proj"))
    return model


def random_model(config: LlamaConfig, dtype: jnp.dtype, seed: int = 0) -> Llama:
    """The model with random weights drawn on the device (`load_format="dummy"`): nothing is read, nothing is copied."""

    @nnx.jit
    def build() -> Llama:
        return Llama(config, dtype, nnx.Rngs(seed))

    return build()
