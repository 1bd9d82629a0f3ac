"""Cost of steps on this machine, learnt from the steps that ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from chameleon_jax.request import Request
from chameleon_jax.scheduler.plan import PrefillChunk
from chameleon_jax.scheduler.step_shapes import StepShapes

LEAST_TOKEN_S = 1e-12
"""Least seconds of a prompt token. Above 0, so that other costs can be divided by it."""
FEATURES = 7
STEP, PREFILL, TOKENS, TOKEN_RANKS, DECODE, ROWS, CONTEXT = range(FEATURES)


class StepCost:
    """Seconds of a step as a linear function of its features.

    The features are: a step that runs, one that has prompts, its prompt tokens, its prompt tokens x their adapter's rank, a
    step that decodes, its rows, their context tokens. All padding of a step with prompts counts as prompt tokens: they are the
    tokens that the device computes less the rows. The function is fitted by least squares without negative costs, in which old
    steps lose weight, so it follows the machine.

    Only steps with prompts and decodes tell the three fixed costs apart, and only beside steps of both other kinds. Until then
    the fit divides them, to the right sums for the kinds of steps that it saw.
    """

    FORGET = 0.999
    SCALE = np.array([1e0, 1e0, 1e3, 1e5, 1e0, 1e2, 1e4])
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
    def decode_features(decodes: Sequence[Request]) -> np.ndarray:
        """Features of a step without prompts, `[FEATURES]` float64."""
        x = np.zeros(FEATURES)
        if decodes:
            x[STEP], x[DECODE], x[ROWS] = 1.0, 1.0, len(decodes)
            x[CONTEXT] = sum([request.num_computed for request in decodes])
        return x

    @staticmethod
    def add_prompts(
        x: np.ndarray, prefills: Sequence[PrefillChunk], rank_of: Callable[[Request], int], shapes: StepShapes
    ) -> None:
        """Add prompts to the features of a step without them."""
        if prefills:
            rows = int(x[ROWS])
            x[STEP], x[PREFILL] = 1.0, 1.0
            counts = [chunk.num_tokens for chunk in prefills]
            x[TOKENS] = shapes.padded(rows + sum(counts), sum(map(shapes.tiles, counts))) - rows
            x[TOKEN_RANKS] = sum([chunk.num_tokens * rank_of(chunk.request) for chunk in prefills])

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
        self._weights = self._fit()
        self._per_token = max(float(self._weights[TOKENS] / self.SCALE[TOKENS]), LEAST_TOKEN_S)
        self._per_token_rank = float(self._weights[TOKEN_RANKS] / self.SCALE[TOKEN_RANKS])
        self.num_steps += 1

    def _fit(self) -> np.ndarray:
        """Solve for the weights; features with negative ones are left out, the most negative first."""
        kept = np.arange(FEATURES)
        while True:
            weights = np.linalg.solve(self._moments[np.ix_(kept, kept)], self._products[kept])
            if weights.min(initial=0.0) >= 0:
                break
            kept = np.delete(kept, weights.argmin())
        fitted = np.zeros(FEATURES)
        fitted[kept] = weights
        return fitted

    def seconds(self, features: np.ndarray) -> float:
        """Estimate the seconds of a step."""
        return float(self._weights @ (features / self.SCALE))

    def pass_tokens(self, decodes: bool) -> float:
        """Estimate the fixed cost of a further step's prompts, in prompt tokens without an adapter.

        Args:
            decodes: whether that step decodes anyway. If not, its prompts are charged for all of its fixed cost.
        """
        x = np.zeros(FEATURES)
        x[STEP], x[PREFILL] = not decodes, 1.0
        return self.seconds(x) / self._per_token

    def prefill_seconds(self, tokens: int, rank: int) -> float:
        """Estimate the seconds of prompt tokens of one adapter's rank, in a step that prefills anyway."""
        return tokens * (self._per_token + rank * self._per_token_rank)

    def output_seconds(self, rows: int) -> float:
        """Estimate the seconds of one output token in a step of so many rows, context not counted."""
        x = np.zeros(FEATURES)
        x[STEP], x[DECODE], x[ROWS] = 1.0, 1.0, rows
        return self.seconds(x) / rows
