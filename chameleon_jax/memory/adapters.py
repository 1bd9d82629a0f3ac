"""An adapter to the host: its content hash, its size, and its tier of memory."""

from __future__ import annotations

import dataclasses
import enum

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
