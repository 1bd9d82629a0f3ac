"""The paper's proxy predictor (section 3): a small encoder that predicts from a prompt's tokens how long the output will be.

It sorts prompts into classes of output length, and a class stands for one number of tokens. It reads the first and the
last tokens of a long prompt; the prompt's length is a feature of its own. Ids are hashed (modulo `vocab_buckets`), so one size
of table serves every vocabulary: in BPE vocabularies low ids are the frequent tokens, so these keep rows of their own.

It runs on the host's CPU where JAX has one, in few shapes, so that it neither queues behind the served model nor compiles
once it is warm. The thread that runs it beside serving is `serving/proxy_predictor.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from chameleon_jax.checks import require_field
from chameleon_jax.scheduler.length_predictor import CLASS_CUTS

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int


ROW_BUCKETS = (1, 8)
"""Rows that a batch is padded to; more prompts are several batches. On CPU 32 rows at once take twice as long as 4 times 8."""


@dataclasses.dataclass(frozen=True)
class LengthProxyConfig:
    """Sizes of the network, and settings of its training.

    Attributes:
        class_cuts: Output tokens. Class i holds lengths above cut i - 1, up to and including cut i.
        class_lens: Output tokens that each class predicts. None: the class's mean in training.
        window: Tokens read of a prompt: its first and its last half window where it has more.
        vocab_buckets: Rows of the embedding that token ids share.
        hidden_size: Size of a hidden state.
        num_heads: Attention heads.
        num_layers: Encoder layers.
        token_dropout: Share of tokens hidden in training, so that no prompt is learned by heart.
        epochs: Passes over the training split.
        batch_size: Examples of a training step.
        learning_rate: Peak of a warm-up over a tenth of the steps and a fall to zero along a cosine.
        weight_decay: Decay of the weights.
        held_out: Share of each class's examples that is kept from training and measured on.
        seed: Seed of weights, split, order and dropout.
    """

    class_cuts: Sequence[int] = CLASS_CUTS
    class_lens: Sequence[int] | None = None
    window: int = 256
    vocab_buckets: int = 8192
    hidden_size: int = 64
    num_heads: int = 4
    num_layers: int = 2
    token_dropout: float = 0.1
    epochs: int = 8
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        def positive(values: Sequence[int]) -> bool:
            return all(isinstance(v, numbers.Integral) and v >= 1 for v in values)

        for field in ("class_cuts", "class_lens"):  # a JSON file has lists
            if getattr(self, field) is not None:
                object.__setattr__(self, field, tuple(getattr(self, field)))
        rising = all(a < b for a, b in itertools.pairwise(self.class_cuts))
        require_field(
            self, "class_cuts", positive(self.class_cuts) and bool(self.class_cuts) and rising, "rising integers from 1"
        )
        lens = self.class_lens
        ok = lens is None or (positive(lens) and len(lens) == self.num_classes)
        require_field(self, "class_lens", ok, f"None, or {self.num_classes} integers from 1")
        for field in ("vocab_buckets", "hidden_size", "num_heads", "num_layers", "epochs", "batch_size"):
            require_field(self, field, positive([getattr(self, field)]), "an integer from 1")
        require_field(
            self, "window", positive([self.window]) and self.window >= 8 and self.window % 2 == 0, "an even integer from 8"
        )
        require_field(
            self, "hidden_size", self.hidden_size % self.num_heads == 0, f"a multiple of num_heads ({self.num_heads})"
        )
        require_field(self, "token_dropout", 0 <= self.token_dropout < 1, "from 0, below 1")
        require_field(self, "held_out", 0 < self.held_out < 1, "above 0, below 1")
        require_field(self, "learning_rate", self.learning_rate > 0, "above 0")
        require_field(self, "weight_decay", self.weight_decay >= 0, "0 or more")

    @property
    def num_classes(self) -> int:
        """Classes of output length."""
        return len(self.class_cuts) + 1

    @property
    def length_buckets(self) -> tuple[int, int]:
        """Tokens that a row is padded to."""
        return self.window // 4, self.window

    def classes_of(self, output_lens: Sequence[int] | Int[np.ndarray, " prompts"]) -> Int[np.ndarray, " prompts"]:
        """Sort output lengths, in tokens, into classes."""
        return np.searchsorted(self.class_cuts, output_lens, side="left")


class _Block(nnx.Module):
    """Encoder layer: every token attends to all tokens of its row."""

    def __init__(self, config: LengthProxyConfig, rngs: nnx.Rngs):
        d = config.hidden_size
        self.num_heads = config.num_heads
        self.attention_norm, self.mlp_norm = nnx.LayerNorm(d, rngs=rngs), nnx.LayerNorm(d, rngs=rngs)
        self.qkv, self.out = nnx.Linear(d, 3 * d, rngs=rngs), nnx.Linear(d, d, rngs=rngs)
        self.up, self.down = nnx.Linear(d, 4 * d, rngs=rngs), nnx.Linear(4 * d, d, rngs=rngs)

    def __call__(
        self, x: Float[Array, "rows length hidden"], valid: Bool[Array, "rows length"]
    ) -> Float[Array, "rows length hidden"]:
        q, k, v = jnp.split(self.qkv(self.attention_norm(x)).reshape(*x.shape[:2], 3 * self.num_heads, -1), 3, axis=2)
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, mask=valid[:, None, None, :]).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.mlp_norm(x))))


class LengthClassifier(nnx.Module):
    """Embedding, encoder layers, gated pooling, and one hidden layer that also sees the prompt's length."""

    def __init__(self, config: LengthProxyConfig, rngs: nnx.Rngs):
        d = config.hidden_size
        self.window = config.window
        self.embed = nnx.Embed(config.vocab_buckets + 1, d, rngs=rngs)  # the last row stands for a token hidden by dropout
        self.places = nnx.Embed(config.window, d, rngs=rngs)
        self.blocks = nnx.List([_Block(config, rngs) for _ in range(config.num_layers)])
        self.norm = nnx.LayerNorm(d, rngs=rngs)
        self.gate = nnx.Linear(d, 1, rngs=rngs)
        self.mix = nnx.Linear(d + 1, d, rngs=rngs)
        self.head = nnx.Linear(d, config.num_classes, rngs=rngs)

    def __call__(self, tokens: Int[Array, "rows length"], prompt_lens: Int[Array, " rows"]) -> Float[Array, "rows classes"]:
        """Compute the classes' logits from hashed tokens and from the lengths of the whole prompts, both int32."""
        places = jnp.arange(tokens.shape[1])
        valid = places < jnp.maximum(prompt_lens, 1)[:, None]  # a row that pads the batch reads one token
        x = self.embed(tokens) + self.places(places)
        for block in self.blocks:
            x = block(x, valid)
        x = self.norm(x)
        weights = jax.nn.softmax(jnp.where(valid, self.gate(x)[..., 0], -jnp.inf), axis=-1)
        pooled = jnp.einsum("nt,ntd->nd", weights, x)
        length = jnp.log1p(prompt_lens.astype(jnp.float32))[:, None] / np.log1p(self.window)
        return self.head(jax.nn.gelu(self.mix(jnp.concatenate([pooled, length], -1))))


@functools.partial(jax.jit, static_argnums=0)
def _classify(
    graph: Any, params: Any, tokens: Int[Array, "rows length"], prompt_lens: Int[Array, " rows"]
) -> Int[Array, " rows"]:
    model: LengthClassifier = nnx.merge(graph, params)
    return jnp.argmax(model(tokens, prompt_lens), -1)


class LengthProxy:
    """Trained classifier. Thread-safe.

    Args:
        config: Settings that it was trained with.
        params: State of a `LengthClassifier`.
        class_lens: Output tokens that each class predicts.
        confusion: Held-out examples by class and predicted class.
    """

    def __init__(self, config: LengthProxyConfig, params: Any, class_lens: np.ndarray, confusion: np.ndarray):
        self.config = config
        self.class_lens = np.asarray(class_lens, np.int64)
        self.confusion = np.asarray(confusion, np.int64)
        self._device = _host_device()
        self._graph = nnx.split(abstract_model(config))[0]
        self.params = jax.device_put(params, self._device)

    @property
    def accuracy(self) -> float:
        """Share of held-out examples whose class was right."""
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))

    def warm_up(self) -> None:
        """Compile every shape, so that `classify` compiles nothing from then on."""
        for rows, length in itertools.product(ROW_BUCKETS, self.config.length_buckets):
            self.classify([[0] * length] * rows)

    def classify(self, prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, " prompts"]:
        """Predict the class of each prompt's output length, and block for the result."""
        classes = np.zeros(len(prompts), np.int64)
        short, long = self.config.length_buckets
        is_long = np.array([len(p) > short for p in prompts], bool)
        for length, members in ((short, np.flatnonzero(~is_long)), (long, np.flatnonzero(is_long))):
            for start in range(0, len(members), ROW_BUCKETS[-1]):
                batch = members[start : start + ROW_BUCKETS[-1]]
                rows = next(b for b in ROW_BUCKETS if b >= len(batch))
                inputs = _encode([prompts[i] for i in batch], self.config, rows, length)
                found = _classify(self._graph, self.params, *jax.device_put(inputs, self._device))
                classes[batch] = np.asarray(found)[: len(batch)]
        return classes

    def predict_lens(self, prompts: Sequence[Sequence[int]]) -> Int[np.ndarray, " prompts"]:
        """Predict each prompt's output length in tokens, and block for the result."""
        return self.class_lens[self.classify(prompts)]


def train(
    prompts: Sequence[Sequence[int]],
    output_lens: Sequence[int],
    config: LengthProxyConfig,
    report: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> LengthProxy:
    """Train on all but a held-out share of each class, on which `confusion` is measured. The seed decides everything.

    Args:
        prompts: Token ids.
        output_lens: Tokens of the answer to each prompt.
        config: Settings.
        report: Callback after each step, with its number, the number of steps, and the loss in nats.

    Raises:
        ValueError: The examples cannot be trained on. The message says why.
    """
    if len(prompts) != len(output_lens):
        raise ValueError(f"output_lens has {len(output_lens)} entries; needed: one for each of {len(prompts)} prompts")
    for field, values in (("prompts", [len(p) for p in prompts]), ("output_lens", output_lens)):
        bad = next((i for i, v in enumerate(values) if v < 1), None)
        if bad is not None:
            raise ValueError(f"{field}[{bad}] has {values[bad]} tokens; allowed: 1 or more")
    classes = config.classes_of(np.asarray(output_lens, np.int64))
    rng = np.random.default_rng(config.seed)
    train_rows, held_rows = _split(classes, config, rng)
    lens = config.class_lens or [
        round(np.mean([output_lens[i] for i in train_rows if classes[i] == c])) for c in range(config.num_classes)
    ]

    length = next((b for b in config.length_buckets if b >= max(map(len, prompts))), config.window)
    examples = (*_encode(prompts, config, len(prompts), length), classes)
    init_key, dropout_key = jax.random.split(jax.random.key(config.seed))
    build = nnx.jit(lambda key: LengthClassifier(config, nnx.Rngs(key)))  # one program instead of one an array
    graph, params = nnx.split(build(init_key))
    batch_size = min(config.batch_size, len(train_rows))
    steps = config.epochs * (len(train_rows) // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(1, steps // 10), max(2, steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=config.weight_decay))
    state = jax.jit(optimizer.init)(params)

    def loss(
        params: Any, tokens: Int[Array, "rows length"], prompt_lens: Int[Array, " rows"], labels: Int[Array, " rows"], key: Any
    ) -> Float[Array, ""]:
        hidden = jax.random.bernoulli(key, config.token_dropout, tokens.shape)
        logits = nnx.merge(graph, params)(jnp.where(hidden, config.vocab_buckets, tokens), prompt_lens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def update(params: Any, state: Any, key: Any, step: Any, *batch: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(params, *batch, jax.random.fold_in(key, step))
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    step = 0
    for _ in range(config.epochs):
        order = rng.permutation(train_rows)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            rows = order[start : start + batch_size]
            params, state, value = update(params, state, dropout_key, step, *(x[rows] for x in examples))
            step += 1
            report(step, steps, float(value))

    proxy = LengthProxy(config, params, np.array(lens), np.zeros((config.num_classes,) * 2))
    np.add.at(proxy.confusion, (classes[held_rows], proxy.classify([prompts[i] for i in held_rows])), 1)
    return proxy


def _encode(
    prompts: Sequence[Sequence[int]], config: LengthProxyConfig, rows: int, length: int
) -> tuple[Int[np.ndarray, "rows length"], Int[np.ndarray, " rows"]]:
    """Hash the tokens that are read, and measure the prompts; both int32. Rows without a prompt have length 0."""
    tokens, prompt_lens = np.zeros((rows, length), np.int32), np.zeros(rows, np.int32)
    half = config.window // 2
    for i, prompt in enumerate(prompts):
        read = prompt if len(prompt) <= config.window else [*prompt[:half], *prompt[-half:]]
        tokens[i, : len(read)] = np.asarray(read) % config.vocab_buckets
        prompt_lens[i] = len(prompt)
    return tokens, prompt_lens


def _split(classes: np.ndarray, config: LengthProxyConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Choose the indices of the training and of the held-out examples. Every class is in both."""
    train, held = [], []
    for c in range(config.num_classes):
        members = rng.permutation(np.flatnonzero(classes == c))
        if len(members) < 2:
            raise ValueError(
                f"output_lens has {len(members)} in class {c} of class_cuts {config.class_cuts}; needed: at least 2 in each"
            )
        count = min(max(1, round(config.held_out * len(members))), len(members) - 1)
        held.append(members[:count])
        train.append(members[count:])
    return np.concatenate(train), np.concatenate(held)


def abstract_model(config: LengthProxyConfig) -> LengthClassifier:
    """Build the classifier with shapes in place of values."""
    return nnx.eval_shape(lambda: LengthClassifier(config, nnx.Rngs(0)))


def _host_device() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return jax.local_devices()[0]
