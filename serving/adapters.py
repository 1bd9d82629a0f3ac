"""Adapters on their way in: read from a PEFT directory or taken from memory, checked, and packed into pages."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from chameleon_jax.checkpoints import peft, peft_memory
from chameleon_jax.checks import require
from chameleon_jax.config import EngineConfig
from chameleon_jax.memory.adapters import MAX_RANK, AdapterInfo, AdapterMix
from chameleon_jax.models.adapters import packing
from chameleon_jax.models.adapters.transfers import PinnedBlock
from chameleon_jax.models.adapters.weights import AdapterWeights, mix
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


@dataclasses.dataclass(frozen=True, eq=False)
class MixJob:
    """A mix to be packed.

    Attributes:
        mix: Its identity.
        label: Its text for people.
        members: Packed block and placement of each member of the mix.
    """

    mix: AdapterMix
    label: str
    members: Sequence[tuple[Future[PinnedBlock], AdapterPlacement]]


@dataclasses.dataclass(eq=False)
class AdapterPacker:
    """Reads and packs adapters for one engine. Thread-safe, and changes nothing in the engine.

    Attributes:
        config: Settings of the engine.
        layout: Geometry of a page.
        dtype: Type of a page's elements.
        num_pages: Pages of the pool, the trash page included.
        resolve: Resolves the parts of an adapter that mean something beside the base model alone (`against_base`).
        stage: Makes of a packed array `[layers, pages, page_elems]` the block that is held in host memory.
    """

    config: EngineConfig
    layout: PageLayout
    dtype: jnp.dtype
    num_pages: int
    resolve: Callable[[AdapterWeights, int], AdapterWeights]
    stage: Callable[[np.ndarray], PinnedBlock]

    def job(
        self, name: str, path: str | Path | None, weights: Any = None, peft_config: Any = None
    ) -> Callable[[], PackedAdapter]:
        """Make the call that packs an adapter of a directory or of weights in memory. Raises ValueError for both or neither."""
        if (path is None) == (weights is None):
            given = "neither" if path is None else "both"
            raise ValueError(f"adapter {name!r}: path and weights: {given} given; allowed: one of them")
        if path is None:
            return functools.partial(self.take, name, weights, peft_config)
        return functools.partial(self.read, name, path)

    def read(self, name: str, path: str | Path) -> PackedAdapter:
        """Read a PEFT directory and pack its adapter. Raises ValueError where it cannot be served."""
        self._check_name(name)
        return self.pack(name, peft.load(path, self.layout.config))

    def take(self, name: str, weights: Any, peft_config: Any) -> PackedAdapter:
        """Pack an adapter that is in memory; see `peft_memory.take`. Raises ValueError where it cannot be served."""
        self._check_name(name)
        return self.pack(name, peft_memory.take(weights, peft_config, self.layout.config))

    def pack(self, name: str, weights: AdapterWeights) -> PackedAdapter:
        """Pack an adapter that fits the model. Raises ValueError where it cannot be served."""
        self._check_kind(name, weights)  # here, and again with what is made of the rows of embeddings
        weights = self.resolve(weights, self.config.max_lora_rank)
        if not weights.tensors:
            raise ValueError(f"adapter {name!r} equals the base model; allowed: one that changes it")
        self._check_kind(name, weights)
        rank = max(weights.ranks.values())
        placement = self.layout.place(weights.ranks, weights.vectors)
        if placement.num_pages >= self.num_pages - 1:
            raise ValueError(f"adapter {name!r} takes {placement.num_pages} pages; the pool has {self.num_pages - 1}")
        block = packing.pack(weights, self.layout, self.dtype)
        if not np.isfinite(block.astype(np.float32)).all():
            weights.to_host().check(self.layout.config)
            raise ValueError(f"adapter {name!r}: weights overflow {self.dtype.name}")
        num_bytes = placement.num_pages * self.layout.page_bytes(self.dtype.itemsize)
        content_hash = packing.content_hash(placement, block)
        info = AdapterInfo(content_hash, rank, placement.num_pages, num_bytes)
        return PackedAdapter(info, placement, self.stage(block))

    def mix(self, job: MixJob) -> PackedAdapter:
        """Pack the sum of packed adapters; waits for those that are on disk. Raises ValueError where the sum is too large."""
        ranks: Counter[str] = Counter()
        for _, placement in job.members:
            ranks.update(placement.ranks)
            if placement.vectors:
                raise ValueError(f"adapter {job.label!r}: one of its members has DoRA or biases; allowed: LoRA alone")
        self._check_rank(job.label, max(ranks.values()))
        blocks = [(np.asarray(block.result()), placement) for block, placement in job.members]
        members = [packing.unpack(block, placement, self.layout) for block, placement in blocks]
        packed = self.pack(job.label, mix([(weights, factor) for weights, (_, factor) in zip(members, job.mix.members)]))
        return dataclasses.replace(packed, info=dataclasses.replace(packed.info, content_hash=job.mix.content_hash))

    def _check_rank(self, name: str, rank: int) -> None:
        allowed = f"1 to {self.config.max_lora_rank} (max_lora_rank; the server's --max-lora-rank, at most {MAX_RANK})"
        require(rank <= self.config.max_lora_rank, f"adapter {name!r}: rank", rank, allowed)

    def _check_kind(self, name: str, weights: AdapterWeights) -> None:
        self._check_rank(name, max(weights.ranks.values(), default=1))
        if weights.extras and not self.config.enable_lora_extras:
            allowed = "LoRA on the layers' matrices, or all of that with enable_lora_extras (the server's --enable-lora-extras)"
            raise ValueError(f"adapter {name!r} has {weights.extras}; allowed: {allowed}")

    def _check_name(self, name: str) -> None:
        if not self.config.enable_lora:
            raise ValueError(f"adapter {name!r}: enable_lora is False")
        if not name:
            raise ValueError("the adapter's name is empty")
