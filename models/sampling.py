"""Choosing the next token, every row by its own parameters, vectorised over rows.

A row's random numbers come from its seed and the token's position alone, so its text does not depend on how it was batched,
chunked or recomputed. Top-k and top-p cut by a threshold found by bisection: no sort over the vocabulary.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

MAX_LOGPROBS = 20
"""Alternatives reported beside the chosen token, as OpenAI's API allows."""
MAX_BANNED = 8
"""Token ids a row may forbid (stop ids before min_tokens)."""
_THRESHOLD_BITS = 32
"""How finely a threshold in [0, 1] is found."""
_ABOVE = 1 + 1e-6
"""Above every weight."""


class SamplingMode(enum.Enum):
    """What a batch of rows needs; each mode is a program of its own."""

    GREEDY = "greedy"
    RANDOM = "random"
    LOGPROBS = "logprobs"


DRAW_COLUMNS = 8 + MAX_BANNED
"""Columns of a row of draws, int32: slot, position of the token to draw, seed (low word, high word), top_k (0: all), the bits
of three float32 (temperature, 0: greedy; top_p; min_p), banned ids (-1: none)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tokens `[rows]` int32 and, in LOGPROBS mode, the chosen one's log-probability and the `MAX_LOGPROBS` best."""

    tokens: jax.Array
    logprobs: jax.Array | None = None
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def sample(logits: jax.Array, draws: jax.Array, mode: SamplingMode, guesses: int = 1) -> Sampled:
    """Draws one token a row from `logits [rows, vocab]` float32. Log-probabilities are the model's, before temperature.

    Args:
        draws: `[rows, DRAW_COLUMNS]` int32.
        guesses: thresholds that top-k and top-p try in one pass over the vocabulary. A CPU is bound by the comparisons, so
            1; a GPU by the number of passes.
    """
    slots = jnp.arange(logits.shape[0])[:, None]
    draws = jnp.asarray(draws)
    banned = draws[:, 8:]
    allowed = logits.at[slots, jnp.where(banned < 0, logits.shape[1], banned)].set(-jnp.inf, mode="drop")
    tokens = jnp.argmax(allowed, -1).astype(jnp.int32)
    if mode is SamplingMode.GREEDY:
        return Sampled(tokens=tokens)
    tokens = _draw(allowed, draws, guesses, tokens)
    if mode is SamplingMode.RANDOM:
        return Sampled(tokens=tokens)
    logprobs = jax.nn.log_softmax(logits, -1)
    top_logprobs, top_tokens = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], -1)[:, 0]
    return Sampled(tokens=tokens, logprobs=chosen, top_tokens=top_tokens, top_logprobs=top_logprobs)


def _draw(logits: jax.Array, draws: jax.Array, guesses: int, best: jax.Array) -> jax.Array:
    """Gumbel-max over what top-k, top-p and min-p leave; `best` where the temperature is 0."""
    temperature, top_p, min_p = lax.bitcast_convert_type(draws[:, 5:8], jnp.float32).T
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    weights = jnp.exp(scaled - scaled.max(-1, keepdims=True))  # in [0, 1]; the best token has 1
    weights = jnp.where(weights >= min_p[:, None], weights, 0.0)
    keep = (weights > 0) & (weights >= _threshold(weights, draws[:, 4], top_p, guesses)[:, None])

    def gumbel(row: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(row[2:4].astype(jnp.uint32), impl="threefry2x32")  # the 64 bits of the seed
        return jax.random.gumbel(jax.random.fold_in(key, row[1]), logits.shape[1:], jnp.float32)

    noisy = jnp.where(keep, scaled, -jnp.inf) + jax.vmap(gumbel)(draws)
    return jnp.where(temperature > 0, jnp.argmax(noisy, -1).astype(jnp.int32), best)


def _threshold(weights: jax.Array, top_k: jax.Array, top_p: jax.Array, guesses: int) -> jax.Array:
    """The largest weight `[rows]` at or above which at least top_k tokens and a share top_p of the mass lie.

    Ties at the threshold are all kept, as Hugging Face does. top_p applies to what min_p and top_k left (vLLM's order).
    """

    def search(amount: jax.Array, least: jax.Array) -> jax.Array:
        """The largest threshold at or above which weights that amount to at least `least` lie."""
        low = jnp.zeros(weights.shape[0])
        rounds = math.ceil(_THRESHOLD_BITS / math.log2(guesses + 1))
        high = low + _ABOVE
        if guesses == 1:
            low, _ = lax.fori_loop(0, rounds, lambda _, bounds: _narrow(weights, amount, least, *bounds, 1), (low, high))
            return low
        for _ in range(rounds):  # a GPU would wait for the host in each round of a loop
            low, high = _narrow(weights, amount, least, low, high, guesses)
        return low

    low_k = jnp.where(top_k > 0, search(jnp.ones_like(weights), top_k.astype(jnp.float32)), 0.0)
    remaining = jnp.where(weights >= low_k[:, None], weights, 0.0)
    low_p = search(remaining, top_p * remaining.sum(-1))
    return jnp.maximum(low_k, jnp.where(top_p < 1, low_p, 0.0))


@functools.partial(jax.jit, static_argnums=5)  # lowered once for all rounds; XLA inlines it
def _narrow(
    weights: jax.Array, amount: jax.Array, least: jax.Array, low: jax.Array, high: jax.Array, guesses: int
) -> tuple[jax.Array, jax.Array]:
    """One round of a search between `low` and `high`, which it cuts in `guesses` places."""
    cuts = [low + (high - low) * (i / (guesses + 1)) for i in range(1, guesses + 1)]
    nothing = lax.full_like(amount, 0.0)
    above = [lax.ge(weights, lax.broadcast_in_dim(cut, weights.shape, (0,))) for cut in cuts]
    for cut, total in zip(cuts, _sums([lax.select(mask, amount, nothing) for mask in above])):
        enough = lax.ge(total, least)
        low, high = lax.select(enough, lax.max(low, cut), low), lax.select(enough, high, lax.min(high, cut))
    return low, high


def _sums(arrays: list[jax.Array]) -> Sequence[jax.Array]:
    """Row sums of arrays that are made from one another, in one pass: XLA does not join separate reductions of this kind."""
    zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)
    return lax.reduce(tuple(arrays), zeros, lambda xs, ys: tuple(x + y for x, y in zip(xs, ys)), dimensions=(1,))
