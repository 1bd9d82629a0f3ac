"""Penalties, biases and masks against the same rules in NumPy, and the counts of tokens that penalties need."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.ops.sampling import (
    OUTPUT_COUNT,
    Sampled,
    SamplingMode,
    count_tokens,
    mask_of,
    mask_words,
    sample,
    sample_adjusted,
)
from chameleon_jax.models.runtime.step_inputs import Adjustment, SamplingRow, pack_adjustments, pack_counts, pack_sampling_rows

RNG = np.random.default_rng(0)
SLOTS = 4
NOTHING = Adjustment(0.0, 0.0, 1.0, {})


@functools.cache
def program(mode: SamplingMode, guesses: int = 1):
    return jax.jit(functools.partial(sample_adjusted, mode=mode, guesses=guesses))


def sampling_row(slot: int = 0, **fields) -> SamplingRow:
    defaults = dict(position=7, seed=1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, suppressed=(), logprobs=False)
    return SamplingRow(slot=slot, **(defaults | fields))


def no_masks(rows: int, vocab: int) -> np.ndarray:
    return np.full((rows, mask_words(vocab)), -1, np.int32)


def run(logits, sampling_rows, counts=None, masks=None, mode=SamplingMode.GREEDY, guesses=1) -> tuple[Sampled, np.ndarray]:
    logits = np.asarray(logits, np.float32)
    rows, vocab = logits.shape
    packed, _ = pack_sampling_rows(sampling_rows, rows, SLOTS)
    counts = np.zeros((SLOTS + 1, vocab), np.uint16) if counts is None else counts
    adjustments = pack_adjustments(sampling_rows, no_masks(0, vocab) if masks is None else masks, rows)
    sampled, counts = program(mode, guesses)(jnp.asarray(logits), jnp.asarray(packed), jnp.asarray(adjustments), counts)
    return jax.tree.map(np.asarray, sampled), np.asarray(counts)


def adjusted(logits: np.ndarray, adjustment: Adjustment, prompt: set[int], output: list[int]) -> np.ndarray:
    """Apply the rules of vLLM one token at a time."""
    logits = logits.astype(np.float64).copy()
    for token in range(len(logits)):
        if token in prompt or token in output:
            logits[token] *= 1 / adjustment.repetition if logits[token] > 0 else adjustment.repetition
        logits[token] -= adjustment.frequency * output.count(token) + adjustment.presence * (token in output)
        logits[token] += adjustment.bias.get(token, 0.0)
    return logits


@pytest.mark.parametrize("vocab", [40, 64, 257])
def test_the_best_token_is_that_of_the_rules(vocab):
    cases = [
        Adjustment(1.5, 0.0, 1.0, {}),
        Adjustment(-2.0, 0.0, 1.0, {}),
        Adjustment(0.0, 0.7, 1.0, {}),
        Adjustment(0.0, 0.0, 1.8, {}),
        Adjustment(0.0, 0.0, 0.4, {}),
        Adjustment(0.0, 0.0, 1.0, {0: 3.0, vocab - 1: -100.0, 5: 100.0}),
        Adjustment(0.3, -0.4, 1.2, {3: 0.5}),
        NOTHING,
    ]
    for case in cases:
        logits = RNG.standard_normal((SLOTS, vocab)).astype(np.float32)
        counts = np.zeros((SLOTS + 1, vocab), np.uint16)
        best = []
        for slot in range(SLOTS):
            prompt, output = set(RNG.integers(0, vocab, 9).tolist()), RNG.integers(0, vocab, 12).tolist() * 2
            for packed in pack_counts(slot, sorted(prompt), output, vocab, 16):
                counts = np.asarray(jax.jit(count_tokens)(counts, packed))
            best.append(int(np.argmax(adjusted(logits[slot], case, prompt, output))))
        rows = [sampling_row(slot, adjustment=case) for slot in range(SLOTS)]
        sampled, after = run(logits, rows, counts)
        assert sampled.tokens.tolist() == best, case
        more = after.astype(int) - counts
        assert all(more[slot, token] == 1 for slot, token in enumerate(best)) and more.sum() == SLOTS


@pytest.mark.parametrize("vocab", [40, 64, 257])
@pytest.mark.parametrize("mode", [SamplingMode.GREEDY, SamplingMode.LOGPROBS])
def test_a_masked_token_is_never_drawn(vocab, mode):
    allowed = [sorted(RNG.choice(vocab, size, replace=False).tolist()) for size in (1, 2, 7, vocab)]
    logits = RNG.standard_normal((len(allowed), vocab))
    masks = np.stack([mask_of(ids, vocab) for ids in allowed])
    for seed in range(8):
        rows = [sampling_row(i, seed=seed, temperature=5.0 * (mode is not SamplingMode.GREEDY)) for i in range(len(allowed))]
        tokens = run(logits, rows, masks=masks, mode=mode)[0].tokens
        assert all(token in ids for token, ids in zip(tokens.tolist(), allowed))
        if mode is SamplingMode.GREEDY:
            assert tokens.tolist() == [max(ids, key=lambda t, i=i: logits[i, t]) for i, ids in enumerate(allowed)]


def test_a_suppressed_id_that_alone_is_allowed_is_drawn():
    masks = mask_of([3], 40)[None]
    assert run(RNG.standard_normal((1, 40)), [sampling_row(suppressed=(3,))], masks=masks)[0].tokens.tolist() == [3]


@pytest.mark.parametrize("mode", list(SamplingMode))
@pytest.mark.parametrize("guesses", [1, 7])
def test_a_row_that_adjusts_nothing_is_sampled_as_without(mode, guesses):
    vocab = 257
    logits = (RNG.standard_normal((SLOTS, vocab)) * 3).astype(np.float32)
    rows = [sampling_row(slot, temperature=0.9, top_k=40, top_p=0.8, seed=slot, logprobs=True) for slot in range(3)]
    rows.append(sampling_row(3, adjustment=Adjustment(2.0, 2.0, 2.0, {1: 100.0})))
    counts = RNG.integers(0, 1 << 16, (SLOTS + 1, vocab)).astype(np.uint16)  # of requests that are gone
    sampled, _ = run(logits, rows, counts, mode=mode, guesses=guesses)
    packed, _ = pack_sampling_rows(rows, SLOTS, SLOTS)
    plain = jax.jit(lambda logits, rows: sample(logits, rows, mode, guesses))(logits, packed)
    np.testing.assert_array_equal(sampled.tokens[:3], np.asarray(plain.tokens)[:3])
    if mode is SamplingMode.LOGPROBS:
        np.testing.assert_allclose(sampled.top_logprobs, plain.top_logprobs, rtol=1e-6)  # the model's, in every row


def test_counts_hold_a_prompt_apart_from_the_output_and_do_not_overflow():
    vocab = 40
    counts = np.full((SLOTS + 1, vocab), 9, np.uint16)
    counts[2, 1] = OUTPUT_COUNT
    for packed in pack_counts(1, [3, 3, 5], [5, 5, 6] * 30, vocab, 16):
        counts = np.asarray(jax.jit(count_tokens)(counts, packed))
    expected = np.zeros(vocab, int)
    expected[[3, 5]] = OUTPUT_COUNT + 1
    expected[5] += 60
    expected[6] += 30
    assert counts[1].tolist() == expected.tolist() and (counts[0] == 9).all() and (counts[3] == 9).all()
    _, after = run(np.eye(vocab)[None, 1], [sampling_row(2, adjustment=NOTHING)], counts)
    assert after[2, 1] == OUTPUT_COUNT


def test_a_slot_without_tokens_is_counted_as_empty():
    counts = np.full((SLOTS + 1, 40), 9, np.uint16)
    (packed,) = pack_counts(1, [], [], 40, 16)
    assert not np.asarray(jax.jit(count_tokens)(counts, packed))[1].any()
