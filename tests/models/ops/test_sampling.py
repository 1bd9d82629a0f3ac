from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.ops.sampling import SamplingMode, sample
from chameleon_jax.models.runtime.step_inputs import SamplingRow, pack_sampling_rows

VOCAB = 64
compiled = jax.jit(sample, static_argnums=(2, 3))
LOGITS = jnp.array(np.random.default_rng(0).standard_normal((4, VOCAB)) * 2, jnp.float32)


def sampling_row(**fields) -> SamplingRow:
    defaults = dict(slot=0, position=7, seed=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, suppressed=(), logprobs=False)
    return SamplingRow(**(defaults | fields))


def counts(logits, draws: int, **fields) -> np.ndarray:
    """Count how often each token is drawn over many positions."""
    rows, mode = pack_sampling_rows([sampling_row(position=i, **fields) for i in range(draws)], draws, 0)
    logits = jnp.broadcast_to(logits, (draws, VOCAB))
    tokens, again = (compiled(logits, rows, mode, guesses).tokens for guesses in (1, 7))
    np.testing.assert_array_equal(tokens, again)
    return np.bincount(np.asarray(tokens), minlength=VOCAB)


def test_draws_follow_the_distribution():
    p = np.asarray(jax.nn.softmax(LOGITS[0] / 0.8))
    observed = counts(LOGITS[0], 20_000, temperature=0.8)
    assert np.abs(observed / 20_000 - p).max() < 0.015


@pytest.mark.parametrize("top_k", [1, 5, 63])
def test_top_k_keeps_exactly_the_best(top_k):
    best = set(np.argsort(-np.asarray(LOGITS[0]))[:top_k].tolist())
    drawn = set(np.flatnonzero(counts(LOGITS[0], 5_000, top_k=top_k, temperature=3.0)).tolist())
    assert drawn <= best and (top_k > 10 or drawn == best)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p_keeps_the_smallest_set_that_has_the_mass(top_p):
    p = np.asarray(jax.nn.softmax(LOGITS[1]))
    order = np.argsort(-p)
    kept = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    drawn = set(np.flatnonzero(counts(LOGITS[1], 5_000, top_p=top_p)).tolist())
    assert drawn <= set(kept.tolist()) and kept[0] in drawn


def test_a_top_p_below_float32_keeps_the_best():
    assert np.flatnonzero(counts(LOGITS[1], 500, top_p=1e-46)).tolist() == [int(LOGITS[1].argmax())]


def test_min_p_keeps_tokens_near_the_best():
    p = np.asarray(jax.nn.softmax(LOGITS[2]))
    drawn = np.flatnonzero(counts(LOGITS[2], 5_000, min_p=0.3))
    assert (p[drawn] >= 0.3 * p.max() * (1 - 1e-5)).all()


def test_min_p_comes_before_top_p():
    p = jnp.log(jnp.array([0.4, 0.3, 0.1, 0.1, 0.1] + [1e-9] * (VOCAB - 5)))
    assert np.flatnonzero(counts(p, 2_000, min_p=0.5, top_p=0.5)).tolist() == [0]  # 0.4 of the mass that min_p left is 0.57


def kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """List the tokens that may be drawn, in float64 and by sorting; ties at each cut stay."""
    p = np.exp((logits - logits.max()) / temperature)
    p[p < min_p * (1 - 1e-5)] = 0
    if top_k > 0:
        p[p < np.sort(p)[-min(top_k, len(p))] * (1 - 1e-5)] = 0
    best_first = np.sort(p)[::-1]
    enough = np.searchsorted(best_first.cumsum(), top_p * p.sum() * (1 - 1e-5))
    return set(np.flatnonzero((p > 0) & (p >= best_first[enough] * (1 - 1e-5))).tolist())


def test_drawn_tokens_are_kept_by_a_plain_reference():
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((400, VOCAB)) * rng.choice([0.1, 2, 20], (400, 1))).astype(np.float32)
    cuts = [
        dict(
            temperature=float(rng.choice([1e-3, 0.3, 1, 5, 100])),
            top_k=int(rng.choice([-1, 0, 1, 2, 7, 63, 64, 65])),
            top_p=float(rng.choice([1e-9, 0.1, 0.5, 0.9, 0.999, 1])),
            min_p=float(rng.choice([0, 1e-6, 0.05, 0.5, 1])),
        )
        for _ in logits
    ]
    rows, mode = pack_sampling_rows([sampling_row(position=i, **cut) for i, cut in enumerate(cuts)], len(cuts), 0)
    for guesses in (1, 7):
        tokens = np.asarray(compiled(logits, rows, mode, guesses).tokens)
        for row, token, cut in zip(logits, tokens.tolist(), cuts):
            assert token in kept(row.astype(np.float64), **cut), cut


def test_rows_do_not_depend_on_their_neighbours():
    rows, mode = pack_sampling_rows(
        [sampling_row(seed=i, position=40 + i, temperature=[0, 1, 2, 0.5][i]) for i in range(4)], 4, 9
    )
    together = compiled(LOGITS, rows, mode).tokens
    for i in range(4):
        one, _ = pack_sampling_rows([sampling_row(seed=i, position=40 + i, temperature=[0, 1, 2, 0.5][i])], 1, 9)
        assert int(compiled(LOGITS[i : i + 1], one, SamplingMode.RANDOM).tokens[0]) == int(together[i])
    assert int(together[0]) == int(LOGITS[0].argmax())


def test_64_bit_seeds_and_positions_differ():
    seeds = [0, 1, 1 << 32, (1 << 32) + 1, (1 << 63) + 5]
    rows, mode = pack_sampling_rows([sampling_row(seed=s, temperature=5.0) for i, s in enumerate(seeds)], len(seeds), 0)
    noise = [tuple(rows[i, 2:4]) for i in range(len(seeds))]
    assert len(set(noise)) == len(seeds) and mode is SamplingMode.RANDOM


def test_suppressed_ids_are_never_chosen_but_keep_their_logprob():
    best = int(LOGITS[0].argmax())
    rows, mode = pack_sampling_rows([sampling_row(temperature=0, suppressed=(best,), logprobs=True)], 1, 0)
    result = sample(LOGITS[:1], rows, mode)
    logprobs = jax.nn.log_softmax(LOGITS[0])
    assert int(result.tokens[0]) == int(np.argsort(-np.asarray(LOGITS[0]))[1])
    np.testing.assert_allclose(result.logprobs[0], logprobs[int(result.tokens[0])], rtol=1e-6)
    assert int(result.top_tokens[0, 0]) == best
