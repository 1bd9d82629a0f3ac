"""Sampling of the next token: vectorised over rows, each with its own parameters.

A row's random numbers come from its seed and the token's position alone, so its text does not depend on how it was batched,
chunked or recomputed. Top-k and top-p cut at a threshold found by bisection, without sorting the vocabulary.

The best token always stays a candidate: logits are taken as gaps to the largest, which is exactly 0 for the best one, and no
threshold is above 0. A logit that is NaN counts as -inf. Suppressed ids that would leave no candidate are ignored.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from chameleon_jax.outputs import LEAST_LOGPROB
from chameleon_jax.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROBS, MAX_STOP_IDS

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, UInt16

    from chameleon_jax.models.ops.shapes import Logits, RowFloats, RowInts, TokenCounts

LEAST_TEMPERATURE = float(np.finfo(np.float32).tiny)
"""Smallest temperature that is not greedy: float32 cannot divide by a smaller one."""
_THRESHOLD_BITS = 32
"""Precision of a threshold: halvings of the interval that holds it."""
_LEAST_SCORE = -88.0
"""Lowest score that can be drawn: exp of it is 0 in float32."""
_MOST_SCORE = 1e-6
"""Upper end of the search for a threshold, above every score."""
_SHARE = 1 - 2e-6
"""Share of top_p's mass, and of min_p, that is enough. The rounding of a sum differs with the number of rows. Without this
margin it would decide where a token ends exactly the mass asked for: the same row would be cut differently in another batch."""


class SamplingMode(enum.IntEnum):
    """Kind of sampling that a batch of rows needs, each a program of its own. A mode can stand in for those before it."""

    GREEDY = 0
    RANDOM = 1
    LOGPROBS = 2


SAMPLING_COLUMNS = 8 + MAX_STOP_IDS
"""Columns of packed sampling rows, int32: slot, position of the token to sample, seed (low word, high word), top_k (0: all),
the bits of three float32 (temperature, greedy below LEAST_TEMPERATURE; top_p; min_p), suppressed ids (-1: none)."""

ADJUSTMENT_COLUMNS = 3 + 2 * MAX_LOGIT_BIAS
"""Columns of packed adjustments ahead of the mask, int32: the bits of three float32 (presence, frequency and repetition
penalty), the ids that have a bias (-1: none), the bits of the biases, float32. The mask follows: a bit for each token, 32 in a
column, the lowest bit first; a token whose bit is 0 cannot be drawn."""
OUTPUT_COUNT = (1 << 15) - 1
"""Bits of a token's count that say how often a slot's output has it, and the largest count. The bit above says whether the
prompt has the token."""


def mask_words(vocab_size: int) -> int:
    """Count the columns of a mask."""
    return -(-vocab_size // 32)


def mask_of(token_ids: Sequence[int], vocab_size: int) -> Int[np.ndarray, " words"]:
    """Make a mask that allows these tokens alone."""
    allowed = np.zeros(32 * mask_words(vocab_size), np.uint8)
    allowed[list(token_ids)] = 1
    return np.packbits(allowed, bitorder="little").view("<i4")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """Sampled tokens and, in LOGPROBS mode, the log-probabilities of each token and of the `MAX_LOGPROBS` best."""

    tokens: RowInts
    logprobs: RowFloats | None = None
    top_tokens: Int[Array, "rows best"] | None = None
    top_logprobs: Float[Array, "rows best"] | None = None


def sample(
    logits: Logits, sampling_rows: Int[Array | np.ndarray, "rows columns"], mode: SamplingMode, guesses: int = 1
) -> Sampled:
    """Draw one token a row.

    Log-probabilities are the model's, before temperature and suppressed ids.

    Args:
        logits: Floats of any width; computed with in float32.
        sampling_rows: Packed parameters, int32, of SAMPLING_COLUMNS columns.
        mode: Kind of sampling that the rows need together.
        guesses: Thresholds that top-k and top-p try in one pass over the vocabulary. A CPU is bound by the comparisons, so 1
            is best there; a GPU is bound by the number of passes.
    """
    logits = _finite(logits)
    return _sample(logits, logits, jnp.asarray(sampling_rows), mode, guesses)


def sample_adjusted(
    logits: Logits,
    sampling_rows: Int[Array, "rows columns"],
    adjustments: Int[Array, "rows _"],
    counts: TokenCounts,
    mode: SamplingMode,
    guesses: int = 1,
) -> tuple[Sampled, TokenCounts]:
    """Draw one token a row after penalties, biases and masks have changed the logits, and count it.

    A row that adjusts nothing gets the token that `sample` draws. Log-probabilities are the model's, before all that.

    Args:
        logits: As for `sample`, here and below.
        sampling_rows: Packed parameters.
        adjustments: Packed adjustments and masks, int32, as ADJUSTMENT_COLUMNS says.
        counts: Tokens of each slot, as OUTPUT_COUNT says.
        mode: Kind of sampling.
        guesses: Thresholds tried in one pass.
    """
    slots = sampling_rows[:, 0]
    logits = _finite(logits)
    own = counts.at[slots].get(mode="clip")
    adjusted = _mask(_bias(_penalise(logits, own, adjustments), adjustments), adjustments)
    sampled = _sample(logits, adjusted, sampling_rows, mode, guesses)
    drawn = jnp.take_along_axis(own, sampled.tokens[:, None], -1)[:, 0]
    more = jnp.where(drawn & OUTPUT_COUNT == OUTPUT_COUNT, drawn, drawn + 1)
    return sampled, counts.at[slots, sampled.tokens].set(more)


def _sample(
    logits: Logits, adjusted: Logits, sampling_rows: Int[Array, "rows columns"], mode: SamplingMode, guesses: int
) -> Sampled:
    """Draw from `adjusted`, and report the log-probabilities of `logits`."""
    allowed = _without_suppressed(adjusted, sampling_rows[:, 8:])
    tokens = jnp.argmax(allowed, -1).astype(jnp.int32)
    if mode is SamplingMode.GREEDY:
        return Sampled(tokens=tokens)
    tokens = _draw(_gaps_to_best(allowed), sampling_rows, guesses, tokens)
    if mode is SamplingMode.RANDOM:
        return Sampled(tokens=tokens)
    return _with_logprobs(logits, tokens)


def score(logits: Logits, tokens: RowInts) -> Sampled:
    """Compute the log-probabilities of given tokens, one a row, and of the best ones, as LOGPROBS mode does.

    Args:
        logits: Floats of any width; computed with in float32.
        tokens: Token ids below the vocabulary's size; int32.
    """
    return _with_logprobs(_finite(logits), tokens)


def _with_logprobs(logits: Logits, tokens: RowInts) -> Sampled:
    logprobs = jnp.maximum(jax.nn.log_softmax(_gaps_to_best(logits), -1), LEAST_LOGPROB)
    top_logprobs, top_tokens = lax.top_k(logprobs, min(MAX_LOGPROBS, logits.shape[1]))
    chosen = jnp.take_along_axis(logprobs, tokens[:, None], -1)[:, 0]
    return Sampled(tokens=tokens, logprobs=chosen, top_tokens=top_tokens, top_logprobs=top_logprobs)


def count_tokens(counts: TokenCounts, packed: Int[Array, " packed"]) -> TokenCounts:
    """Count tokens of one slot.

    Args:
        counts: Tokens of each slot, as OUTPUT_COUNT says.
        packed: The slot, 1 where its earlier tokens are forgotten first, and the tokens: a prompt's ids, an output's ids plus
            the size of the vocabulary, twice that size as padding.
    """
    vocab = counts.shape[1]
    slot, forget = packed[0], packed[1]
    new = jnp.zeros(2 * vocab, jnp.int32).at[packed[2:]].add(1, mode="drop")
    old = jnp.where(forget > 0, 0, counts.at[slot].get(mode="clip").astype(jnp.int32))
    outputs = jnp.minimum((old & OUTPUT_COUNT) + new[vocab:], OUTPUT_COUNT)
    in_prompt = (old > OUTPUT_COUNT) | (new[:vocab] > 0)
    return counts.at[slot].set((outputs + jnp.where(in_prompt, OUTPUT_COUNT + 1, 0)).astype(counts.dtype))


def _finite(logits: Logits) -> Logits:
    """Widen to float32, with NaN as -inf and inf as the largest number."""
    largest = jnp.finfo(jnp.float32).max
    return jnp.nan_to_num(logits.astype(jnp.float32), nan=-jnp.inf, posinf=largest, neginf=-jnp.inf)


def _penalise(logits: Logits, counts: UInt16[Array, "rows vocab"], adjustments: Int[Array, "rows _"]) -> Logits:
    """Apply the penalties, in vLLM's order: repetition, frequency, presence."""
    presence, frequency, repetition = lax.bitcast_convert_type(adjustments[:, :3], jnp.float32).T[:, :, None]
    outputs = (counts & OUTPUT_COUNT).astype(jnp.float32)
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts > 0, repeated, logits)
    return logits - frequency * outputs - jnp.where(outputs > 0, presence, 0.0)


def _bias(logits: Logits, adjustments: Int[Array, "rows _"]) -> Logits:
    ids, bits = jnp.split(adjustments[:, 3:ADJUSTMENT_COLUMNS], 2, axis=1)
    rows = jnp.arange(len(ids))[:, None]
    return logits.at[rows, jnp.where(ids < 0, logits.shape[1], ids)].add(
        lax.bitcast_convert_type(bits, jnp.float32), mode="drop"
    )


def _mask(logits: Logits, adjustments: Int[Array, "rows _"]) -> Logits:
    words = adjustments[:, ADJUSTMENT_COLUMNS:, None]
    allowed = lax.shift_right_logical(words, jnp.broadcast_to(jnp.arange(32), (*words.shape[:2], 32))) & 1
    return jnp.where(allowed.reshape(len(logits), -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)


def _without_suppressed(logits: Logits, suppressed: Int[Array, "rows _"]) -> Logits:
    """Set the logits of suppressed ids to -inf, except in rows that would have no candidate left."""
    rows = jnp.arange(logits.shape[0])[:, None]
    allowed = logits.at[rows, jnp.where(suppressed < 0, logits.shape[1], suppressed)].set(-jnp.inf, mode="drop")
    return jnp.where(allowed.max(-1, keepdims=True) > -jnp.inf, allowed, logits)


def _gaps_to_best(logits: Logits) -> Logits:
    """Subtract each row's largest logit. The largest itself gives 0, even where all are -inf."""
    best = logits.max(-1, keepdims=True)
    return jnp.where(logits == best, 0.0, logits - best)


def _draw(gaps: Logits, sampling_rows: Int[Array, "rows columns"], guesses: int, best: RowInts) -> RowInts:
    """Draw by Gumbel-max from the tokens that top-k, top-p and min-p leave. Greedy rows take `best`."""
    temperature, top_p, min_p = lax.bitcast_convert_type(sampling_rows[:, 5:8], jnp.float32).T
    random = temperature >= LEAST_TEMPERATURE
    scores = gaps * (1 / jnp.where(random, temperature, 1.0))[:, None]  # at most 0; the best token has 0
    weights = jnp.exp(scores)
    scores = jnp.where((scores > _LEAST_SCORE) & (weights >= _SHARE * min_p[:, None]), scores, -jnp.inf)
    keep = scores >= _threshold(scores, sampling_rows[:, 4], top_p, guesses)[:, None]

    def gumbel(row: Int[Array, " columns"]) -> Float[Array, " vocab"]:
        key = jax.random.wrap_key_data(row[2:4].astype(jnp.uint32), impl="threefry2x32")  # the 64 bits of the seed
        return jax.random.gumbel(jax.random.fold_in(key, row[1]), gaps.shape[1:], jnp.float32)

    noisy = jnp.where(keep, scores, -jnp.inf) + jax.vmap(gumbel)(sampling_rows)
    return jnp.where(random, jnp.argmax(noisy, -1).astype(jnp.int32), best)


def _threshold(scores: Logits, top_k: RowInts, top_p: RowFloats, guesses: int) -> RowFloats:
    """Find each row's largest score, at most 0, that top_k tokens and a share top_p of the mass reach.

    Ties at the threshold are all kept, as Hugging Face does. top_p applies to the tokens that min_p and top_k left (vLLM's
    order).
    """

    def search(amount: Logits, least: RowFloats) -> RowFloats:
        """Find the largest threshold where the amounts of the scores that reach it sum to at least `least`."""
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
    scores: Logits, amount: Logits, least: RowFloats, low: RowFloats, high: RowFloats, guesses: int
) -> tuple[RowFloats, RowFloats]:
    """Cut the interval from `low` to `high` in `guesses` places and keep the part that holds the threshold."""
    cuts = [low + (high - low) * (i / (guesses + 1)) for i in range(1, guesses + 1)]
    nothing = lax.full_like(amount, 0.0)
    above = [lax.ge(scores, lax.broadcast_in_dim(cut, scores.shape, (0,))) for cut in cuts]
    for cut, total in zip(cuts, _sums([lax.select(mask, amount, nothing) for mask in above])):
        enough = lax.ge(total, least)
        low, high = lax.select(enough, lax.max(low, cut), low), lax.select(enough, high, lax.min(high, cut))
    return low, high


def _sums(arrays: list[Logits]) -> Sequence[RowFloats]:
    """Sum the rows of several arrays in one pass. XLA does not join separate reductions of this kind."""
    zeros = tuple(jnp.zeros((), a.dtype) for a in arrays)
    return lax.reduce(tuple(arrays), zeros, lambda xs, ys: tuple(x + y for x, y in zip(xs, ys)), dimensions=(1,))
