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
