"""The protocol between the scheduler and the order in which waiting requests start."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from chameleon_jax.request import Request
from chameleon_jax.scheduler.admission import AdmissionBatch
from chameleon_jax.scheduler.stats import QueueStats

MAX_OVERTAKEN = 32
"""Requests at the front of a queue, waiting for their adapters to load, that the ones behind them may overtake."""


class QueuePolicy(Protocol):
    """Order in which waiting requests start, those of lower `Request.priority` first. Holds the waiting requests."""

    def add(self, request: Request, now: float, new: bool = True) -> None:
        """Queue a request whose `predicted_output_len` and `size` are set.

        Args:
            request: the request.
            now: seconds of the loop's clock.
            new: False for a request that was preempted or has a new length prediction.
        """

    def remove(self, request: Request) -> None:
        """Drop a waiting request that was aborted or is about to be queued anew."""

    def admit(self, batch: AdmissionBatch, running: Collection[Request], now: float) -> None:
        """Offer requests to the batch, best first, and drop those that start."""

    def release(self, request: Request, now: float) -> None:
        """Take back the quota of a request that had started and has ended or was preempted."""

    def victim(self, room: int) -> Request | None:
        """Choose a running bypasser to squash so that an older request can start, and count it.

        Args:
            room: pages that are free or can be freed by eviction.
        """

    def upcoming(self, count: int) -> list[Request]:
        """List at most `count` waiting requests in the order in which they will likely start."""

    def queues(self) -> tuple[QueueStats, ...]:
        """Describe each queue, the queue of the smallest requests first."""
