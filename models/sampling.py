"""Choosing the next token, every row by its own parameters, vectorised over rows.

A row's random numbers come from its seed and the token's position alone, so its text does not depend on how it was batched,
chunked or recomputed. Top-k and top-p cut by a threshold found by bisection: no sort over the vocabulary.

Whatever the parameters, the best token stays: logits are taken as gaps to the largest, which is exactly 0 for the best one, and
no threshold is above 0. A logit that is NaN counts as -inf. Bans that would leave nothing are not heeded.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from chameleon_jax.outputs import LEAST_LOGPROB

MAX_LOGPROBS = 20
"""Alternatives reported beside the chosen token, as OpenAI's API allows."""
MAX_BANNED = 8
"""Token ids a row may forbid (stop ids before min_tokens)."""
LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""A smaller one is greedy, as is 0: float32 cannot divide by it."""
_THRESHOLD_BITS = 32
"""How finely a threshold is found."""
_LEAST_SCORE = -88.0
"""Tokens below are never drawn: exp of it is 0 in float32."""
_MOST_SCORE = 1e-6
"""Above every score."""
_SHARE = 1 - 2e-6
"""Of top_p's mass and of min_p is enough. A sum's rounding differs with the number of rows, and would otherwise decide where a
token ends just the mass that was asked for: the same row would be cut differently in another batch."""


class SamplingMode(enum.Enum):
    """What a batch of rows needs; each mode is a program of its own."""

    GREEDY = "greedy"
    RANDOM = "random"
    LOGPROBS = "logprobs"


DRAW_COLUMNS = 8 + MAX_BANNED
"""Columns of a row of draws, int32: slot, position of the token to draw, seed (low word, high word), top_k (0: all), the bits
of three float32 (temperature, below LEAST_TEMPERATURE: greedy; top_p; min_p), banned ids (-1: none)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """Tokens `[rows]` int32 and, in LOGPROBS mode, the chosen one's log-probability and the `MAX_LOGPROBS` best."""

    tokens: jax.Array
    logprobs: jax.Array | None = None
    top_tokens: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def sample(logits: jax.Array, draws: jax.Array, mode: SamplingMode, guesses: int = 1) -> Sampled:
    """Draws one token a row from `logits [rows, vocab]`. Log-probabilities are the model's, before temperature and bans.

    Args:
        draws: `[rows, DRAW_COLUMNS]` int32.
        guesses: thresholds that top-k and top-p try in one pass over the vocabulary. A CPU is bound by the comparisons, so
            1; a GPU by the number of passes.
    """
    draws = jnp.asarray(draws)
    largest = jnp.finfo(jnp.float32).max
    logits = jnp.nan_to_num(logits.astype(jnp.float32), nan=-jnp.inf, posinf=largest, neginf=-jnp.inf)
    allowed = _without_banned(logits, draws[:, 8:])
    tokens = jnp.argmax(allowed, -1).astype(jnp.int32)
    if mode is SamplingMode.GREEDY:
        return Sampled(tokens=tokens)
    tokens = _draw(_gaps_to_best(allowed), draws, guesses, tokens)
    if mode is SamplingMode.RANDOM:
        return Sampled(tokens=tokens)
    logprobs = jnp.maximum(jax.nn.log_softmax(_gaps_to_best(logits), -1), LEAST_LOGPROB)
    top_logprobs, top_tokens = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], -1)[:, 0]
    return Sampled(tokens=tokens, logprobs=chosen, top_tokens=top_tokens, top_logprobs=top_logprobs)


def _without_banned(logits: jax.Array, banned: jax.Array) -> jax.Array:
    """`logits` with -inf for the ids `banned [rows, MAX_BANNED]`; as they are in rows that would have nothing left."""
    rows = jnp.arange(logits.shape[0])[:, None]
    allowed = logits.at[rows, jnp.where(banned < 0, logits.shape[1], banned)].set(-jnp.inf, mode="drop")
    return jnp.where(allowed.max(-1, keepdims=True) > -jnp.inf, allowed, logits)


def _gaps_to_best(logits: jax.Array) -> jax.Array:
    """How far each is below the row's largest: 0 for that one, also where all are -inf."""
    best = logits.max(-1, keepdims=True)
    return jnp.where(logits == best, 0.0, logits - best)


def _draw(gaps: jax.Array, draws: jax.Array, guesses: int, best: jax.Array) -> jax.Array:
    """Gumbel-max over what top-k, top-p and min-p leave; `best` in rows that are greedy."""
    temperature, top_p, min_p = lax.bitcast_convert_type(draws[:, 5:8], jnp.float32).T
    random = temperature >= LEAST_TEMPERATURE
    scores = gaps * (1 / jnp.where(random, temperature, 1.0))[:, None]  # at most 0; the best token has 0
    weights = jnp.exp(scores)
    scores = jnp.where((scores > _LEAST_SCORE) & (weights >= _SHARE * min_p[:, None]), scores, -jnp.inf)
    keep = scores >= _threshold(scores, draws[:, 4], top_p, guesses)[:, None]

    def gumbel(row: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(row[2:4].astype(jnp.uint32), impl="threefry2x32")  # the 64 bits of the seed
        return jax.random.gumbel(jax.random.fold_in(key, row[1]), gaps.shape[1:], jnp.float32)

    noisy = jnp.where(keep, scores, -jnp.inf) + jax.vmap(gumbel)(draws)
    return jnp.where(random, jnp.argmax(noisy, -1).astype(jnp.int32), best)


def _threshold(scores: jax.Array, top_k: jax.Array, top_p: jax.Array, guesses: int) -> jax.Array:
    """The largest score `[rows]`, at most 0, at or above which at least top_k tokens and a share top_p of the mass lie.

    Ties at the threshold are all kept, as Hugging Face does. top_p applies to what min_p and top_k left (vLLM's order).
    """

    def search(amount: jax.Array, least: jax.Array) -> jax.Array:
        """The largest threshold at or above which scores lie whose amounts sum to at least `least`."""
        low = jnp.full(scores.shape[0], _LEAST_SCORE)
        rounds = math.ceil(_THRESHOLD_BITS / math.log2(guesses + 1))
        high = jnp.full_like(low, _MOST_SCORE)
        if guesses == 1:
            low, _ = lax.fori_loop(0, rounds, lambda _, bounds: _narrow(scores, amount, least, *bounds, 1), (low, high))
            return low
        for _ in range(rounds):  # a GPU would wait for the host in each round of a loop
            low, high = _narrow(scores, amount, least, low, high, guesses)
        return low

    low_k = jnp.where(top_k > 0, search(jnp.ones_like(scores), top_k.astype(jnp.float32)), _LEAST_SCORE)
    remaining = jnp.where(scores >= low_k[:, None], jnp.exp(scores), 0.0)
    low_p = search(remaining, _SHARE * top_p * remaining.sum(-1))
    return jnp.minimum(jnp.maximum(low_k, jnp.where(top_p < 1, low_p, _LEAST_SCORE)), 0.0)


@functools.partial(jax.jit, static_argnums=5)  # lowered once for all rounds; XLA inlines it
def _narrow(
    scores: jax.Array, amount: jax.Array, least: jax.Array, low: jax.Array, high: jax.Array, guesses: int
) -> tuple[jax.Array, jax.Array]:
    """One round of a search between `low` and `high`, which it cuts in `guesses` places."""
    cuts = [low + (high - low) * (i / (guesses + 1)) for i in range(1, guesses + 1)]
    nothing = lax.full_like(amount, 0.0)
    above = [lax.ge(scores, lax.broadcast_in_dim(cut, scores.shape, (0,))) for cut in cuts]
    for cut, total in zip(cuts, _sums([lax.select(mask, amount, nothing) for mask in above])):
        enough = lax.ge(total, least)
        low, high = lax.select(enough, lax.max(low, cut), low), lax.select(enough, high, lax.min(high, cut))
    return low, high


def _sums(arrays: list[jax.Array]) -> Sequence[jax.Array]:
    """Row sums of arrays that are made from one another, in one pass: XLA does not join separate reductions of this kind."""
    zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)
    return lax.reduce(tuple(arrays), zeros, lambda xs, ys: tuple(x + y for x, y in zip(xs, ys)), dimensions=(1,))
