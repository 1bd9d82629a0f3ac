"""What steps cost on this machine, learnt from the steps that ran."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from chameleon_jax.request import Request
from chameleon_jax.scheduler.plan import PrefillChunk

FEATURES = 6
PREFILL, TOKENS, TOKEN_RANKS, DECODE, ROWS, CONTEXT = range(FEATURES)


class StepCost:
    """Seconds of a step as a linear function of what is in it: a prefill part, its tokens, its tokens x their adapter's rank, a
    decode part, its rows, their context tokens. Fitted by recursive least squares that forgets, so it follows the machine.
    """

    FORGET = 0.999
    SCALE = np.array([1e0, 1e3, 1e5, 1e0, 1e2, 1e4])
    """Typical sizes of the features, so that one regularisation suits all."""
    ENOUGH = 50
    """Steps before it is believed."""
    LONGEST = 5.0
    """Seconds; what took longer was an interruption, not a step."""

    def __init__(self) -> None:
        self._weights = np.zeros(FEATURES)
        self._inverse = np.eye(FEATURES) * 1e3
        self.num_steps = 0

    @property
    def known(self) -> bool:
        return self.num_steps >= self.ENOUGH

    @staticmethod
    def features(prefills: Sequence[PrefillChunk], decodes: Sequence[Request], rank_of: Callable[[Request], int]) -> np.ndarray:
        """`[FEATURES]` of a step."""
        x = [0.0] * FEATURES
        for chunk in prefills:
            x[PREFILL] = 1.0
            x[TOKENS] += chunk.num_tokens
            x[TOKEN_RANKS] += chunk.num_tokens * rank_of(chunk.request)
        if decodes:
            x[DECODE], x[ROWS] = 1.0, len(decodes)
            x[CONTEXT] = sum([request.num_computed for request in decodes])
        return np.array(x)

    def observe(self, features: np.ndarray, seconds: float) -> None:
        if seconds <= 0 or seconds > self.LONGEST:
            return
        x = features / self.SCALE
        gain = self._inverse @ x
        gain /= self.FORGET + x @ gain
        self._weights += gain * (seconds - x @ self._weights)
        self._inverse = (self._inverse - np.outer(gain, x @ self._inverse)) / self.FORGET
        spread = self._inverse.trace()
        if spread > 1e6:  # nothing new for long: forgetting would make it unstable
            self._inverse *= 1e6 / spread
        self.num_steps += 1

    def seconds(self, features: np.ndarray) -> float:
        return float(np.maximum(self._weights, 0.0) @ (features / self.SCALE))

    def prefill_seconds(self, tokens: int, rank: int) -> float:
        """Of that many prompt tokens in a step that prefills anyway."""
        w = self._weights
        token_ranks = max(w[TOKEN_RANKS], 0.0) * tokens * rank / self.SCALE[TOKEN_RANKS]
        return float(max(w[TOKENS], 1e-9) * tokens / self.SCALE[TOKENS] + token_ranks)
