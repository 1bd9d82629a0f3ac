"""Who is told what becomes of requests and loads: metrics, traces, whoever counts."""

from __future__ import annotations

import logging
from collections.abc import Callable

from chameleon_jax.executor import LoadResult
from chameleon_jax.request import Request

logger = logging.getLogger(__name__)


class Observer:
    """Told by the engine's thread; returns at once. Whoever is not interested in something leaves it out."""

    def first_token(self, request: Request) -> None:
        """A request has its first token. Not told of requests that were given up before."""

    def finished(self, request: Request) -> None:
        """A request ended, for whatever reason but the engine's death."""

    def loaded(self, result: LoadResult) -> None:
        """An adapter's load into the pool ended."""

    def lost(self, num_requests: int) -> None:
        """The engine died, and so many requests with it."""


class Observers(list[Observer]):
    """Several as one. What one of them raises is logged, and concerns nobody else."""

    def first_token(self, request: Request) -> None:
        self._tell(lambda observer: observer.first_token(request))

    def finished(self, request: Request) -> None:
        self._tell(lambda observer: observer.finished(request))

    def loaded(self, result: LoadResult) -> None:
        self._tell(lambda observer: observer.loaded(result))

    def lost(self, num_requests: int) -> None:
        self._tell(lambda observer: observer.lost(num_requests))

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in self:
            try:
                call(observer)
            except Exception:
                logger.exception("an observer failed")
