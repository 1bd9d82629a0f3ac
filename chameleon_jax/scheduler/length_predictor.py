"""Predictions of output lengths, which the scheduler needs before it can know them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from chameleon_jax.checks import require
from chameleon_jax.request import Request

CLASS_CUTS = (141, 503)
"""Output tokens that part the short, medium and long class of the paper's proxy predictor."""


class LengthPredictor:
    """Predicts output lengths. No method may block. One that neither learns nor updates overrides `predict` alone."""

    def predict(self, request: Request) -> int:
        """Predict the output tokens of a new request, 1 to max_tokens. Called once, when it is submitted."""
        raise NotImplementedError

    def updates(self) -> list[tuple[Request, int]]:
        """Return later, better predictions for requests passed to `predict`, each at most once. Called each step."""
        return []

    def observe(self, request: Request) -> None:
        """Learn from a request that ended with len(request.output_token_ids) output tokens."""

    def forget(self, content_hash: str) -> None:
        """Drop the history of an adapter."""


def _clip(tokens: float, request: Request) -> int:
    return max(1, min(request.params.max_tokens, round(tokens)))


class _DecayingHistogram:
    """Output lengths on a logarithmic scale; each new one multiplies the weight of the others by `DECAY`."""

    BINS_PER_DOUBLING = 4
    DECAY = 0.97

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}
        self.total = 0.0

    def add(self, tokens: int) -> None:
        weights = self._weights
        for bin in weights:
            weights[bin] *= self.DECAY
        bin = self._bin(max(tokens, 1))
        weights[bin] = weights.get(bin, 0.0) + 1.0
        self.total = self.total * self.DECAY + 1.0

    def _bin(self, tokens: int) -> int:
        doublings = tokens.bit_length() - 1
        return (doublings * self.BINS_PER_DOUBLING) + ((tokens - (1 << doublings)) * self.BINS_PER_DOUBLING >> doublings)

    def quantile(self, share: float) -> float:
        """Upper edge of the bin that holds the quantile, in tokens."""
        left = share * self.total
        for bin in sorted(self._weights):
            left -= self._weights[bin]
            if left <= 0:
                break
        doublings, part = divmod(bin + 1, self.BINS_PER_DOUBLING)
        return (1 + part / self.BINS_PER_DOUBLING) * float(1 << doublings)


class HistoryPredictor(LengthPredictor):
    """Predicts a quantile of the output lengths of the same adapter's requests, the recent ones counting most.

    Args:
        prior: output tokens predicted before any request has ended.
        share: the quantile, in (0, 1). A higher one lets more requests end within the pages they reserved, but reserves more.
    """

    ENOUGH = 4.0
    """Weight of an adapter's observations below which the history of all adapters is used instead."""

    def __init__(self, prior: int, share: float = 0.6):
        self._prior = prior
        self._share = share
        self._all = _DecayingHistogram()
        self._by_adapter: dict[str | None, _DecayingHistogram] = {}

    def predict(self, request: Request) -> int:
        history = self._by_adapter.get(request.adapter)
        if history is None or history.total < self.ENOUGH:
            history = self._all
        return _clip(history.quantile(self._share) if history.total else self._prior, request)

    def observe(self, request: Request) -> None:
        tokens = len(request.output_token_ids)
        self._all.add(tokens)
        self._by_adapter.setdefault(request.adapter, _DecayingHistogram()).add(tokens)

    def forget(self, content_hash: str) -> None:
        self._by_adapter.pop(content_hash, None)


TrueLength = Callable[[Request], int]
"""Output tokens that a request will have, known to an experiment and not to a server."""


class OraclePredictor(LengthPredictor):
    """Predicts the true length, for experiments."""

    def __init__(self, true_length: TrueLength):
        self._true_length = true_length

    def predict(self, request: Request) -> int:
        return self._true_length(request)


class ConfusionPredictor(LengthPredictor):
    """Predicts the length typical of a length class that is right with a given probability, for experiments.

    A wrong class is one beside the right one.

    Args:
        true_length: the truth.
        accuracy: probability of the right class, 0 to 1.
        cuts: output tokens between classes, ascending.
        typical: predicted tokens of each class, one more than there are cuts.
        seed: seed of the errors.
    """

    def __init__(
        self,
        true_length: TrueLength,
        accuracy: float,
        cuts: Sequence[float] = CLASS_CUTS,
        typical: Sequence[float] = (70, 270, 640),
        seed: int = 0,
    ):
        require(0 <= accuracy <= 1, "accuracy", accuracy, "0 to 1")
        if len(typical) != len(cuts) + 1:
            raise ValueError(f"typical has {len(typical)} lengths; allowed: {len(cuts) + 1}, one a class")
        self._true_length = true_length
        self._accuracy, self._cuts, self._typical = accuracy, tuple(cuts), tuple(typical)
        self._random = random.Random(seed)

    def predict(self, request: Request) -> int:
        label = sum(self._true_length(request) > cut for cut in self._cuts)
        if self._random.random() >= self._accuracy:
            beside = [other for other in (label - 1, label + 1) if 0 <= other < len(self._typical)]
            label = self._random.choice(beside)
        return _clip(self._typical[label], request)
