"""Training of a LoRA adapter on a text with Optax, written in PEFT's format.

The base weights are frozen; the layers are the serving model's own, run densely (`llama.causal_attention`). A is drawn as
PEFT draws it (Kaiming uniform), B starts at zero, so training starts from the base model.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from chameleon_jax.checkpoints import peft
from chameleon_jax.checkpoints.checkpoint import Checkpoint
from chameleon_jax.checks import require_field
from chameleon_jax.memory.adapters import MAX_RANK
from chameleon_jax.models import llama
from chameleon_jax.models.config import TARGETS, LlamaConfig

LayerAdapter = dict[str, tuple[jax.Array, jax.Array]]
"""`target -> (A [r, d_in], B [d_out, r])` of one layer."""


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Settings of a training run.

    Attributes:
        rank: rank of every adapted matrix, 1 to 512 (default 8).
        alpha: numerator of the scale alpha / rank of updates (default 16).
        targets: matrices that are adapted (default: all).
        steps: optimiser steps (default 100). The learning rate warms up over a tenth of them and falls to zero along a cosine.
        batch_size: sequences of a step (default 4).
        sequence_len: tokens of a sequence (default 128).
        learning_rate: largest learning rate of AdamW (default 1e-3).
        weight_decay: weight decay of AdamW (default 0).
        seed: seed of the initial weights and of the batches (default 0).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Sequence[str] = TARGETS
    steps: int = 100
    batch_size: int = 4
    sequence_len: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_field(self, "rank", 1 <= self.rank <= MAX_RANK, f"1 to {MAX_RANK}")
        known = bool(self.targets) and not set(self.targets) - set(TARGETS)
        require_field(self, "targets", known, f"some of {', '.join(TARGETS)}")
        for field in ("steps", "batch_size", "sequence_len"):
            require_field(self, field, getattr(self, field) >= 1, "1 or more")


def init_adapter(config: LlamaConfig, finetune: FinetuneConfig) -> list[LayerAdapter]:
    """Make an untrained adapter, one entry a layer."""
    key = jax.random.key(finetune.seed)
    layers = []
    for layer in range(config.num_layers):
        adapter: LayerAdapter = {}
        for i, target in enumerate(finetune.targets):
            d_in, d_out = config.target_shape(target)
            bound = math.sqrt(3 / d_in)  # kaiming_uniform_(a=sqrt(5)) as in PEFT, up to its constant
            drawn = jax.random.fold_in(jax.random.fold_in(key, layer), i)
            a = jax.random.uniform(drawn, (finetune.rank, d_in), jnp.float32, -bound, bound)
            adapter[target] = (a, jnp.zeros((d_out, finetune.rank)))
        layers.append(adapter)
    return layers


def loss(graph: Any, params: Any, adapter: list[LayerAdapter], tokens: jax.Array, scale: float) -> jax.Array:
    """Mean cross-entropy of the next token, in nats a token.

    Args:
        graph: static part of the model.
        params: weights of the model.
        adapter: one entry a layer.
        tokens: `[batch, length]` int32.
        scale: factor of the adapter's updates.
    """
    model: llama.Llama = nnx.merge(graph, params)

    def adapt(targets: tuple[str, ...], y: jax.Array, x: jax.Array, layer: LayerAdapter) -> jax.Array:
        def update(target: str) -> jax.Array:
            if target not in layer:
                return jnp.zeros((*x.shape[:-1], model.config.target_shape(target)[1]), x.dtype)
            a, b = layer[target]
            return (x @ a.T) @ b.T * scale

        return y + jnp.concatenate([update(t) for t in targets], axis=-1)

    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), (tokens.shape[0], tokens.shape[1] - 1))
    hidden, _ = model(tokens[:, :-1], positions, adapter, llama.causal_attention, adapt)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model.logits(hidden), tokens[:, 1:]))


def batches(tokens: np.ndarray, finetune: FinetuneConfig) -> Iterator[np.ndarray]:
    """Yield `[batch_size, sequence_len + 1]` int32 cuts of a token sequence, drawn from the seed, without end."""
    length = finetune.sequence_len + 1
    if len(tokens) < length:
        raise ValueError(f"the text has {len(tokens)} tokens; needed: more than sequence_len ({finetune.sequence_len})")
    rng = np.random.default_rng(finetune.seed)
    while True:
        starts = rng.integers(0, len(tokens) - length + 1, finetune.batch_size)
        yield np.stack([tokens[s : s + length] for s in starts]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class TrainingStep:
    """State after one step of a training run.

    Attributes:
        number: number of the step, from 1.
        loss: mean cross-entropy of its batch before the update, in nats a token.
        adapter: the adapter after the update, one entry a layer, on the device.
    """

    number: int
    loss: float
    adapter: list[LayerAdapter]


def training_steps(checkpoint: Checkpoint, text: str, config: FinetuneConfig) -> Iterator[TrainingStep]:
    """Train an adapter in float32, and yield it after each step.

    Args:
        checkpoint: the base model, with its tokenizer.
        text: the text to learn.
        config: settings of the run.

    Raises:
        ValueError: the checkpoint has no tokenizer, or the text is too short.
    """
    if checkpoint.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer")
    tokens = np.array(checkpoint.tokenizer.encode(text, add_special_tokens=False))
    model = llama.load_tensors(checkpoint.config, checkpoint.tensors, jnp.dtype(jnp.float32))
    graph, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(1, config.steps // 10), config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))
    adapter = init_adapter(checkpoint.config, config)
    state = optimizer.init(adapter)
    scale = config.alpha / config.rank

    @jax.jit
    def train(adapter: list[LayerAdapter], state: Any, params: Any, batch: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(lambda adapter: loss(graph, params, adapter, batch, scale))(adapter)
        updates, state = optimizer.update(gradient, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    for step, batch in zip(range(config.steps), batches(tokens, config)):
        adapter, state, value = train(adapter, state, params, batch)
        yield TrainingStep(step + 1, float(value), adapter)


def finetune(
    checkpoint: Checkpoint,
    text: str,
    config: FinetuneConfig,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[LayerAdapter]:
    """Train an adapter to the end, and return it. Raises as `training_steps`.

    Args:
        checkpoint: the base model, with its tokenizer.
        text: the text to learn.
        config: settings of the run.
        report: called after each step with its number, from 1, and its loss in nats a token.
    """
    for step in training_steps(checkpoint, text, config):
        report(step.number, step.loss)
    return step.adapter


def save(adapter: list[LayerAdapter], directory: str | Path, config: FinetuneConfig, base_model: str, dtype: Any) -> None:
    """Write an adapter in PEFT's format, its tensors in `dtype`."""
    tensors = {(i, t): (np.asarray(a), np.asarray(b)) for i, layer in enumerate(adapter) for t, (a, b) in layer.items()}
    peft.save(directory, tensors, alpha=config.alpha, base_model=base_model, dtype=dtype)
