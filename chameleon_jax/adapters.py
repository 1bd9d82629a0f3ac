"""What an adapter is to the host: a name for people, a content hash for the machine, its size, and where it is."""

from __future__ import annotations

import dataclasses
import enum

MAX_RANK = 512
"""Largest rank of an adapter that is read, trained or compiled for. `EngineConfig.max_lora_rank` may allow less."""


class AdapterTier(enum.Enum):
    """HOST -> LOADING -> RESIDENT -> HOST. A load that was given up goes LOADING -> HOST."""

    HOST = "host"
    LOADING = "loading"
    RESIDENT = "resident"


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """Identity is `content_hash`: two names with the same weights are one adapter, one name with new weights is another.

    Attributes:
        rank: its largest rank.
        num_pages: pages it takes in the pool.
        num_bytes: bytes it takes in the pool.
    """

    content_hash: str
    rank: int
    num_pages: int
    num_bytes: int


class AdapterRegistry:
    """Names to adapters. Removing or replacing a name does not disturb requests that hold the content hash."""

    def __init__(self) -> None:
        self._names: dict[str, AdapterInfo] = {}

    def set(self, name: str, info: AdapterInfo) -> AdapterInfo | None:
        """Names an adapter; returns the one that had the name."""
        old = self._names.get(name)
        self._names[name] = info
        return old

    def remove(self, name: str) -> AdapterInfo:
        """Raises KeyError with the names there are."""
        if name not in self._names:
            raise KeyError(f"no adapter is named {name!r}; there are: {', '.join(sorted(self._names)) or 'none'}")
        return self._names.pop(name)

    def get(self, name: str) -> AdapterInfo | None:
        return self._names.get(name)

    def names_of(self, content_hash: str) -> list[str]:
        return sorted(name for name, info in self._names.items() if info.content_hash == content_hash)

    def names_by_hash(self) -> dict[str, list[str]]:
        by_hash: dict[str, list[str]] = {}
        for name in self.names():
            by_hash.setdefault(self._names[name].content_hash, []).append(name)
        return by_hash

    def names(self) -> list[str]:
        return sorted(self._names)
