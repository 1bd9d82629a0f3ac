"""Counters and queue sizes that the scheduler reports."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class SchedulerCounters:
    """Counts since the scheduler was made.

    Attributes:
        prefetches: adapter loads begun before a request that needs the adapter had its turn.
        cancelled_loads: adapter loads given up because no request waited for the adapter any more.
        memory_preemptions: running requests sent back to wait because the pool had no page for another output token.
        bypasses: requests that started ahead of the head of their queue, whose adapter lacked memory.
        bypass_squashes: running bypassers sent back to wait because the head could start in their place.
        underpredicted: requests that ended with more output tokens than predicted.
        overpredicted: requests that ended with fewer output tokens than predicted.
        length_updates: waiting requests whose predicted output length was replaced by a later prediction.
        quota_refreshes: times that queues and quotas were formed from recent traffic.
        scaled_quotas: refreshes whose least quotas exceeded the pool together and were scaled down.
    """

    prefetches: int = 0
    cancelled_loads: int = 0
    memory_preemptions: int = 0
    bypasses: int = 0
    bypass_squashes: int = 0
    underpredicted: int = 0
    overpredicted: int = 0
    length_updates: int = 0
    quota_refreshes: int = 0
    scaled_quotas: int = 0

    @property
    def preemptions(self) -> int:
        """Running requests sent back to wait, for memory or as bypassers."""
        return self.memory_preemptions + self.bypass_squashes


@dataclasses.dataclass
class ProxyCounters:
    """Counts of a length proxy since the start.

    Attributes:
        predicted: Requests that the proxy has predicted.
        skipped: Requests left to the fallback, as too many waited.
        failed: Requests left to the fallback, as the proxy failed.
    """

    predicted: int = 0
    skipped: int = 0
    failed: int = 0


@dataclasses.dataclass(frozen=True)
class QueueStats:
    """Size and quota of one waiting queue at one moment.

    Attributes:
        name: "0" for the queue of the smallest requests, "1" for the next, and so on.
        waiting: requests in the queue.
        quota_pages: pages that running requests of the queue may hold; None in systems without quotas.
        free_pages: pages of the quota that no running request is charged for; negative while the queue exceeds its quota.
    """

    name: str
    waiting: int
    quota_pages: int | None = None
    free_pages: int | None = None
