"""Llama written in torch for speed: fused matrices, a static KV cache, one forward for prefill and decode.

Some work of a server is left out in its favour: block tables, a length for each row, sampling.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional as F

from chameleon_jax.models.config import LlamaConfig
from chameleon_jax.models.llama import rope_frequencies


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """Weights of a layer: norms `[hidden]`, matrices `[d_out, d_in]`, q k v and gate up side by side."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of the model; `embed` and `head` are `[vocab, hidden]`."""

    embed: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    head: torch.Tensor


def random_weights(config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Weights:
    """Draw weights on the device."""

    def matrix(d_out: int, d_in: int) -> torch.Tensor:
        return torch.empty(d_out, d_in, dtype=dtype, device=device).normal_(std=d_in**-0.5)

    def norm() -> torch.Tensor:
        return torch.ones(config.hidden_size, dtype=dtype, device=device)

    d, f, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads = config.num_heads + 2 * config.num_kv_heads
    attended = config.num_heads * config.head_dim
    layers = [
        LayerWeights(norm(), matrix(heads * config.head_dim, d), matrix(d, attended), norm(), matrix(2 * f, d), matrix(d, f))
        for _ in range(config.num_layers)
    ]
    embed = matrix(vocab, d)
    return Weights(embed, layers, norm(), embed if config.tie_word_embeddings else matrix(vocab, d))


def rotate(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the rotary embedding to q and k, halves apart.

    `qkv` is `[rows, tokens, (heads + 2 kv_heads) * head_dim]`; `cos` and `sin` are `[tokens, 1, head_dim]` float32, the first
    half of `sin` negated.

    Returns:
        q `[rows, tokens, heads, head_dim]`, and k and v `[2, rows, tokens, kv_heads, head_dim]`.
    """
    head_dim = cos.shape[-1]
    x = qkv.view(*qkv.shape[:2], heads + 2 * kv_heads, head_dim)
    qk, v = x[:, :, : heads + kv_heads], x[:, :, heads + kv_heads :]
    rotated = (qk * cos + qk.roll(head_dim // 2, -1) * sin).to(qkv.dtype)
    return rotated[:, :, :heads], torch.stack([rotated[:, :, heads:], v])


def add_norm(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `x + y`, and its norm."""
    x = x + y
    return x, F.rms_norm(x, weight.shape, weight, eps)


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    """Return `silu(gate) * up` of the two side by side."""
    first, second = gate_up.chunk(2, -1)
    return F.silu(first) * second


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Operations between the products."""

    name: str
    rotate: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    add_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gate: Callable[[torch.Tensor], torch.Tensor]


PLAIN = Pieces("", rotate, add_norm, gate)


def compiled_pieces() -> Pieces:
    """Compile each piece to a kernel by torch.compile; products and attention stay the libraries'."""
    torch.compiler.reset()  # programs for another model's sizes would make all sizes dynamic
    return Pieces("element-wise compiled", *(torch.compile(piece, fullgraph=True) for piece in (rotate, add_norm, gate)))


class Adapters(Protocol):
    """Low-rank updates of the rows of a batch (torch_lora.py)."""

    def product(self, layer: int, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply `x [rows, tokens, d_in]` with the layer's updated matrix of this name, `[d_out, d_in]`."""


class TorchLlama:
    """The model.

    Args:
        max_tokens: Tokens of a sequence, at most.
    """

    def __init__(self, config: LlamaConfig, weights: Weights, max_tokens: int):
        self.config, self.weights = config, weights
        frequencies = torch.from_numpy(rope_frequencies(config))
        angles = torch.arange(max_tokens, dtype=torch.float32)[:, None, None] * frequencies
        self._cos = torch.cat([angles.cos(), angles.cos()], -1).to(weights.norm.device)
        self._sin = torch.cat([-angles.sin(), angles.sin()], -1).to(weights.norm.device)

    def cache(self, rows: int, max_context: int) -> torch.Tensor:
        """Uninitialised cache of k and v, `[layers, 2, rows, kv_heads, max_context, head_dim]`."""
        config, like = self.config, self.weights.norm
        shape = (config.num_layers, 2, rows, config.num_kv_heads, max_context, config.head_dim)
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    def logits(
        self,
        tokens: torch.Tensor,
        start: int,
        cache: torch.Tensor,
        pieces: Pieces = PLAIN,
        adapters: Adapters | None = None,
    ) -> torch.Tensor:
        """Compute `tokens [rows, tokens]` from position `start` on: 0, or one token a row.

        Returns:
            Logits `[rows, vocab]` of each row's last token, in the dtype of the weights.

        Raises:
            ValueError: There are several tokens a row, and `start` is not 0.
        """
        config, weights = self.config, self.weights
        length = tokens.shape[1]
        if length > 1 and start:
            raise ValueError(f"start is {start}; allowed: 0, or one token a row (there are {length})")
        end = start + length
        cos, sin = self._cos[start:end], self._sin[start:end]
        x = F.embedding(tokens, weights.embed)
        h = F.rms_norm(x, weights.norm.shape, weights.layers[0].attention_norm, config.rms_norm_eps)
        following = [layer.attention_norm for layer in weights.layers[1:]] + [weights.norm]
        for number, (layer, kv_cache, norm) in enumerate(zip(weights.layers, cache, following)):
            linear = functools.partial(_linear, adapters, number, layer)
            q, kv = pieces.rotate(linear("qkv", h), cos, sin, config.num_heads, config.num_kv_heads)
            kv_cache[:, :, :, start:end].copy_(kv.transpose(2, 3))
            k, v = kv_cache[:, :, :, :end]
            attended = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, is_causal=length > 1, enable_gqa=config.num_heads != config.num_kv_heads
            )
            attended = attended.transpose(1, 2).reshape(*tokens.shape, -1)
            x, h = pieces.add_norm(x, linear("o", attended), layer.mlp_norm, config.rms_norm_eps)
            down = linear("down", pieces.gate(linear("gate_up", h)))
            x, h = pieces.add_norm(x, down, norm, config.rms_norm_eps)
        return F.linear(h[:, -1], weights.head)


def _linear(adapters: Adapters | None, number: int, layer: LayerWeights, name: str, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(layer, name)
    return F.linear(x, weight) if adapters is None else adapters.product(number, name, x, weight)
