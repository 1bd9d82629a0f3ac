"""Cost of steps on this machine, learnt from the steps that ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from chameleon_jax.request import Request
from chameleon_jax.scheduler.plan import PrefillChunk
from chameleon_jax.scheduler.prefill_shapes import PrefillShapes

LEAST_TOKEN_S = 1e-12
"""Least seconds of a prompt token. Above 0, so that other costs can be divided by it."""
FEATURES = 6
PREFILL, TOKENS, TOKEN_RANKS, DECODE, ROWS, CONTEXT = range(FEATURES)


class StepCost:
    """Seconds of a step as a linear function of its features.

    The features are: a prefill part, its tokens, its tokens x their adapter's rank, a decode part, its rows, their context
    tokens. Tokens are those that the device computes, padding included. The function is fitted by least squares in which old
    steps lose weight, so it follows the machine.
    """

    FORGET = 0.999
    SCALE = np.array([1e0, 1e3, 1e5, 1e0, 1e2, 1e4])
    """Typical sizes of the features, so that one regularisation suits all."""
    RIDGE = 1e-3
    """Pull of every weight towards 0, which is all that is known of a feature that never varies."""
    ENOUGH = 50
    """Steps that must be seen before the fit is used."""
    LONGEST = 5.0
    """Seconds above which a step was interrupted and teaches nothing."""
    OUTLIER = 4.0
    """Multiple of the expected seconds to which a longer step is cut."""

    def __init__(self) -> None:
        self._weights: np.ndarray = np.zeros(FEATURES)
        self._moments: np.ndarray = np.eye(FEATURES) * self.RIDGE  # decayed sum of x x^T
        self._products: np.ndarray = np.zeros(FEATURES)  # decayed sum of x seconds
        self._per_token, self._per_token_rank = LEAST_TOKEN_S, 0.0
        self.num_steps = 0

    @property
    def known(self) -> bool:
        """Whether enough steps were seen."""
        return self.num_steps >= self.ENOUGH

    @staticmethod
    def features(
        prefills: Sequence[PrefillChunk], decodes: Sequence[Request], rank_of: Callable[[Request], int], shapes: PrefillShapes
    ) -> np.ndarray:
        """Features of a step, `[FEATURES]` float64."""
        x = [0.0] * FEATURES
        if prefills:
            x[PREFILL], x[TOKENS] = 1.0, shapes.step_tokens([chunk.num_tokens for chunk in prefills])
            x[TOKEN_RANKS] = sum([shapes.padded(chunk.num_tokens) * rank_of(chunk.request) for chunk in prefills])
        if decodes:
            x[DECODE], x[ROWS] = 1.0, len(decodes)
            x[CONTEXT] = sum([request.num_computed for request in decodes])
        return np.array(x)

    def observe(self, features: np.ndarray, seconds: float) -> None:
        """Learn from a step that took so many seconds."""
        if not 0 < seconds <= self.LONGEST:
            return
        x = features / self.SCALE
        if self.known:
            seconds = min(seconds, self.OUTLIER * max(float(x @ self._weights), 1e-3))
        self._moments = self.FORGET * self._moments + np.outer(x, x)
        self._moments[np.diag_indices(FEATURES)] += (1 - self.FORGET) * self.RIDGE
        self._products = self.FORGET * self._products + x * seconds
        self._weights = np.linalg.solve(self._moments, self._products)
        self._per_token = max(float(self._weights[TOKENS] / self.SCALE[TOKENS]), LEAST_TOKEN_S)
        self._per_token_rank = max(float(self._weights[TOKEN_RANKS] / self.SCALE[TOKEN_RANKS]), 0.0)
        self.num_steps += 1

    def seconds(self, features: np.ndarray) -> float:
        """Estimate the seconds of a step."""
        return float(np.maximum(self._weights, 0.0) @ (features / self.SCALE))

    @property
    def pass_tokens(self) -> float:
        """Fixed cost of a step's prefill, in prompt tokens without an adapter."""
        return max(float(self._weights[PREFILL] / self.SCALE[PREFILL]), 0.0) / self._per_token

    def prefill_seconds(self, tokens: int, rank: int) -> float:
        """Estimate the seconds of prompt tokens of one adapter's rank, in a step that prefills anyway."""
        return tokens * (self._per_token + rank * self._per_token_rank)

    def output_seconds(self, rows: int) -> float:
        """Estimate the seconds of one output token in a step of so many rows, context not counted."""
        x = np.zeros(FEATURES)
        x[DECODE], x[ROWS] = 1.0, rows
        return self.seconds(x) / rows
