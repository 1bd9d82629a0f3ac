"""Observers of an engine: metrics, traces, the list of recent requests."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from chameleon_jax.errors import EngineDead
from chameleon_jax.executor import LoadResult
from chameleon_jax.output_processor import OutputSnapshot
from chameleon_jax.request import Request
from chameleon_jax.sampling_params import LoRARequest

logger = logging.getLogger(__name__)


class Observer:
    """Told by the engine's thread, of the engine's death by any thread. Methods return at once.

    A subclass overrides the methods that it wants.
    """

    def updated(self, snapshots: Sequence[OutputSnapshot]) -> None:
        """Take the requests that have new tokens or ended, after each step. Told before the other methods."""

    def first_token(self, request: Request) -> None:
        """Take a request that has its first token. Not told of a request that its caller has left before."""

    def finished(self, request: Request) -> None:
        """Take a request that ended, for any reason but the engine's death."""

    def loaded(self, result: LoadResult) -> None:
        """Take the result of an adapter's load into the pool."""

    def engine_died(self, error: EngineDead, loras: Sequence[LoRARequest | None]) -> None:
        """Take the cause of the engine's death, and the adapter of each unfinished request, which end with it."""


class Observers(Observer, list[Observer]):
    """Several observers as one. An exception of one is logged, and the others are told all the same."""

    def updated(self, snapshots: Sequence[OutputSnapshot]) -> None:
        self._tell(lambda observer: observer.updated(snapshots))

    def first_token(self, request: Request) -> None:
        self._tell(lambda observer: observer.first_token(request))

    def finished(self, request: Request) -> None:
        self._tell(lambda observer: observer.finished(request))

    def loaded(self, result: LoadResult) -> None:
        self._tell(lambda observer: observer.loaded(result))

    def engine_died(self, error: EngineDead, loras: Sequence[LoRARequest | None]) -> None:
        self._tell(lambda observer: observer.engine_died(error, loras))

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in self:
            try:
                call(observer)
            except Exception:
                logger.exception("an observer failed")
