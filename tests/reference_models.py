"""Small models and adapters drawn from a seed with NumPy, so that other libraries get the same ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import tokenizers

from chameleon_jax.checkpoints import huggingface, peft
from chameleon_jax.checkpoints.checkpoint import Checkpoint
from chameleon_jax.checkpoints.tokenizer import Tokenizer
from chameleon_jax.models.config import TARGETS, Llama3RopeScaling, LlamaConfig

_MHA = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_position_embeddings=512,
)
CONFIGS = {
    "mha": _MHA,
    "gqa": dataclasses.replace(_MHA, num_kv_heads=2, rms_norm_eps=1e-6),
    "tied": dataclasses.replace(_MHA, num_kv_heads=1, tie_word_embeddings=True, rope_theta=100_000.0),
    "llama3-rope": dataclasses.replace(
        _MHA, num_kv_heads=2, num_layers=3, rope_theta=500_000.0, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 64)
    ),
}
ADAPTER_RANKS = {"r1": 1, "r3": 3, "r8": 8, "r16": 16, "r64": 64, "r128": 128, "r256": 256, "r8-qv": 8}
ADAPTER_TARGETS = {name: TARGETS for name in ADAPTER_RANKS} | {
    "r8-qv": ("q_proj", "v_proj"),
    "r16": ("gate_proj", "down_proj"),
}
ALPHA = 16.0


def checkpoint(config: LlamaConfig, seed: int = 0) -> Checkpoint:
    """Draw weights that are large enough to keep greedy choices far from ties."""
    rng = np.random.default_rng(seed)

    def matrix(d_out: int, d_in: int) -> np.ndarray:
        return (rng.standard_normal((d_out, d_in)) * 1.5 * d_in**-0.5).astype(np.float32)

    tensors = {"model.embed_tokens.weight": rng.standard_normal((config.vocab_size, config.hidden_size)).astype(np.float32)}
    for i in range(config.num_layers):
        for target in TARGETS:
            d_in, d_out = config.target_shape(target)
            parent = "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            tensors[f"model.layers.{i}.{parent}.{target}.weight"] = matrix(d_out, d_in)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = rng.uniform(0.5, 1.5, config.hidden_size).astype(np.float32)
    tensors["model.norm.weight"] = rng.uniform(0.5, 1.5, config.hidden_size).astype(np.float32)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = matrix(config.vocab_size, config.hidden_size)
    return Checkpoint(config, tensors)


def save_model(directory: Path, name: str, text: bool = False) -> Path:
    """Save a model; with `text`, a tokenizer of one token per byte and a chat template too."""
    huggingface.save(checkpoint(CONFIGS[name]), directory)
    if text:
        byte_tokenizer().save(directory)
    return directory


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, {"chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"})


def save_adapter(directory: Path, config: LlamaConfig, rank: int, targets: tuple[str, ...] = TARGETS, seed: int = 0) -> Path:
    """Save a random adapter that changes the output visibly."""
    rng = np.random.default_rng([seed, rank])
    tensors = {}
    for layer in range(config.num_layers):
        for target in targets:
            d_in, d_out = config.target_shape(target)
            a = rng.standard_normal((rank, d_in)).astype(np.float32) * d_in**-0.5
            b = rng.standard_normal((d_out, rank)).astype(np.float32) * (0.4 * rank**0.5 / ALPHA)
            tensors[layer, target] = (a, b)
    peft.save(directory, tensors, alpha=ALPHA, base_model="reference")
    return directory


def save_adapters(directory: Path, config: LlamaConfig) -> dict[str, Path]:
    """Save the eight adapters of ADAPTER_RANKS."""
    return {
        name: save_adapter(directory / name, config, rank, ADAPTER_TARGETS[name], seed)
        for seed, (name, rank) in enumerate(ADAPTER_RANKS.items())
    }


def prompt(seed: int, length: int = 20, vocab: int = 256) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()
