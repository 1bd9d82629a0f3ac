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


@dataclasses.dataclass
class _Named:
    info: AdapterInfo
    path: str | None
    pinned: bool


class AdapterRegistry:
    """Names to adapters: each with the path it was read from, and whether the name pins it. Removing or replacing a name does
    not disturb requests that hold the content hash."""

    def __init__(self) -> None:
        self._names: dict[str, _Named] = {}

    def set(self, name: str, info: AdapterInfo, path: str | None = None, pinned: bool = False) -> AdapterInfo | None:
        """Names an adapter; returns the one that had the name."""
        old = self.get(name)
        self._names[name] = _Named(info, path, pinned)
        return old

    def remove(self, name: str) -> AdapterInfo:
        """Raises KeyError with the names there are."""
        self.named(name)
        return self._names.pop(name).info

    def get(self, name: str) -> AdapterInfo | None:
        named = self._names.get(name)
        return None if named is None else named.info

    def named(self, name: str) -> AdapterInfo:
        """Raises KeyError with the names there are."""
        if name not in self._names:
            raise KeyError(f"no adapter is named {name!r}; there are: {', '.join(self.names()) or 'none'}")
        return self._names[name].info

    def path(self, name: str) -> str | None:
        named = self._names.get(name)
        return None if named is None else named.path

    def pin(self, name: str, pinned: bool) -> None:
        self._names[name].pinned = pinned

    def is_pinned(self, name: str) -> bool:
        return name in self._names and self._names[name].pinned

    def names_of(self, content_hash: str) -> list[str]:
        return sorted(name for name, named in self._names.items() if named.info.content_hash == content_hash)

    def names_by_hash(self) -> dict[str, list[str]]:
        by_hash: dict[str, list[str]] = {}
        for name in self.names():
            by_hash.setdefault(self._names[name].info.content_hash, []).append(name)
        return by_hash

    def names(self) -> list[str]:
        return sorted(self._names)
