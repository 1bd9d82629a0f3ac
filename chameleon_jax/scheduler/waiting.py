"""Requests that wait to start, and the adapters they want."""

from __future__ import annotations

from collections import Counter

from chameleon_jax.request import Request


class WaitingSet:
    """Requests without a slot, in the order in which they began to wait. A `QueuePolicy` decides which starts next.

    Attributes:
        adapters: waiting requests by content hash of their adapter; only adapters with at least one.
    """

    def __init__(self) -> None:
        self.adapters: Counter[str] = Counter()
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        """Add a request."""
        self._requests[request.request_id] = request
        if request.adapter is not None:
            self.adapters[request.adapter] += 1

    def remove(self, request: Request) -> None:
        """Remove a request; raise KeyError where it does not wait."""
        del self._requests[request.request_id]
        if request.adapter is not None:
            self.adapters[request.adapter] -= 1
            if not self.adapters[request.adapter]:
                del self.adapters[request.adapter]

    def longest_wait(self, now: float) -> float:
        """Seconds since the arrival of the request that has been in the set longest; 0 without requests."""
        first = next(iter(self._requests.values()), None)
        return 0.0 if first is None else now - first.arrival_time
