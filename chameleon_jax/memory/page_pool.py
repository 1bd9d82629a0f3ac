"""Owners of the device pages. Page numbers only; no tensor is touched."""

from __future__ import annotations

import dataclasses

from chameleon_jax.checks import require


class OutOfPages(Exception):
    """More pages were asked for than are free; none was handed out."""


@dataclasses.dataclass(frozen=True)
class PoolUsage:
    """Pages by owner.

    Attributes:
        total: pages that can have an owner.
        free: pages without one.
        kv: pages of requests.
        adapters: pages of adapters.
    """

    total: int
    free: int
    kv: int
    adapters: int


class PagePool:
    """Free list of a pool of pages.

    An owner is a request id or an adapter's content hash. Ownership changes take effect at once here and in dispatch order on
    the device: a page handed to a new owner is written only by steps dispatched after the old owner's, and the device runs
    steps in order.

    Args:
        num_pages: pages of the device pool. Page 0, the trash page, is never handed out.
    """

    def __init__(self, num_pages: int):
        require(num_pages >= 2, "num_pages", num_pages, "2 or more (page 0 is never handed out)")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, 0, -1))
        self._kv: dict[str, list[int]] = {}
        self._adapters: dict[str, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Pages that can have an owner."""
        return self.num_pages - 1

    def usage(self) -> PoolUsage:
        """Count pages by owner."""
        kv, adapters = (sum(map(len, owned.values())) for owned in (self._kv, self._adapters))
        return PoolUsage(self.capacity, self.num_free, kv, adapters)

    def can_allocate(self, pages: int) -> bool:
        """Whether so many pages are free."""
        return pages <= len(self._free)

    def extend_kv(self, request_id: str, pages: int) -> list[int]:
        """Hand more pages to a request and return them; raise OutOfPages where too few are free."""
        return self._take(self._kv, request_id, pages)

    def allocate_adapter(self, content_hash: str, pages: int) -> list[int]:
        """Hand an adapter all of its pages and return them.

        Raises:
            OutOfPages: too few pages are free.
            ValueError: the adapter has pages already.
        """
        if content_hash in self._adapters:
            raise ValueError(f"adapter {content_hash[:12]} has pages already")
        return self._take(self._adapters, content_hash, pages)

    def free_kv(self, request_id: str) -> None:
        """Take back all pages of a request, which may have none."""
        self._free.extend(reversed(self._kv.pop(request_id, [])))

    def free_adapter(self, content_hash: str) -> None:
        """Take back all pages of an adapter; raise KeyError where it has none."""
        self._free.extend(reversed(self._adapters.pop(content_hash)))

    def _take(self, owned: dict[str, list[int]], owner: str, pages: int) -> list[int]:
        if pages > len(self._free):
            raise OutOfPages(f"{pages} pages asked for, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(pages)]
        owned.setdefault(owner, []).extend(taken)
        return taken
