"""Llama in Flax NNX: Llama 1 to 3 and models of the same shape, and the tensors that they read from a checkpoint.

The layers are unrolled, not scanned: a scan over stacked weights makes XLA copy each layer's weights before its product
(three times the traffic of a decode step). Matrices are `[d_out, d_in]`; q k v and gate up are stored side by side so that
one product serves matrices that share an input. Attention and the adapters' updates are passed in as functions, so that serving
(paged) and training (dense) run the same layers.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chameleon_jax.models.config import ATTENTION_TARGETS, TARGETS, LlamaConfig
from chameleon_jax.models.ops import INSIDE
from chameleon_jax.models.ops.linear import linear

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int

    from chameleon_jax.models.ops.shapes import Hidden

STORED_TOGETHER = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
"""Matrices of a layer by the module that has them, in the order of their rows."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that a checkpoint's tensors may have."""
_HARMLESS = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)")
"""Tensors that follow from the config. Old versions of transformers stored them, and none reads them."""
_QUANTISED = re.compile(r"scale|zero|qweight|packed|absmax|quant|SCB|g_idx|W_q", re.IGNORECASE)
_LISTED = 3
"""Tensors that an error names."""

Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""`(q [..., heads, head_dim], k, v [..., kv_heads, head_dim], extra) -> ([..., heads, head_dim], extra)`."""
Adapt = Callable[[tuple[str, ...], jax.Array, jax.Array, Any], jax.Array]
"""`(targets, y [..., sum of their d_out], x [..., d_in], extra) -> y` with the adapters' updates added."""
Embed = Callable[[jax.Array, jax.Array], jax.Array]
"""`(x [..., hidden], tokens) -> x` with the adapters' updates of the embedding added."""


def rope_frequencies(config: LlamaConfig) -> Float[np.ndarray, " half"]:
    """Compute the inverse frequencies in float32, with Llama 3.1's scaling where the config has it."""
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


def apply_rope(
    x: Float[Array, "*batch heads head_dim"], cos: Float[Array, "*batch 1 half"], sin: Float[Array, "*batch 1 half"]
) -> Float[Array, "*batch heads head_dim"]:
    """Rotate pairs that lie half a head apart, as in Hugging Face's layout."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(size, dtype))
        self.eps = eps

    def __call__(self, x: Hidden) -> Hidden:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps)
        return self.scale[...] * wide.astype(x.dtype)


class Linear(nnx.Module):
    """Product with a weight matrix `[d_out, d_in]`, without a bias."""

    def __init__(self, d_in: int, d_out: int, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.weight = nnx.Param(_draw((d_out, d_in), dtype, rngs))

    def __call__(self, x: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        return linear(x, self.weight[...])


def _draw(shape: tuple[int, int], dtype: jnp.dtype, rngs: nnx.Rngs | None) -> Float[Array, "d_out d_in"]:
    """Draw a matrix whose products are as large as its inputs; zeros without `rngs`."""
    return jnp.zeros(shape, dtype) if rngs is None else jax.random.normal(rngs.params(), shape, dtype) * shape[1] ** -0.5


class LlamaLayer(nnx.Module):
    """Attention and gated feed-forward, each behind a norm and added to its input."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        d, f = config.hidden_size, config.intermediate_size
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.attention_norm = RMSNorm(d, config.rms_norm_eps, dtype)
        self.qkv = Linear(d, (self.heads + 2 * self.kv_heads) * self.head_dim, dtype, rngs)
        self.o = Linear(self.heads * self.head_dim, d, dtype, rngs)
        self.mlp_norm = RMSNorm(d, config.rms_norm_eps, dtype)
        self.gate_up = Linear(d, 2 * f, dtype, rngs)
        self.down = Linear(f, d, dtype, rngs)

    def __call__(
        self,
        x: Hidden,
        rope: tuple[Float[Array, "*batch 1 half"], Float[Array, "*batch 1 half"]],
        extra: Any,
        attend: Attend,
        adapt: Adapt | None,
    ) -> tuple[Hidden, Any]:
        def add(targets: tuple[str, ...], y: jax.Array, inputs: jax.Array) -> jax.Array:
            return y if adapt is None else adapt(targets, y, inputs, extra)

        with jax.named_scope("attention"):
            h = self.attention_norm(x)
            q_size, kv_size = self.heads * self.head_dim, self.kv_heads * self.head_dim
            qkv = add(STORED_TOGETHER["qkv"], self.qkv(h), h)
            q, k, v = (y.reshape(*y.shape[:-1], -1, self.head_dim) for y in jnp.split(qkv, (q_size, q_size + kv_size), axis=-1))
            attended, extra = attend(apply_rope(q, *rope), apply_rope(k, *rope), v, extra)
            attended = attended.reshape(*x.shape[:-1], q_size)
            x = x + add(STORED_TOGETHER["o"], self.o(attended), attended)
        with jax.named_scope("mlp"):
            h = self.mlp_norm(x)
            gate, up = jnp.split(add(STORED_TOGETHER["gate_up"], self.gate_up(h), h), 2, axis=-1)
            h = jax.nn.silu(gate) * up
            return x + add(STORED_TOGETHER["down"], self.down(h), h), extra


class Llama(nnx.Module):
    """Decoder. Weights are random after construction, or zeros without `rngs`; `load_tensors` puts a checkpoint's in place."""

    def __init__(self, config: LlamaConfig, dtype: jnp.dtype, rngs: nnx.Rngs | None):
        self.config = config
        self.embed = nnx.Param(_draw((config.vocab_size, config.hidden_size), dtype, rngs))
        self.layers = nnx.List([LlamaLayer(config, dtype, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, dtype, rngs)

    def __call__(
        self,
        tokens: Int[Array, "*batch"],
        positions: Int[Array, "*batch"],
        extras: Sequence[Any],
        attend: Attend,
        adapt: Adapt | None = None,
        adapt_embedding: Embed | None = None,
    ) -> tuple[Hidden, list[Any]]:
        """Run the layers.

        Args:
            tokens: Token ids, int32.
            positions: Position of each token in its sequence, int32.
            extras: Value for each layer that `attend` and `adapt` get beside activations: its pool, or its adapter.
            attend: Attention.
            adapt: Updates of adapters to the layers' matrices. None: the base model's.
            adapt_embedding: Updates of adapters to the embedding. None: the base model's.

        Returns:
            Hidden states after the final norm, and the layers' extras as `attend` left them.
        """
        x = self.embed[...].at[tokens].get(**INSIDE)
        if adapt_embedding is not None:
            x = adapt_embedding(x, tokens)
        angles = positions[..., None, None].astype(jnp.float32) * rope_frequencies(self.config)
        rope = (jnp.cos(angles), jnp.sin(angles))

        graph, params = nnx.split(self.layers[0])
        tree = jax.tree.structure(params)
        weights_of = [operator.attrgetter(".".join(map(str, path))) for path, _ in nnx.to_flat_state(params)]

        @jax.jit  # traced once for all layers, which are alike; XLA inlines it
        def run(weights: list[Any], x: jax.Array, extra: Any) -> tuple[jax.Array, Any]:
            return nnx.merge(graph, jax.tree.unflatten(tree, weights))(x, rope, extra, attend, adapt)

        left = []
        for module, extra in zip(self.layers, extras):
            x, extra = run([weight(module)[...] for weight in weights_of], x, extra)
            left.append(extra)
        return self.norm(x), left

    @property
    def output_matrix(self) -> Float[Array, "vocab hidden"]:
        """Matrix that turns hidden states into logits; the embedding where the two are tied."""
        return (self.embed if self.head is None else self.head.weight)[...]

    def logits(self, hidden: Hidden) -> Float[Array, "*batch vocab"]:
        """Compute the logits in float32."""
        return logits(hidden, self.output_matrix)


def logits(hidden: Hidden, output_matrix: Float[Array, "vocab hidden"]) -> Float[Array, "*batch vocab"]:
    """Compute the logits in float32 from `Llama.output_matrix`."""
    with jax.named_scope("head"):
        return linear(hidden, output_matrix, jnp.dtype(jnp.float32))


def causal_attention(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    extra: Any,
) -> tuple[Float[Array, "batch tokens heads head_dim"], Any]:
    """Attend causally and densely: the `attend` of training and of references."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), extra


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """List the names and shapes of all tensors, matrices `[d_out, d_in]`."""
    d = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d), "model.norm.weight": (d,)}
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, d)
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        shapes |= {f"{prefix}.{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for target in TARGETS:
            parent = "self_attn" if target in ATTENTION_TARGETS else "mlp"
            shapes[f"{prefix}.{parent}.{target}.weight"] = config.target_shape(target)[::-1]
    return shapes


class ModelTensors(Mapping[str, np.ndarray]):
    """Tensors of a Llama by Hugging Face name: the model's own part of a checkpoint, checked as it is read.

    Raises:
        ValueError: A tensor is missing or has no place in the model, or, when it is read, has another shape or dtype. The
            message names it.
    """

    def __init__(self, config: LlamaConfig, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors
        self._shapes = tensor_shapes(config)
        names = dict.fromkeys(tensors)  # a mapping's own `in` reads the tensor, which takes minutes of a large model
        others = [name for name in names if name not in self._shapes and not _HARMLESS.fullmatch(name)]
        if config.tie_word_embeddings and HEAD in others:
            others.remove(HEAD)
            self._check_tied()
        if others:
            more = f" and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
            hint = " and look like parts of quantised weights" if any(map(_QUANTISED.search, others)) else ""
            raise ValueError(
                f"the checkpoint has tensors that are not served{hint}: {', '.join(others[:_LISTED])}{more}; "
                "allowed: those of a Llama of the config's sizes, without biases, not quantised"
            )
        for name in self._shapes:
            if name not in names:
                raise ValueError(f"the checkpoint has no tensor {name}")

    def __getitem__(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        tensor = np.asarray(self._tensors[name])
        if tensor.shape != shape:
            raise ValueError(f"tensor {name} is {list(tensor.shape)}; allowed: {list(shape)}, by the config")
        if tensor.dtype.name not in FLOATS:
            raise ValueError(f"tensor {name} is of dtype {tensor.dtype}; allowed: {', '.join(FLOATS)}")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _check_tied(self) -> None:
        """Raise ValueError if the checkpoint has an output matrix that differs from its tied embedding."""
        if not np.array_equal(self._tensors[HEAD], self._tensors[EMBEDDING]):
            raise ValueError(f"tie_word_embeddings is True, but {HEAD} is not {EMBEDDING}; allowed: false, or one of the two")


def load_tensors(config: LlamaConfig, tensors: Mapping[str, np.ndarray], dtype: jnp.dtype) -> Llama:
    """Build the model from a checkpoint's tensors.

    Args:
        config: Sizes of the model.
        tensors: Tensors by Hugging Face name, matrices `[d_out, d_in]`.
        dtype: Dtype of the weights.

    Raises:
        ValueError: The tensors do not fit the model (see `ModelTensors`).
    """
    checked = ModelTensors(config, tensors)

    def matrix(prefix: str, *targets: str) -> jax.Array:
        return jnp.asarray(np.concatenate([checked[f"{prefix}.{t}.weight"] for t in targets]), dtype)

    def one(name: str) -> jax.Array:
        return jnp.asarray(checked[name], dtype)

    model = abstract_model(config, dtype)
    model.embed.set_value(one(EMBEDDING))
    model.norm.scale.set_value(one("model.norm.weight"))
    if model.head is not None:
        model.head.weight.set_value(one(HEAD))
    for i, layer in enumerate(model.layers):
        prefix = f"model.layers.{i}"
        layer.attention_norm.scale.set_value(one(f"{prefix}.input_layernorm.weight"))
        layer.mlp_norm.scale.set_value(one(f"{prefix}.post_attention_layernorm.weight"))
        for module, targets in STORED_TOGETHER.items():
            parent = "self_attn" if targets[0] in ATTENTION_TARGETS else "mlp"
            getattr(layer, module).weight.set_value(matrix(f"{prefix}.{parent}", *targets))
    return model


def abstract_model(config: LlamaConfig, dtype: jnp.dtype) -> Llama:
    """Build the model with shapes in place of weights."""
    return nnx.eval_shape(lambda: Llama(config, dtype, None))


def random_model(config: LlamaConfig, dtype: jnp.dtype, seed: int = 0) -> Llama:
    """Build the model with random weights, drawn on the device without reading or copying (`load_format="dummy"`)."""

    return nnx.jit(lambda: Llama(config, dtype, nnx.Rngs(seed)))()
