"""Waiting requests, sorted."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator

from chameleon_jax.request import Request


class RequestQueue:
    """Requests sorted by a key, then by arrival.

    One list: adding or removing moves pointers, which takes a few microseconds at 10,000 requests and allocates nothing.
    """

    def __init__(self) -> None:
        self._items: list[tuple[float, int, Request]] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Request]:
        return (item[2] for item in self._items)

    def at(self, place: int) -> Request | None:
        """Return the request at a place, 0 being the first; None past the end."""
        return self._items[place][2] if place < len(self._items) else None

    def first(self, count: int) -> list[Request]:
        """Return at most `count` requests from the front."""
        return [item[2] for item in itertools.islice(self._items, count)]

    def add(self, request: Request, key: float = 0.0) -> None:
        """Insert a request."""
        bisect.insort(self._items, (key, request.order, request))

    def remove(self, request: Request, key: float = 0.0) -> None:
        """Remove a request, given the key it was added with.

        Raises:
            KeyError: the queue has no such request under that key.
        """
        at = bisect.bisect_left(self._items, (key, request.order))
        if at == len(self._items) or self._items[at][2] is not request:
            raise KeyError(request.request_id)
        del self._items[at]
