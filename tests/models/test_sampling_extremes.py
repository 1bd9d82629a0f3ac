"""Whatever parameters and logits there are, a row gets a token that may be drawn, and the same one in every batch."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chameleon_jax.models.runtime.step_inputs import Draw, pack_draws
from chameleon_jax.models.sampling import Sampled, SamplingMode, sample

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


def make_draw(**fields) -> Draw:
    defaults = dict(slot=0, position=7, seed=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, banned=(), logprobs=False)
    return Draw(**(defaults | fields))


def run(logits: np.ndarray, draws: list[Draw], mode: SamplingMode, guesses: int = 1) -> Sampled:
    rows, _ = pack_draws(dict(enumerate(draws)), len(draws), 0)
    return jax.tree.map(np.asarray, program(mode, guesses)(jnp.asarray(logits), rows))


def make_logits(vocab: int) -> dict[str, np.ndarray]:
    """A row of each kind."""
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


def best_of(logits: np.ndarray, banned=()) -> set[int]:
    """The tokens that share the largest logit; NaN is none, and bans that leave nothing are not heeded."""
    numbers = np.where(np.isnan(logits), -np.inf, logits)
    allowed = numbers.copy()
    allowed[list(banned)] = -np.inf
    allowed = allowed if (allowed > -np.inf).any() else numbers
    return set(np.flatnonzero(allowed == allowed.max()).tolist())


def every_draw() -> list[Draw]:
    """Each parameter at its extremes: alone with each temperature, and many together."""
    one = [dict(temperature=t) for t in TEMPERATURES]
    one += [dict(temperature=t, **{f: v}) for t in TEMPERATURES for f, vs in FIELDS.items() for v in vs]
    several = [dict(zip(("temperature", *FIELDS), values)) for values in itertools.product(TEMPERATURES, *FIELDS.values())]
    picks = RNG.choice(len(several), 150, replace=False)
    return [make_draw(position=i, **fields) for i, fields in enumerate(one + [several[i] for i in picks])]


FIELDS: dict[str, Any] = {"top_p": TOP_PS, "top_k": TOP_KS, "min_p": MIN_PS, "seed": SEEDS}
DRAWS = every_draw()


@pytest.mark.parametrize(("vocab", "dtype"), [(64, jnp.float32), (257, jnp.bfloat16)])
def test_a_token_that_may_be_drawn_is_drawn(vocab, dtype):
    for name, row in make_logits(vocab).items():
        row = np.asarray(jnp.asarray(row, dtype))
        tokens = run(np.tile(row, (len(DRAWS), 1)), DRAWS, SamplingMode.RANDOM).tokens
        assert ((tokens >= 0) & (tokens < vocab)).all(), name
        numbers = row.astype(np.float32)[tokens]
        if not (np.isnan(row) | (row == -np.inf)).all():
            assert not np.isnan(numbers).any() and (numbers > -np.inf).all(), name
        best = best_of(row.astype(np.float32))
        for draw, token in zip(DRAWS, tokens.tolist()):
            if draw.temperature < TINY or draw.top_k == 1:
                assert token == min(best), (name, draw)
            elif name != "close" and (draw.temperature <= 1e-9 or draw.top_p <= 1e-9 or draw.min_p == 1.0):
                assert token in best, (name, draw)


@pytest.mark.parametrize(("vocab", "dtype", "guesses"), [(64, jnp.bfloat16, 1), (257, jnp.float32, 1), (64, jnp.float32, 7)])
def test_a_row_has_the_same_token_in_every_batch(vocab, dtype, guesses):
    kinds = list(make_logits(vocab).values())
    draws = [DRAWS[i] for i in RNG.choice(len(DRAWS), 36, replace=False)]
    logits = np.stack([np.asarray(jnp.asarray(kinds[i % len(kinds)], dtype)) for i in range(len(draws))])
    whole = run(logits, draws, SamplingMode.RANDOM, guesses).tokens
    np.testing.assert_array_equal(run(logits, draws, SamplingMode.LOGPROBS, guesses).tokens, whole)
    for rows in (1, 2, 4, 8, 9) if guesses == 1 else (1, 3):
        for begin in range(0, len(draws) - rows + 1, rows):
            part = slice(begin, begin + rows)
            np.testing.assert_array_equal(run(logits[part], draws[part], SamplingMode.RANDOM, guesses).tokens, whole[part])
    back = run(logits[::-1], draws[::-1], SamplingMode.RANDOM, guesses).tokens[::-1]
    np.testing.assert_array_equal(back, whole)


def test_shares_that_end_on_a_token_are_the_same_in_every_batch():
    """Rounding, which differs with the number of rows, decides nothing where a sum is just what was asked for."""
    vocab = 257
    draws: list[Draw] = []
    logits: Any = []
    for count, k in itertools.product((2, 5, 10, 40), range(1, 10)):
        p = np.full(vocab, 0.5 / (vocab - count))
        p[:count] = 0.5 / count
        logits.append(np.log(RNG.permutation(p)))
        min_p = 0.0 if k % 3 else p.min() / p.max()
        draws.append(make_draw(position=k, seed=count, top_p=0.5 if k % 2 else 0.05 * k, min_p=min_p))
    logits = np.array(logits, np.float32)
    whole = run(logits, draws, SamplingMode.RANDOM).tokens
    for rows in (1, 2, 4, 7):
        for part in (slice(i, i + rows) for i in range(0, len(draws) - rows + 1, rows)):
            np.testing.assert_array_equal(run(logits[part], draws[part], SamplingMode.RANDOM).tokens, whole[part])
    halves = [i for i in range(len(draws)) if draws[i].top_p == 0.5 and not draws[i].min_p]
    assert all(logits[i, whole[i]] == logits[i].max() for i in halves)  # half of the mass is the best ones'


@pytest.mark.parametrize("mode", list(SamplingMode))
def test_bans_leave_the_best_of_the_others_and_are_not_heeded_where_there_are_none(mode):
    vocab = 64
    for name, row in make_logits(vocab).items():
        best = int(np.nanargmax(np.where(np.isnan(row), -np.inf, row)))
        for banned in ((best,), (0,), (0, vocab - 1), tuple(range(8)), (best, best)):
            draws = [make_draw(temperature=t, top_k=k, banned=banned) for t in (0.0, 1e-300, 1e-30) for k in (0, 1, 50)]
            tokens = run(np.tile(row, (len(draws), 1)), draws, mode).tokens
            allowed = best_of(row, banned)
            assert set(tokens.tolist()) <= allowed, (name, banned)
    few = RNG.standard_normal((4, 8)).astype(np.float32)
    draws = [make_draw(temperature=t, banned=tuple(range(8))) for t in (0.0, 1e-30, 1.0, 100.0)]
    tokens = run(few, draws, mode).tokens
    assert ((tokens >= 0) & (tokens < 8)).all()
    assert tokens[:2].tolist() == few[:2].argmax(1).tolist()


def test_a_banned_token_is_never_drawn_at_any_temperature():
    draws = [make_draw(position=i, temperature=t, banned=(3, 5, 9)) for t in TEMPERATURES for i in range(50)]
    logits = np.zeros((len(draws), 12), np.float32)
    logits[:, [3, 5]] = HUGE
    assert not {3, 5, 9} & set(run(logits, draws, SamplingMode.RANDOM).tokens.tolist())


def test_a_row_of_nan_leaves_the_others_as_they_are():
    logits = RNG.standard_normal((8, 64)).astype(np.float32)
    draws = [make_draw(position=i, temperature=(0.0, 1.0)[i % 2], top_p=0.9) for i in range(8)]
    for mode in SamplingMode:
        clean = run(logits, draws, mode)
        broken = logits.copy()
        broken[3], broken[4, ::2] = NAN, NAN
        result = run(broken, draws, mode)
        others = [0, 1, 2, 5, 6, 7]
        np.testing.assert_array_equal(result.tokens[others], clean.tokens[others])
        assert result.tokens[4] % 2 == 1
        if mode is SamplingMode.LOGPROBS:
            np.testing.assert_array_equal(result.top_tokens[others], clean.top_tokens[others])


def test_log_probabilities_are_finite_numbers():
    """JSON knows no others."""
    for name, row in make_logits(64).items():
        result = run(row[None], [make_draw(logprobs=True, banned=(0,))], SamplingMode.LOGPROBS)
        for values in (result.logprobs, result.top_logprobs):
            assert np.isfinite(values).all() and (values <= 0).all(), name
        assert ((result.top_tokens >= 0) & (result.top_tokens < 64)).all()


def test_at_small_temperatures_only_what_is_close_to_the_best_is_drawn():
    """No temperature is clamped: a gap counts by its ratio to the temperature."""
    gap = np.float32(1e-7)
    logits = np.zeros((2000, 16), np.float32)
    logits[:, 1:] = -gap
    draws = [make_draw(position=i, temperature=1e-7) for i in range(2000)]
    best = (run(logits, draws, SamplingMode.RANDOM).tokens == 0).mean()
    assert abs(best - 1 / (1 + 15 * np.exp(-1))) < 0.04
    draws = [make_draw(position=i, temperature=1e-9) for i in range(2000)]
    assert (run(logits, draws, SamplingMode.RANDOM).tokens == 0).all()


def test_parameters_that_change_nothing_need_no_draw():
    """Where every row is greedy in effect, the greedy program is enough."""
    greedy = [make_draw(temperature=0.0), make_draw(temperature=1e-300), make_draw(temperature=1e-40), make_draw(top_k=1)]
    assert pack_draws(dict(enumerate(greedy)), 4, 0)[1] is SamplingMode.GREEDY
    assert pack_draws({0: make_draw(temperature=1.2e-38)}, 1, 0)[1] is SamplingMode.RANDOM
