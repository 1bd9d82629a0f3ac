"""How many tokens a request will answer with. Nobody knows; the scheduler needs a number."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from chameleon_jax.request import Request

CLASS_CUTS = (141, 503)
"""Output tokens at which the paper's proxy predictor parts short, medium and long answers (three classes)."""


class LengthPredictor(Protocol):
    def predict(self, request: Request) -> int:
        """Output tokens that a new request is expected to take, 1 to max_tokens. Called once, when it is submitted; must not
        block."""

    def updates(self) -> list[tuple[Request, int]]:
        """Later, better predictions for requests passed to `predict`, each at most once. Polled each step; must not block."""

    def observe(self, request: Request) -> None:
        """The request ended with len(request.output_token_ids) output tokens."""

    def forget(self, content_hash: str) -> None:
        """An adapter is not known any more."""


def _clip(tokens: float, request: Request) -> int:
    return max(1, min(request.params.max_tokens, round(tokens)))


class _Immediate:
    """A predictor that has nothing to add later."""

    def updates(self) -> list[tuple[Request, int]]:
        return []

    def observe(self, request: Request) -> None:
        pass

    def forget(self, content_hash: str) -> None:
        pass


class _DecayingHistogram:
    """Output lengths on a logarithmic scale; each new one makes the others count `DECAY` times as much."""

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
        """Upper edge of the bin in which the quantile lies."""
        left = share * self.total
        for bin in sorted(self._weights):
            left -= self._weights[bin]
            if left <= 0:
                break
        doublings, part = divmod(bin + 1, self.BINS_PER_DOUBLING)
        return float((1 + part / self.BINS_PER_DOUBLING) * 2**doublings)


class HistoryPredictor(_Immediate):
    """A quantile of what the same adapter's requests took, the recent ones counting most.

    Args:
        prior: output tokens where nothing was seen yet.
        share: the quantile, in (0, 1). The higher, the more requests end within what they reserved, and the more they reserve.
    """

    ENOUGH = 4.0
    """Weight of observations below which all adapters' history is asked instead."""

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
"""What an experiment knows and a server does not: the tokens a request will answer with."""


class OraclePredictor(_Immediate):
    """For experiments: the truth."""

    def __init__(self, true_length: TrueLength):
        self._true_length = true_length

    def predict(self, request: Request) -> int:
        return self._true_length(request)


class ConfusionPredictor(_Immediate):
    """For experiments: names the right length class with probability `accuracy` and otherwise one beside it, and predicts what
    is typical of the class.

    Args:
        cuts: output tokens between classes, ascending.
        typical: predicted tokens of each class, one more than there are cuts.
        accuracy: 0 to 1.
    """

    def __init__(
        self,
        true_length: TrueLength,
        accuracy: float,
        cuts: Sequence[float] = CLASS_CUTS,
        typical: Sequence[float] = (70, 270, 640),
        seed: int = 0,
    ):
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy is {accuracy}; allowed: 0 to 1")
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
