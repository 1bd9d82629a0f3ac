"""An adapter to the host: its content hash, its size, its tier of memory, and the mix of several."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
from collections.abc import Iterable

MAX_RANK = 512
"""Largest rank of an adapter that is read, trained or compiled for. `EngineConfig.max_lora_rank` may allow less."""


class AdapterTier(enum.Enum):
    """Tier of memory. HOST -> LOADING -> RESIDENT -> HOST; a cancelled or failed load goes LOADING -> HOST."""

    HOST = "host"
    LOADING = "loading"
    RESIDENT = "resident"


@dataclasses.dataclass(frozen=True)
class AdapterInfo:
    """Content of an adapter. Its hash is its identity: two names with equal weights are one adapter, new weights another.

    Attributes:
        rank: Its largest rank.
        num_pages: Pages that it takes in the pool.
        num_bytes: Bytes that it takes in the pool.
    """

    content_hash: str
    rank: int
    num_pages: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class AdapterMix:
    """Sum of several adapters' updates, which is an adapter too.

    Attributes:
        members: Content hash and weight of each, sorted: their order does not matter.
    """

    members: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, members: Iterable[tuple[str, float]]) -> AdapterMix:
        """Make a mix of content hashes with weights."""
        return cls(tuple(sorted(members)))

    @functools.cached_property
    def content_hash(self) -> str:
        """Identity of the mix: the adapter's own for one adapter of weight 1."""
        if len(self.members) == 1 and self.members[0][1] == 1.0:
            return self.members[0][0]
        return hashlib.sha256(repr(self.members).encode()).hexdigest()

    def has(self, content_hash: str) -> bool:
        """Whether an adapter is one of its members."""
        return any(content_hash == member for member, _ in self.members)
