"""One queue of the multi-level scheduler."""

from __future__ import annotations

from chameleon_jax.scheduler.request_queue import RequestQueue


class Level:
    """Waiting requests whose size lies between two bounds, oldest first in each class.

    Attributes:
        waiting: the requests.
        quota: pages that running requests may be charged to the level.
        remaining: pages of the quota that neither its own requests nor those it lent to are charged for.
        blocked_since: seconds of the loop's clock when its head first fitted the quota but not the memory; None while it does
            not wait for memory. A new head takes over the place of the one before it.
    """

    def __init__(self, quota: int):
        self.waiting = RequestQueue()
        self.quota = self.remaining = quota
        self.blocked_since: float | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is charged to the level."""
        return self.remaining >= self.quota
