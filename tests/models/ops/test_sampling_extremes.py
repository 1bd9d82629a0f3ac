"""Sampling with extreme parameters and logits: a row gets a token that may be drawn, and the same one in every batch."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.ops.sampling import Sampled, SamplingMode, sample
from chameleon_jax.models.runtime.step_inputs import SamplingRow, pack_sampling_rows

INF, NAN, HUGE = float("inf"), float("nan"), 3e38
TINY = float(np.finfo(np.float32).tiny)
TEMPERATURES = [0.0, 1e-300, 1e-45, 1e-40, 1.2e-38, 1e-30, 1e-9, 1e-5, 0.01, 1.0, 100.0]
TOP_PS = [1e-300, 1e-45, 1e-9, 0.5, 1 - 1e-9, 1.0]
TOP_KS = [-1, 0, 1, 2, 63, 2**31 - 1]
MIN_PS = [0.0, 1e-300, 1e-45, 0.5, 1.0]
SEEDS = [-(2**63), -1, 0, 2**63, 2**64 - 1]
RNG = np.random.default_rng(0)


@functools.cache
def program(mode: SamplingMode, guesses: int):
    return jax.jit(lambda logits, rows: sample(logits, rows, mode, guesses))


def sampling_row(**fields) -> SamplingRow:
    defaults = dict(slot=0, position=7, seed=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, suppressed=(), logprobs=False)
    return SamplingRow(**(defaults | fields))


def run(logits: np.ndarray, sampling_rows: list[SamplingRow], mode: SamplingMode, guesses: int = 1) -> Sampled:
    rows, _ = pack_sampling_rows(sampling_rows, len(sampling_rows), 0)
    return jax.tree.map(np.asarray, program(mode, guesses)(jnp.asarray(logits), rows))


def make_logits(vocab: int) -> dict[str, np.ndarray]:
    """Make a row of each kind."""
    drawn = RNG.standard_normal(vocab) * 3
    one = np.full(vocab, -INF)
    one[vocab // 2] = 1.0
    mixed = np.where(np.arange(vocab) % 3 == 1, NAN, drawn)
    kinds = {
        "drawn": drawn,
        "huge": drawn * 1e37,
        "close": 1e-4 * drawn,
        "equal": np.full(vocab, 2.5),
        "all but one -inf": one,
        "all -inf": np.full(vocab, -INF),
        "both ends": np.where(drawn > 3, HUGE, -HUGE),
        "low": np.full(vocab, -HUGE),
        "high": np.full(vocab, HUGE),
        "an inf": np.where(np.arange(vocab) == 3, INF, drawn),
        "some NaN": mixed,
        "NaN and -inf": np.where(np.arange(vocab) % 2 == 0, NAN, -INF),
        "NaN": np.full(vocab, NAN),
    }
    return {name: row.astype(np.float32) for name, row in kinds.items()}


def best_of(logits: np.ndarray, suppressed=()) -> set[int]:
    """Find the tokens that share the largest logit. NaN is no logit, and suppressed ids that leave no token are ignored."""
    numbers = np.where(np.isnan(logits), -np.inf, logits)
    allowed = numbers.copy()
    allowed[list(suppressed)] = -np.inf
    allowed = allowed if (allowed > -np.inf).any() else numbers
    return set(np.flatnonzero(allowed == allowed.max()).tolist())


def every_sampling_row() -> list[SamplingRow]:
    """Set each parameter to its extremes: alone with each temperature, and many together."""
    one = [dict(temperature=t) for t in TEMPERATURES]
    one += [dict(temperature=t, **{f: v}) for t in TEMPERATURES for f, vs in FIELDS.items() for v in vs]
    several = [dict(zip(("temperature", *FIELDS), values)) for values in itertools.product(TEMPERATURES, *FIELDS.values())]
    picks = RNG.choice(len(several), 150, replace=False)
    return [sampling_row(position=i, **fields) for i, fields in enumerate(one + [several[i] for i in picks])]


FIELDS: dict[str, Any] = {"top_p": TOP_PS, "top_k": TOP_KS, "min_p": MIN_PS, "seed": SEEDS}
SAMPLING_ROWS = every_sampling_row()


@pytest.mark.parametrize(("vocab", "dtype"), [(64, jnp.float32), (257, jnp.bfloat16)])
def test_a_token_that_may_be_drawn_is_drawn(vocab, dtype):
    for name, row in make_logits(vocab).items():
        row = np.asarray(jnp.asarray(row, dtype))
        tokens = run(np.tile(row, (len(SAMPLING_ROWS), 1)), SAMPLING_ROWS, SamplingMode.RANDOM).tokens
        assert ((tokens >= 0) & (tokens < vocab)).all(), name
        numbers = row.astype(np.float32)[tokens]
        if not (np.isnan(row) | (row == -np.inf)).all():
            assert not np.isnan(numbers).any() and (numbers > -np.inf).all(), name
        best = best_of(row.astype(np.float32))
        for draw, token in zip(SAMPLING_ROWS, tokens.tolist()):
            if draw.temperature < TINY or draw.top_k == 1:
                assert token == min(best), (name, draw)
            elif name != "close" and (draw.temperature <= 1e-9 or draw.top_p <= 1e-9 or draw.min_p == 1.0):
                assert token in best, (name, draw)


@pytest.mark.parametrize(("vocab", "dtype", "guesses"), [(64, jnp.bfloat16, 1), (257, jnp.float32, 1), (64, jnp.float32, 7)])
def test_a_row_has_the_same_token_in_every_batch(vocab, dtype, guesses):
    kinds = list(make_logits(vocab).values())
    sampling_rows = [SAMPLING_ROWS[i] for i in RNG.choice(len(SAMPLING_ROWS), 36, replace=False)]
    logits = np.stack([np.asarray(jnp.asarray(kinds[i % len(kinds)], dtype)) for i in range(len(sampling_rows))])
    whole = run(logits, sampling_rows, SamplingMode.RANDOM, guesses).tokens
    np.testing.assert_array_equal(run(logits, sampling_rows, SamplingMode.LOGPROBS, guesses).tokens, whole)
    for rows in (1, 2, 4, 8, 9) if guesses == 1 else (1, 3):
        for begin in range(0, len(sampling_rows) - rows + 1, rows):
            part = slice(begin, begin + rows)
            np.testing.assert_array_equal(
                run(logits[part], sampling_rows[part], SamplingMode.RANDOM, guesses).tokens, whole[part]
            )
    back = run(logits[::-1], sampling_rows[::-1], SamplingMode.RANDOM, guesses).tokens[::-1]
    np.testing.assert_array_equal(back, whole)


def test_shares_that_end_on_a_token_are_the_same_in_every_batch():
    """Rounding, which differs with the number of rows, decides nothing where a sum is exactly the share asked for."""
    vocab = 257
    sampling_rows: list[SamplingRow] = []
    logits: Any = []
    for count, k in itertools.product((2, 5, 10, 40), range(1, 10)):
        p = np.full(vocab, 0.5 / (vocab - count))
        p[:count] = 0.5 / count
        logits.append(np.log(RNG.permutation(p)))
        min_p = 0.0 if k % 3 else p.min() / p.max()
        sampling_rows.append(sampling_row(position=k, seed=count, top_p=0.5 if k % 2 else 0.05 * k, min_p=min_p))
    logits = np.array(logits, np.float32)
    whole = run(logits, sampling_rows, SamplingMode.RANDOM).tokens
    for rows in (1, 2, 4, 7):
        for part in (slice(i, i + rows) for i in range(0, len(sampling_rows) - rows + 1, rows)):
            np.testing.assert_array_equal(run(logits[part], sampling_rows[part], SamplingMode.RANDOM).tokens, whole[part])
    halves = [i for i in range(len(sampling_rows)) if sampling_rows[i].top_p == 0.5 and not sampling_rows[i].min_p]
    assert all(logits[i, whole[i]] == logits[i].max() for i in halves)  # half of the mass is the best ones'


@pytest.mark.parametrize("mode", list(SamplingMode))
def test_suppressed_ids_leave_the_best_of_the_others_and_are_ignored_where_there_are_none(mode):
    vocab = 64
    for name, row in make_logits(vocab).items():
        best = int(np.nanargmax(np.where(np.isnan(row), -np.inf, row)))
        for suppressed in ((best,), (0,), (0, vocab - 1), tuple(range(8)), (best, best)):
            sampling_rows = [
                sampling_row(temperature=t, top_k=k, suppressed=suppressed) for t in (0.0, 1e-300, 1e-30) for k in (0, 1, 50)
            ]
            tokens = run(np.tile(row, (len(sampling_rows), 1)), sampling_rows, mode).tokens
            allowed = best_of(row, suppressed)
            assert set(tokens.tolist()) <= allowed, (name, suppressed)
    few = RNG.standard_normal((4, 8)).astype(np.float32)
    sampling_rows = [sampling_row(temperature=t, suppressed=tuple(range(8))) for t in (0.0, 1e-30, 1.0, 100.0)]
    tokens = run(few, sampling_rows, mode).tokens
    assert ((tokens >= 0) & (tokens < 8)).all()
    assert tokens[:2].tolist() == few[:2].argmax(1).tolist()


def test_a_suppressed_token_is_never_drawn_at_any_temperature():
    sampling_rows = [sampling_row(position=i, temperature=t, suppressed=(3, 5, 9)) for t in TEMPERATURES for i in range(50)]
    logits = np.zeros((len(sampling_rows), 12), np.float32)
    logits[:, [3, 5]] = HUGE
    assert not {3, 5, 9} & set(run(logits, sampling_rows, SamplingMode.RANDOM).tokens.tolist())


def test_a_row_of_nan_leaves_the_others_as_they_are():
    logits = RNG.standard_normal((8, 64)).astype(np.float32)
    sampling_rows = [sampling_row(position=i, temperature=(0.0, 1.0)[i % 2], top_p=0.9) for i in range(8)]
    for mode in SamplingMode:
        clean = run(logits, sampling_rows, mode)
        broken = logits.copy()
        broken[3], broken[4, ::2] = NAN, NAN
        result = run(broken, sampling_rows, mode)
        others = [0, 1, 2, 5, 6, 7]
        np.testing.assert_array_equal(result.tokens[others], clean.tokens[others])
        assert result.tokens[4] % 2 == 1
        if mode is SamplingMode.LOGPROBS:
            np.testing.assert_array_equal(result.top_tokens[others], clean.top_tokens[others])


def test_log_probabilities_are_finite_numbers():
    """JSON has no NaN and no infinity."""
    for name, row in make_logits(64).items():
        result = run(row[None], [sampling_row(logprobs=True, suppressed=(0,))], SamplingMode.LOGPROBS)
        for values in (result.logprobs, result.top_logprobs):
            assert np.isfinite(values).all() and (values <= 0).all(), name
        assert ((result.top_tokens >= 0) & (result.top_tokens < 64)).all()


def test_at_small_temperatures_only_tokens_close_to_the_best_are_drawn():
    """No temperature is clamped: a gap counts by its ratio to the temperature."""
    gap = np.float32(1e-7)
    logits = np.zeros((2000, 16), np.float32)
    logits[:, 1:] = -gap
    sampling_rows = [sampling_row(position=i, temperature=1e-7) for i in range(2000)]
    best = (run(logits, sampling_rows, SamplingMode.RANDOM).tokens == 0).mean()
    assert abs(best - 1 / (1 + 15 * np.exp(-1))) < 0.04
    sampling_rows = [sampling_row(position=i, temperature=1e-9) for i in range(2000)]
    assert (run(logits, sampling_rows, SamplingMode.RANDOM).tokens == 0).all()


def test_parameters_that_change_nothing_need_no_draw():
    """Where every row is greedy in effect, the greedy program is enough."""
    greedy = [
        sampling_row(temperature=0.0),
        sampling_row(temperature=1e-300),
        sampling_row(temperature=1e-40),
        sampling_row(top_k=1),
    ]
    assert pack_sampling_rows(greedy, 4, 0)[1] is SamplingMode.GREEDY
    assert pack_sampling_rows([sampling_row(temperature=1.2e-38)], 1, 0)[1] is SamplingMode.RANDOM
