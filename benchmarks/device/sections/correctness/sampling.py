"""Sampling: greedy is the argmax, draws equal the CPU's and have the right distribution."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.report import Case, Row
from benchmarks.device.scale import Scale, on_gpu
from chameleon_jax.models.ops.sampling import SAMPLING_COLUMNS, SamplingMode, sample


def cases(scale: Scale) -> list[Case]:
    return [
        Case("sampling, tokens", functools.partial(tokens, scale)),
        Case("sampling, distribution", functools.partial(distribution, 2048 if scale.dtype == "float32" else 16384)),
    ]


def _rows(seeds: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, suppressed: int = -1) -> np.ndarray:
    count = len(seeds)
    rows = np.full((count, SAMPLING_COLUMNS), -1, np.int32)
    rows[:, :5] = np.stack([np.arange(count), np.arange(count) % 97, seeds, 0 * seeds, 0 * seeds + top_k], 1)
    rows[:, 5:8] = np.array([temperature, top_p, 0.0], np.float32).view(np.int32)
    rows[:, 8] = suppressed
    return rows


def tokens(scale: Scale) -> list[Row]:
    """Check tokens of a vocabulary of the model's size."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((64, scale.config.vocab_size), np.float32) * 3
    best = logits.argmax(1)
    seeds = rng.integers(0, 1 << 30, 64).astype(np.int32)
    compiled = jax.jit(sample, static_argnums=(2, 3))

    def draw(rows: np.ndarray, mode: SamplingMode, device: jax.Device | None = None) -> np.ndarray:
        guesses = 7 if on_gpu() and device is None else 1  # as in `sample_step`
        with jax.default_device(device):
            return np.asarray(compiled(jnp.asarray(logits), jnp.asarray(rows), mode, guesses).tokens)

    def row(name: str, wrong: int, allowed: int = 0) -> Row:
        return {"check": f"sampling, {name}", "error": f"{wrong} of 64", "limit": allowed, "ok": wrong <= allowed}

    masked = logits.copy()
    masked[np.arange(64), best[0]] = -np.inf
    drawn = draw(_rows(seeds, 0.8, 50, 0.9), SamplingMode.RANDOM)
    here = draw(_rows(seeds, 0.8, 50, 0.9), SamplingMode.RANDOM, jax.devices("cpu")[0])
    rows = [
        row("greedy", int((draw(_rows(seeds, 0.0), SamplingMode.GREEDY) != best).sum())),
        row("greedy rows of a random batch", int((draw(_rows(seeds, 0.0), SamplingMode.RANDOM) != best).sum())),
        row("top_k 1", int((draw(_rows(seeds, 1.0, 1), SamplingMode.RANDOM) != best).sum())),
        *[
            row(f"temperature {t}", int((draw(_rows(seeds, t), SamplingMode.RANDOM) != best).sum()))
            for t in (1e-40, 1.2e-38, 1e-9)
        ],
        *[row(f"top_p {p}", int((draw(_rows(seeds, 9.0, top_p=p), SamplingMode.RANDOM) != best).sum())) for p in (0.0, 1e-30)],
        row(
            "suppressed", int((draw(_rows(seeds, 0.0, suppressed=int(best[0])), SamplingMode.GREEDY) != masked.argmax(1)).sum())
        ),
        # two tokens that differ by a rounding may change places
        row("random, as on the CPU", int((drawn != here).sum()), 1),
    ]
    within = np.take_along_axis(logits, drawn[:, None], 1)[:, 0] >= np.sort(logits, 1)[:, -50]
    return [*rows, row("random, inside top_k", int((~within).sum()))]


def distribution(count: int) -> list[Row]:
    """Check the total variation between draws and softmax; the limit is far above chance."""
    logits = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    seeds = np.arange(count, dtype=np.int32) * 7919
    compiled = jax.jit(sample, static_argnums=2)
    drawn = compiled(jnp.tile(logits, (count, 1)), _rows(seeds, 0.7), SamplingMode.RANDOM).tokens
    expected = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    distance = 0.5 * np.abs(np.bincount(np.asarray(drawn), minlength=32) / count - expected).sum()
    limit = 0.5 * 32**0.5 / count**0.5 * 2
    return [
        {
            "check": f"sampling, {count} draws",
            "error": f"{distance:.1e}",
            "limit": round(limit, 3),
            "ok": bool(distance < limit),
        }
    ]
