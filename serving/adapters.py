"""Adapters on their way in: read from a PEFT directory, checked, and packed into pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from chameleon_jax.checkpoints import peft
from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.adapters import MAX_RANK, AdapterInfo
from chameleon_jax.models.adapters.transfers import PinnedBlock
from chameleon_jax.models.adapters.weights import AdapterWeights
from chameleon_jax.models.page_layout import AdapterPlacement, PageLayout


@dataclasses.dataclass(frozen=True)
class PackedAdapter:
    """An adapter that can be loaded.

    Attributes:
        info: Its identity and size.
        placement: Places of its rows in its pages.
        block: Its pages, in memory that transfers start from.
    """

    info: AdapterInfo
    placement: AdapterPlacement
    block: PinnedBlock


class AdapterPacker:
    """Reads and packs adapters for one engine. Thread-safe, and changes nothing in the engine.

    Args:
        stage: Makes of a packed array `[layers, pages, page_elems]` the block that is held in host memory.
        num_pages: Pages of the pool, the trash page included.
    """

    def __init__(
        self,
        config: EngineConfig,
        layout: PageLayout,
        dtype: jnp.dtype,
        num_pages: int,
        stage: Callable[[np.ndarray], PinnedBlock],
    ):
        self._config = config
        self._layout = layout
        self._dtype = dtype
        self._num_pages = num_pages
        self._stage = stage

    def read(self, name: str, path: str | Path) -> PackedAdapter:
        """Read a PEFT directory and pack its adapter. Raises ValueError where it cannot be served."""
        self._check_name(name)
        return self.pack(name, peft.load(path, self._layout.config))

    def pack(self, name: str, weights: AdapterWeights) -> PackedAdapter:
        """Pack an adapter whose weights are in memory. Raises ValueError where it cannot be served."""
        self._check_name(name)
        weights.check(self._layout.config)
        rank = max(weights.ranks.values())
        if rank > self._config.max_lora_rank:
            allowed = f"1 to {self._config.max_lora_rank} (max_lora_rank; the server's --max-lora-rank, at most {MAX_RANK})"
            raise ValueError(f"adapter {name!r}: rank is {rank}; allowed: {allowed}")
        placement = self._layout.place(weights.ranks)
        if placement.num_pages >= self._num_pages - 1:
            raise ValueError(f"adapter {name!r} takes {placement.num_pages} pages; the pool has {self._num_pages - 1}")
        block = self._layout.pack(weights, self._dtype)
        if not np.isfinite(block.astype(np.float32)).all():
            raise ValueError(f"adapter {name!r}: weights overflow {self._dtype.name}")
        num_bytes = placement.num_pages * self._layout.page_bytes(self._dtype.itemsize)
        info = AdapterInfo(weights.content_hash, rank, placement.num_pages, num_bytes)
        return PackedAdapter(info, placement, self._stage(block))

    def _check_name(self, name: str) -> None:
        if not self._config.enable_lora:
            raise ValueError(f"adapter {name!r}: enable_lora is False")
        if not name:
            raise ValueError("the adapter's name is empty")
